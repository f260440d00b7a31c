"""Requests that can never run are refused at once, with the numbers that say why."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from core_fakes import Harness
from hypothesis import given, settings

from engine.core.capacity import CapacityLimits
from engine.errors import CapacityError, ContextOverflowError, RequestError

_LIMITS = CapacityLimits(max_model_len=100, block_size=16, num_usable_blocks=5)  # 80 tokens of KV


def test_what_fits_gets_what_it_asked_for() -> None:
    assert _LIMITS.check_fits(10, 20) == 30
    assert _LIMITS.check_fits(80, 1) == 81, "the last token needs no KV"
    assert _LIMITS.check_fits(1, 80) == 81


def test_no_limit_means_as_much_as_context_and_cache_hold() -> None:
    assert _LIMITS.check_fits(10, None) == 81
    assert CapacityLimits(50, 16, 5).check_fits(10, None) == 50
    assert CapacityLimits(50, 16, 5).check_fits(49, None) == 50


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_new_tokens", "words"),
    [
        (90, 11, ["90", "max_tokens=11", "101", "max_model_len=100", "at most 10"]),
        (100, None, ["100", "max_model_len=100", "at least 1 tokens"]),
        (130, 5, ["130", "max_model_len=100", "at least 31 tokens"]),
    ],
)
def test_context_overflow_names_the_numbers(
    num_prompt_tokens: int, max_new_tokens: int | None, words: list[str]
) -> None:
    with pytest.raises(ContextOverflowError) as caught:
        _LIMITS.check_fits(num_prompt_tokens, max_new_tokens)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(("num_prompt_tokens", "max_new_tokens"), [(80, 2), (81, None), (1, 81)])
def test_too_few_blocks_names_blocks_and_tokens(
    num_prompt_tokens: int, max_new_tokens: int | None
) -> None:
    with pytest.raises(CapacityError) as caught:
        _LIMITS.check_fits(num_prompt_tokens, max_new_tokens)
    words = [str(num_prompt_tokens), "82", "6 KV blocks of 16 tokens", "has 5 (80 tokens)"]
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(("num_prompt_tokens", "max_new_tokens"), [(0, 5), (3, 0)])
def test_nonsense_is_a_request_error(num_prompt_tokens: int, max_new_tokens: int) -> None:
    with pytest.raises(RequestError, match=r"at least 1|>= 1"):
        _LIMITS.check_fits(num_prompt_tokens, max_new_tokens)


@settings(max_examples=60, deadline=None)
@given(
    block_size=st.sampled_from([1, 2, 4]),
    num_blocks=st.integers(2, 8),
    num_prompt_tokens=st.integers(1, 34),
    max_tokens=st.one_of(st.none(), st.integers(1, 34)),
)
def test_the_limit_is_the_scheduler_s_true_limit(
    block_size: int, num_blocks: int, num_prompt_tokens: int, max_tokens: int | None
) -> None:
    """What is accepted runs to its end alone; what is refused lacks a block, not less."""
    harness = Harness(block_size=block_size, num_blocks=num_blocks, max_model_len=32)
    try:
        request = harness.submit([1] * num_prompt_tokens, max_tokens=max_tokens, eos=False)
    except CapacityError:
        num_kv_tokens = num_prompt_tokens + (max_tokens or 1) - 1
        assert num_kv_tokens > (num_blocks - 1) * block_size
    except ContextOverflowError:
        assert num_prompt_tokens + (max_tokens or 1) > 32
    else:
        harness.run()
        assert request.sequences[0].num_tokens == request.max_total_tokens


def test_add_refuses_what_check_fits_would() -> None:
    """It could otherwise wait forever and block the queue."""
    harness = Harness(block_size=4, num_blocks=3)
    request = Harness(block_size=4, num_blocks=30).submit([1] * 20)
    with pytest.raises(CapacityError):
        harness.scheduler.add(request.sequences[0])
    assert not harness.scheduler.has_unfinished
