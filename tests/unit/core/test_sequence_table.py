"""Rows and their arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from core_fakes import EOS_ID, make_request

from engine.core.request import Sequence, SequenceStatus
from engine.core.state import SequenceTable


def _sequence(prompt: list[int], **options: object) -> Sequence:
    return make_request(None, prompt, **options).sequences[0]


def test_admit_fills_a_row() -> None:
    table = SequenceTable(4, 16, 4)
    seq = _sequence(
        [5, 6, 7], max_tokens=9, min_tokens=2, stop_token_ids=[8], logprobs=1, needs_host_sync=True
    )
    row = table.admit(seq, num_cached_tokens=2)
    assert (seq.row, seq.status, table.sequences[row]) == (row, SequenceStatus.RUNNING, seq)
    assert table.token_ids[row, :3].tolist() == [5, 6, 7]
    assert table.num_tokens[row] == table.num_prompt_tokens[row] == 3
    assert (table.num_computed_tokens[row], table.num_in_flight[row]) == (2, 0)
    assert (table.min_total_tokens[row], table.max_total_tokens[row]) == (5, 12)
    assert set(table.stop_ids[row].tolist()) == {EOS_ID, 8, -1}
    assert table.wants_logprobs[row]
    assert not table.needs_prompt_logprobs[row]
    assert table.rows_needing_host_sync(np.array([3, row, 2], dtype=np.int32)) == [row]


def test_a_row_is_freed_with_its_tokens_and_a_new_epoch() -> None:
    table = SequenceTable(2, 16, 4)
    seq = _sequence([5, 6])
    row = table.admit(seq, 0)
    table.token_ids[row, 2:5] = [7, 8, -1]
    table.num_tokens[row], table.num_in_flight[row] = 5, 1
    assert table.output_tokens(row) == [7, 8]
    assert table.output_tokens(row, 1) == [8]
    epoch = table.epoch[row]
    table.free(row)
    assert (seq.output_token_ids, seq.row, table.sequences[row]) == ([7, 8], -1, None)
    assert table.epoch[row] == epoch + 1
    with pytest.raises(AssertionError, match="freed twice"):
        table.free(row)
    again = table.admit(seq, 0)
    assert (again, table.token_ids[again, :4].tolist()) == (row, [5, 6, 7, 8])
    assert table.num_tokens[again] == 4


def test_the_lowest_free_row_is_used() -> None:
    table = SequenceTable(3, 16, 4)
    rows = [table.admit(_sequence([1]), 0) for _ in range(3)]
    table.free(2)
    table.free(0)
    assert rows == [0, 1, 2]
    assert table.num_free_rows == 2
    assert table.admit(_sequence([1]), 0) == 0


def test_stop_ids_widen_and_leave_nothing_behind() -> None:
    table = SequenceTable(2, 16, 4)
    keeps = table.admit(_sequence([1], stop_token_ids=[30]), 0)
    many = table.admit(_sequence([1], stop_token_ids=list(range(1, 20))), 0)
    assert sorted(set(table.stop_ids[many].tolist())) == [-1, *range(20)]
    assert sorted(set(table.stop_ids[keeps].tolist())) == [-1, EOS_ID, 30]
    table.free(many)
    again = table.admit(_sequence([1], eos=False), 0)
    assert again == many
    assert set(table.stop_ids[again].tolist()) == {-1}


def test_arrays_come_from_the_allocator() -> None:
    """A runner hands out pinned memory this way, also when the stop ids widen."""
    made: list[np.ndarray[Any, Any]] = []

    def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        made.append(np.zeros(shape, dtype))
        return made[-1]

    table = SequenceTable(2, 16, 4, allocate)
    table.admit(_sequence([1], stop_token_ids=list(range(1, 20))), 0)
    arrays = [value for value in vars(table).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 17
    assert all(any(array is one for one in made) for array in arrays)
