"""Prompts of token ids: what becomes of each kind of sequence, and what is refused."""

import numpy as np
import pytest

from engine.errors import RequestError
from engine.prompts import check_token_ids


@pytest.mark.parametrize("length", [1, 500, 501, 1733])
@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda ids: [np.int64(one) for one in ids]]
)
def test_whatever_the_sequence_the_ids_are_its_numbers(length, kind):
    ids = np.random.default_rng(length).integers(0, 49152, length).tolist()
    found = check_token_ids(kind(ids), 49152)
    assert found.dtype == np.int32
    assert found.tolist() == ids


@pytest.mark.parametrize("place", [0, 499, 500, 1200])
@pytest.mark.parametrize("outsider", [-1, 49152, 2**31 - 1, 2**31, 2**40, -(2**31), -(2**40)])
@pytest.mark.parametrize("kind", [list, np.array])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(place, outsider, kind):
    ids = [5] * 1300
    ids[place] = outsider
    with pytest.raises(RequestError, match=rf"prompt\[{place}\]={outsider} is no token id"):
        check_token_ids(kind(ids), 49152)


@pytest.mark.parametrize("prompt", [[5, 2.5], [5, "a"], [5, 2**70], [5, None], [[5], [6]], [5.0]])
def test_what_is_no_list_of_integers_is_refused(prompt):
    with pytest.raises(RequestError, match=r"flat list|integer token ids"):
        check_token_ids(prompt, 49152)
