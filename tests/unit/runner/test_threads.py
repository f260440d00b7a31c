"""Loading leaves no OpenMP team behind, and number of threads stays the application's."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from engine import build
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelNotFoundError
from engine.runner.threads import in_short_lived_thread, set_own_num_threads


def test_result_comes_back_and_the_thread_ends() -> None:
    thread = in_short_lived_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_errors_reach_the_caller() -> None:
    with pytest.raises(ModelNotFoundError):
        build.build_parts(EngineConfig(model="/no/such/model", device="cpu"))


def test_cpu_models_are_built_in_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    builders = []

    def stop(config: EngineConfig, device: object) -> None:
        builders.append(threading.current_thread())
        raise ConfigError("far enough")

    monkeypatch.setattr(build, "_build_parts", stop)
    with pytest.raises(ConfigError, match="far enough"):
        build.build_parts(EngineConfig(model="any", device="cpu"))
    assert builders[0] is not threading.current_thread()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_openmp_workers_are_left() -> None:
    """What the rule stands on: a thread's workers end with it."""
    program = """
import os, torch
from engine.runner.threads import in_short_lived_thread
def count(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
def work(): torch.ones(2**20).add_(1); return count()
before = count()
during = in_short_lived_thread(work)
import time
deadline = time.monotonic() + 5
while count() > before and time.monotonic() < deadline: time.sleep(0.01)
print(before, during, count())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    before, during, after = map(int, done.stdout.split())
    assert during >= before + 4
    assert after == before


def test_the_application_keeps_its_number_however_often_a_thread_changes_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def change() -> list[int]:
            seen = []
            for number in (2, 1, 2):
                set_own_num_threads(number)
                seen.append(torch.get_num_threads())
            return seen

        assert in_short_lived_thread(change) == [2, 1, 2]
        assert torch.get_num_threads() == 3
        assert in_short_lived_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)
