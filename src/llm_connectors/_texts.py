"""What the embedding and ranking classes of both frameworks share: lists of texts, time limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from engine import RequestError, RequestTimeoutError

_T = TypeVar("_T")


async def within(awaitable: Awaitable[_T], timeout: float | None) -> _T:
    """The result of `awaitable`, which is cancelled when `timeout` seconds have passed.

    Raises:
        RequestTimeoutError: They have.
    """
    if timeout is None:
        return await awaitable
    try:
        return await asyncio.wait_for(awaitable, timeout)
    except TimeoutError as error:
        if isinstance(error, RequestTimeoutError):
            raise
        msg = f"The call was not finished after {timeout} s and was aborted. Allow more time."
        raise RequestTimeoutError(msg) from None


def text_list(texts: Iterable[str]) -> list[str]:
    """`texts` as a list; the engine would take numbers for token ids.

    Raises:
        RequestError: One is no string.
    """
    listed = list(texts)
    for index, text in enumerate(listed):
        if not isinstance(text, str):
            msg = f"texts[{index}] is {type(text).__name__}, not str."
            raise RequestError(msg)
    return listed
