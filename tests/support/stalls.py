"""How long an event loop stands still while something runs in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


async def longest_pause(work: Awaitable[object]) -> float:
    """Longest pause of the running event loop, in seconds, until `work` is done."""
    longest_s, task = 0.0, asyncio.ensure_future(work)
    while not task.done():
        before_s = time.perf_counter()
        await asyncio.sleep(0.001)
        longest_s = max(longest_s, time.perf_counter() - before_s)
    await task
    return longest_s


def least_pause(work: Callable[[], Awaitable[object]], limit_s: float, most: int = 5) -> float:
    """The longest pause of the quietest of some measurements, each in a loop of its own.

    Other processes on the machine can only lengthen a pause: the shortest is the code's. A loop
    that is really held up is so each time.

    Args:
        work: Makes what is run in the loop.
        limit_s: No further measurement is made once one is below it.
        most: Measurements at most.
    """
    pauses_s: list[float] = []
    while len(pauses_s) < most and not (pauses_s and min(pauses_s) < limit_s):

        async def measure() -> float:
            return await longest_pause(work())

        pauses_s.append(asyncio.run(measure()))
    return min(pauses_s)
