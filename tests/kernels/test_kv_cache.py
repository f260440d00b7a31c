"""Caches of 8 bits on the CPU: what they store, attention over it, and who may change it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import PADDING, TOLERANCE, AttentionCase, make_case, make_metadata, only_sequence

from engine.kernels import dispatch, reference
from engine.kernels.kv_cache import (
    LIMITS,
    QuantisedCache,
    bytes_of_head,
    expand,
    make_cache,
    quantise,
)

DTYPES = list(TOLERANCE)
CACHES = list(LIMITS)


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def attend(case: AttentionCase, **options: Any) -> torch.Tensor:
    return dispatch.paged_attention(*case.arguments(), softmax_scale=case.softmax_scale, **options)


@pytest.mark.parametrize("cache", CACHES)
def test_every_number_is_stored_as_the_nearest_there_is(cache: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(cache).double()
    numbers = numbers[numbers.abs() <= LIMITS[cache]]
    x = torch.randn(50, 3, 64) * torch.logspace(-6, 6, 50)[:, None, None]
    stored, scales = quantise(x, cache)
    assert stored.double().abs().amax() == LIMITS[cache]
    assert torch.equal(scales, x.abs().amax(-1) / LIMITS[cache])
    ratios = x.double() / scales.double()[..., None]
    nearest = (ratios[..., None] - numbers).abs().amin(-1)
    # A product in float32 may round to a tie what is not quite one.
    torch.testing.assert_close((ratios - stored.double()).abs(), nearest, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", CACHES)
def test_zeros_and_numbers_without_a_finite_inverse(cache: torch.dtype) -> None:
    x = torch.zeros(3, 8)
    x[1], x[2, 0] = 1e-38, 1e-20
    stored, scales = quantise(x, cache)
    values = expand(QuantisedCache(stored[:, None, None], scales[:, None, None]), torch.float32)
    torch.testing.assert_close(values[:, 0, 0], x, atol=1e-31, rtol=1e-6)


def test_a_cache_takes_a_little_over_half_of_bfloat16() -> None:
    for cache in CACHES:
        made = make_cache((5, 16, 3, 64), cache, torch.device("cpu"))
        assert isinstance(made, QuantisedCache)
        num_bytes = made.values.nbytes + made.scales.nbytes
        assert num_bytes == 5 * 16 * 3 * bytes_of_head(64, cache)
        assert num_bytes / (5 * 16 * 3 * bytes_of_head(64, torch.bfloat16)) == 68 / 128
        assert made.shape == (5, 16, 3, 64)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_stored_in_their_slots(cache: torch.dtype, dtype: torch.dtype) -> None:
    metadata = make_metadata([(17, 1), PADDING, (0, 20)], 16, [[4, 1], [], [3, 0]])
    qkv = torch.randn(22, 5 * 32).to(dtype)
    arguments = {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 32}
    caches = []
    for op in (dispatch.rope_write_kv, reference.rope_write_kv):
        pair = [make_cache((6, 16, 1, 32), cache, torch.device("cpu")) for _ in "kv"]
        for one in pair:
            assert isinstance(one, QuantisedCache)
            one.values.copy_(torch.full(one.shape, 7.0))
            one.scales.fill_(3.0)
        op(qkv, metadata, None, *pair, **arguments)
        caches.append([expand(one, torch.float32) for one in pair])
    plain = [torch.full((6, 16, 1, 32), 21.0, dtype=dtype) for _ in "kv"]
    reference.rope_write_kv(qkv, metadata, None, *plain, **arguments)
    for got, want, wide in zip(*caches, plain, strict=True):
        assert torch.equal(got, want)
        step = wide.float().abs().amax(-1, keepdim=True) * {torch.int8: 1 / 254}.get(cache, 1 / 28)
        assert ((got - wide.float()).abs() <= step * 1.001).all()
        assert torch.equal(got == 21.0, wide.float() == 21.0)


SEQS = [(n, 1) for n in (0, 5, 62, 63, 64, 90, 600, 777)]
SEQS += [(0, 3), (0, 64), (60, 10), (128, 100)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 40}, {"logit_softcap": 5.0}, {"chunk_size": 64}]
)
def test_attention_reads_what_the_numbers_stand_for(
    cache: torch.dtype, dtype: torch.dtype, block_size: int, options: dict[str, Any]
) -> None:
    case = make_case(
        [*SEQS[:8], PADDING, *SEQS[8:]],
        dtype=dtype,
        num_q_heads=9,
        num_kv_heads=3,
        block_size=block_size,
    ).quantised(cache)
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, **options
    )
    # Keys and values are rounded to the dtype once more.
    tolerance = {key: 2 * value for key, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(attend(case, **options).double(), want, **tolerance)
    oracle = reference.paged_attention(
        *case.arguments(), softmax_scale=case.softmax_scale, **options
    )
    torch.testing.assert_close(oracle.double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_never_change_a_sequence(
    cache: torch.dtype, dtype: torch.dtype, num_threads: int
) -> None:
    case = make_case(SEQS, dtype=dtype, num_q_heads=9, num_kv_heads=3, block_size=64)
    case = case.quantised(cache)
    together = attend(case)
    for row in range(len(SEQS)):
        start, end = case.metadata.query_start_loc[row : row + 2].tolist()
        assert torch.equal(attend(only_sequence(case, row)), together[start:end]), SEQS[row]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_boundaries_never_change_a_prompt(
    cache: torch.dtype, dtype: torch.dtype, num_threads: int
) -> None:
    whole = make_case([(0, 200)], dtype=dtype, num_q_heads=9, num_kv_heads=3, block_size=64)
    whole = whole.quantised(cache)
    want = attend(whole)
    assert whole.metadata.block_table_host is not None
    start = 0
    for size in (2, 61, 70, 64, 3):
        chunk = AttentionCase(
            whole.q[start : start + size],
            whole.k_cache,
            whole.v_cache,
            make_metadata([(start, size)], 64, whole.metadata.block_table_host),
            whole.softmax_scale,
        )
        assert torch.equal(attend(chunk), want[start : start + size]), start
        start += size
