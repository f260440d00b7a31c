"""Numbers of CPU threads are set for one thread alone."""

from __future__ import annotations

import torch

from engine.runner.threads import in_short_lived_thread, set_own_num_threads


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
