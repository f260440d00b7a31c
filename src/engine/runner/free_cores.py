"""`ThreadChooser`: as many CPU threads as there are free cores, looked at again and again.

A team of OpenMP threads with more threads than free cores is far slower than one with fewer: each
of the hundreds of operations of a step waits until its last thread has had its turn on a core that
somebody else is using, milliseconds each time, while the others spin. How they wait could be set in
the environment before torch is imported, which is the application's to do, not ours. So the number
of threads follows the cores that others leave.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.runner.threads import default_num_threads, set_own_num_threads

_INTERVAL_S = 0.25
"""Between two looks; each reads /proc/stat, 40 µs. The counters there advance by 10 ms."""


@dataclass(slots=True, frozen=True)
class CpuTimes:
    """Seconds since some moment.

    Attributes:
        clock_s: Wall time.
        busy_s: Of all cores this process may use, spent by anybody.
        process_s: Spent by this process.
        thread_s: Spent by the calling thread.
    """

    clock_s: float
    busy_s: float
    process_s: float
    thread_s: float


class ThreadChooser:
    """Sets the calling thread's number of CPU threads; used by the engine thread alone.

    Where the system does not tell who uses its cores (no /proc/stat), the number stays.

    Args:
        num_threads: A fixed number; None to follow the free cores.
        read_times: For tests.
        count_others: For tests.
        set_threads: For tests.
    """

    def __init__(
        self,
        num_threads: int | None,
        *,
        read_times: Callable[[], CpuTimes | None] | None = None,
        count_others: Callable[[], int] | None = None,
        set_threads: Callable[[int], None] = set_own_num_threads,
    ) -> None:
        self._most = num_threads or default_num_threads()
        self._read_times = read_times or _read_times
        self._count_others = count_others or _count_others
        self._set_threads = set_threads
        self._next_look_s = 0.0
        self._before: CpuTimes | None = None
        self._is_fixed = num_threads is not None or self._most == 1
        self.num_threads = self._most

    def start(self) -> None:
        """Set the number for the calling thread; call first, in the engine thread.

        The first guess is who wants to run at this moment.
        """
        if not self._is_fixed:
            self.num_threads = max(1, self._most - self._count_others())
            self._before = self._read_times()
            self._next_look_s = time.perf_counter() + _INTERVAL_S
        self._set_threads(self.num_threads)

    def adjust(self) -> None:
        """Look at the cores if it is time to; call before a step."""
        if self._is_fixed or time.perf_counter() < self._next_look_s:
            return
        self._next_look_s = time.perf_counter() + _INTERVAL_S
        now = self._read_times()
        before, self._before = self._before, now
        if now is None or before is None:
            return
        wanted = self._wanted(before, now)
        if wanted != self.num_threads:
            self.num_threads = wanted
            self._set_threads(wanted)

    def _wanted(self, before: CpuTimes, now: CpuTimes) -> int:
        elapsed_s = max(now.clock_s - before.clock_s, 1e-3)
        # The team's threads work, or spin, while the thread that leads them does. What this process
        # used beyond that, the application did.
        team_s = min(
            now.process_s - before.process_s,
            (now.thread_s - before.thread_s) * self.num_threads,
        )
        others = max(0.0, now.busy_s - before.busy_s - team_s) / elapsed_s
        return max(1, min(self._most, int(self._most - others + 0.5)))


def _count_others() -> int:
    """Threads of the whole system that run or wait for a core, but for the calling one."""
    try:
        with open("/proc/loadavg", encoding="ascii") as loadavg:
            return max(0, int(loadavg.read().split()[3].split("/")[0]) - 1)
    except (OSError, ValueError, IndexError):
        return 0


def _read_times() -> CpuTimes | None:
    busy_s = _busy_seconds()
    if busy_s is None:
        return None
    return CpuTimes(time.perf_counter(), busy_s, time.process_time(), time.thread_time())


def _busy_seconds() -> float | None:
    """CPU time that everybody together has spent on the cores this process may use."""
    try:
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        with open("/proc/stat", encoding="ascii") as stat:
            lines = [line.split() for line in stat if line.startswith("cpu")]
        # user, nice, system; idle and waiting for I/O; interrupts; stolen by the hypervisor
        ticks = sum(
            int(fields[1]) + int(fields[2]) + int(fields[3]) + sum(map(int, fields[6:9]))
            for fields in lines
            if fields[0] in names
        )
        return ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError, IndexError):
        return None
