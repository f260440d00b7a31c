"""Caches of 8 bits, sinks and chunks in the Triton kernels, against the float64 twins.

The oracle reads the numbers that an 8-bit cache stands for, so tolerances are those of plain ones.
On a GPU everything runs; in Triton's interpreter (`test_triton_interpreter.py`) the small cases.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernel_cases import (
    PADDING,
    TOLERANCE,
    AttentionCase,
    heads_first,
    make_case,
    make_metadata,
    metadata_on,
    only_sequence,
)
from triton_cases import (
    DTYPES,
    IS_INTERPRETED,
    NEEDS_TRITON,
    assert_rows_alike,
    kernels,
    on_gpu_only,
)

from engine.kernels import dispatch, fused_reference, reference
from engine.kernels.kv_cache import KVTensor, QuantisedCache, is_heads_first, make_cache, quantise
from engine.kernels.metadata import AttentionMetadata, SharedPrefixes

pytestmark = NEEDS_TRITON
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8, PLAIN = torch.int8, torch.float8_e4m3fn, None
CACHES = [INT8, FP8]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


def attend(case: AttentionCase, device: torch.device, **options: Any) -> torch.Tensor:
    on_device = case.on(device)
    dispatch.begin_step(on_device.metadata)
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(device)
    out = kernels("attention").paged_attention(
        *on_device.arguments(), softmax_scale=case.softmax_scale, **options
    )
    assert isinstance(out, torch.Tensor)
    return out.cpu()


def check(case: AttentionCase, device: torch.device, **options: Any) -> torch.Tensor:
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, **options
    )
    got = attend(case, device, **options)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[got.dtype])
    assert torch.equal(attend(case, device, **options), got), "same input, other bits"
    return got


def sinks_of(num_q_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """From far below the scores to so far above them that nothing is left of the values."""
    return torch.linspace(-20, 6, num_q_heads).to(dtype).index_fill(0, torch.tensor([1]), 3e4)


SEQS = [
    *[(0, 1), (64, 1), (230, 1), PADDING],
    *on_gpu_only((300, 1), (63, 1), (700, 1), (127, 1), (128, 1), (5000, 1), (20000, 1)),
    *[(33, 30), (120, 30)],
    *on_gpu_only((130, 80), (0, 64), (130, 2), (0, 1000), (777, 300), (2000, 5), (4000, 500)),
]
# Padding rows are decodes without keys.
SEQS.sort(key=lambda seq: seq[1] > 1)
REACHES: dict[str, dict[str, Any]] = {
    "all": {},
    "window": {"sliding_window": 70},
    "chunk of 64": {"chunk_size": 64},
    "chunk of 192": {"chunk_size": 192},
    "chunk and window": {"chunk_size": 128, "sliding_window": 90},
}


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [
        (FP16, PLAIN),
        (FP16, INT8),
        *on_gpu_only((FP32, PLAIN), (FP32, FP8), *((BF16, cache) for cache in (PLAIN, INT8, FP8))),
    ],
)
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("batch_invariant", [False, *on_gpu_only(True)])
def test_sinks_and_chunks(
    device: torch.device,
    dtype: torch.dtype,
    cache: torch.dtype | None,
    reach: str,
    batch_invariant: bool,
) -> None:
    case = make_case(SEQS, dtype=dtype, num_q_heads=6, num_kv_heads=2, block_size=64)
    case = case if cache is None else case.quantised(cache)
    options = {**REACHES[reach], "batch_invariant": batch_invariant}
    got = check(case, device, sinks=sinks_of(6, dtype), **options)
    assert (got[:, 64:128].abs() < 1e-3).all(), "a sink above everything leaves nothing"
    without = attend(case, device, **options)
    assert not torch.allclose(got.double(), without.double(), **TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_size", [64, 128])
def test_chunks_read_nothing_before_them(device: torch.device, chunk_size: int) -> None:
    seqs = [(63, 1), (64, 1), (127, 1), (330, 1), (0, 70), (150, 20), (120, 150)]
    case = make_case(seqs, block_size=16)
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, chunk_size=chunk_size
    )
    assert case.metadata.block_table_host is not None
    assert isinstance(case.k_cache, torch.Tensor)
    assert isinstance(case.v_cache, torch.Tensor)
    for (computed, _), blocks in zip(seqs, case.metadata.block_table_host, strict=True):
        for block in blocks[: computed // chunk_size * chunk_size // 16]:
            case.k_cache[block] = float("nan")
            case.v_cache[block] = float("nan")
    got = attend(case, device, chunk_size=chunk_size)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("dtype", "block_size", "num_q_heads", "num_kv_heads", "head_dim"),
    [
        (FP16, 16, 9, 3, 64),
        (FP32, 64, 4, 2, 80),
        *on_gpu_only(
            *((BF16, size, 9, 3, 64) for size in (16, 64, 128)),
            *((BF16, 64, *heads, 128) for heads in ((16, 8), (32, 8), (32, 1))),
            (BF16, 64, 4, 2, 256),
            (BF16, 64, 4, 2, 96),
        ),
    ],
)
def test_attention_over_eight_bits(
    device: torch.device,
    cache: torch.dtype,
    dtype: torch.dtype,
    block_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    case = make_case(
        SEQS,
        dtype=dtype,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        is_strided=True,
    )
    check(case.quantised(cache), device)


@pytest.mark.parametrize("cache", [PLAIN, INT8])
@pytest.mark.parametrize("dtype", [FP16, *on_gpu_only(BF16)])
def test_the_order_of_heads_in_memory_changes_nothing(
    device: torch.device, cache: torch.dtype | None, dtype: torch.dtype
) -> None:
    case = make_case(SEQS, dtype=dtype, num_q_heads=6, num_kv_heads=2, block_size=64).on(device)
    outs = []
    for order in (torch.Tensor.contiguous, heads_first):
        pair: list[KVTensor] = []
        for plain in (case.k_cache, case.v_cache):
            assert isinstance(plain, torch.Tensor)
            stored, scales = order(plain), None
            if cache is not None:
                numbers, scales = quantise(plain.nan_to_num(), cache)
                stored = order(numbers)
            pair.append(
                stored
                if scales is None
                else QuantisedCache(stored, scales.transpose(1, 2).contiguous())
            )
        dispatch.begin_step(case.metadata)
        outs.append(
            kernels("attention").paged_attention(
                case.q, *pair, case.metadata, softmax_scale=case.softmax_scale
            )
        )
    assert is_heads_first(stored)
    assert not is_heads_first(case.k_cache.contiguous())
    assert torch.equal(*outs)


@pytest.mark.parametrize("cache", CACHES)
def test_scores_are_bounded_over_eight_bits(device: torch.device, cache: torch.dtype) -> None:
    check(make_case([(99, 1), (10, 70)]).quantised(cache), device, logit_softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_values_keep_their_digits(device: torch.device, dtype: torch.dtype) -> None:
    """Values, and so their scales, far below what float16 could hold times a probability."""
    case = make_case([(300, 1), (10, 70)], dtype=dtype)
    assert isinstance(case.v_cache, torch.Tensor)
    case = dataclasses.replace(case, v_cache=case.v_cache * 1e-3).quantised(INT8)
    want = reference.paged_attention(*case.widened().arguments(), softmax_scale=case.softmax_scale)
    got = attend(case, device)
    tolerance = {name: value * 1e-3 for name, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(got.double(), want, atol=tolerance["atol"], rtol=1e-2)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [FP16, *on_gpu_only(BF16)])
@pytest.mark.parametrize("reach", ["all", *on_gpu_only("chunk of 192")])
def test_neighbours_never_change_a_sequence(
    device: torch.device, cache: torch.dtype, dtype: torch.dtype, reach: str
) -> None:
    options = {"batch_invariant": True, "sinks": sinks_of(6, dtype), **REACHES[reach]}
    seqs = [(5, 1), (300, 1), (600, 1), (0, 3), (60, 10)]
    if not IS_INTERPRETED:
        seqs = [(9000, 1), *((37 * n, 1) for n in range(60)), *seqs, (0, 500), (128, 1000)]
    case = make_case(seqs, dtype=dtype, num_q_heads=6, num_kv_heads=2, block_size=64)
    case = case.quantised(cache)
    together = attend(case, device, **options)
    for row in range(0, len(seqs), 1 if IS_INTERPRETED else 7):
        start, end = case.metadata.query_start_loc[row : row + 2].tolist()
        alone = attend(only_sequence(case, row), device, **options)
        assert torch.equal(together[start:end], alone), seqs[row]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("reach", ["all", "chunk of 64"])
def test_chunk_boundaries_never_change_a_prompt(
    device: torch.device, cache: torch.dtype, reach: str
) -> None:
    length, sizes = (100, (2, 61, 37)) if IS_INTERPRETED else (3000, (2, 61, 937, 1000, 128, 872))
    whole = make_case([(0, length)], dtype=DTYPES[-1], num_q_heads=6, num_kv_heads=2, block_size=64)
    whole = whole.quantised(cache)
    want = attend(whole, device, **REACHES[reach])
    assert whole.metadata.block_table_host is not None
    start = 0
    for size in sizes:
        chunk = dataclasses.replace(
            whole,
            q=whole.q[start : start + size],
            metadata=make_metadata([(start, size)], 64, whole.metadata.block_table_host),
        )
        assert_rows_alike(attend(chunk, device, **REACHES[reach]), want[start : start + size])
        start += size


def with_shared_prefix(case: AttentionCase, num_blocks: int, members: list[int]) -> AttentionCase:
    """The members' leading blocks are those of the first; the others' own are not read."""
    full, block_size = case.metadata, case.k_cache.shape[1]
    table = full.block_table.clone()
    table[members, :num_blocks] = table[members[0], :num_blocks].clone()
    prefix_lens = torch.zeros(full.num_seqs, dtype=torch.int32)
    prefix_lens[members] = num_blocks * block_size
    shared = SharedPrefixes(
        members=torch.tensor(members, dtype=torch.int32),
        member_start=torch.tensor([0, len(members)], dtype=torch.int32),
        group_lens=torch.tensor([num_blocks * block_size], dtype=torch.int32),
        prefix_lens=prefix_lens,
    )
    metadata = dataclasses.replace(full, block_table=table, shared_prefixes=shared)
    return dataclasses.replace(case, metadata=metadata)


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [(FP16, INT8), *on_gpu_only(*((BF16, cache) for cache in (PLAIN, INT8, FP8)))],
)
@pytest.mark.parametrize("block_size", [64, *on_gpu_only(16)])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"chunk_size": 64}])
def test_shared_prefixes(
    device: torch.device,
    dtype: torch.dtype,
    cache: torch.dtype | None,
    block_size: int,
    options: dict[str, Any],
) -> None:
    lengths = [(n, 1) for n in (450, 333, 470, 700, 371)]
    case = make_case(lengths, dtype=dtype, num_q_heads=6, num_kv_heads=2, block_size=block_size)
    case = with_shared_prefix(case, 256 // block_size, [3, 0, 4])
    case = case if cache is None else case.quantised(cache)
    if "sinks" in options:
        options = {"sinks": sinks_of(6, dtype)}
    check(case, device, **options)


def written(
    op: Any, cache: torch.dtype, device: torch.device, *arguments: Any, **sizes: Any
) -> list[torch.Tensor]:
    """What an op leaves in two caches that held other things: numbers, then scales, fp32."""
    shape = (6, 16, sizes["num_kv_heads"], sizes["head_dim"])
    caches = [make_cache(shape, cache, device) for _ in "kv"]
    for one in caches:
        assert isinstance(one, QuantisedCache)
        one.values.copy_(torch.full(shape, 7.0))
        one.scales.fill_(3.0)
    op(*arguments, *caches, **sizes)
    return [part.float().cpu() for one in caches for part in (one.values, one.scales)]


def some_tokens() -> AttentionMetadata:
    metadata = make_metadata([(5, 1), (0, 9), (14, 4)], 16, [[2], [4], [1, 3]])
    metadata.slot_mapping[3] = -1
    return metadata


def quarter_turns(head_dim: int) -> torch.Tensor:
    """Rotations whose results need no rounding: whatever a kernel contracts, the bits are equal."""
    quarters = torch.randint(0, 4, (64, head_dim // 2), generator=torch.Generator().manual_seed(1))
    cos = torch.tensor([1.0, 0.0, -1.0, 0.0])[quarters]
    sin = torch.tensor([0.0, 1.0, 0.0, -1.0])[quarters]
    return torch.stack((cos, sin), dim=1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 2, 80)])
@pytest.mark.parametrize("turns", [False, True])
def test_stored_numbers_are_torch_s_bit_for_bit(
    device: torch.device,
    cache: torch.dtype,
    dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    turns: bool,
) -> None:
    metadata = some_tokens()
    sizes = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    num_tokens = len(metadata.positions)
    qkv = torch.randn(num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim)
    qkv *= torch.logspace(-4, 4, num_tokens)[:, None]
    qkv[2] = 0.0
    qkv = qkv.to(dtype)
    cos_sin = quarter_turns(head_dim) if turns else None
    want = written(
        reference.rope_write_kv, cache, torch.device("cpu"), qkv, metadata, cos_sin, **sizes
    )
    got = written(
        kernels("rope_write_kv").rope_write_kv,
        cache,
        device,
        qkv.to(device),
        metadata_on(metadata, device),
        None if cos_sin is None else cos_sin.to(device),
        **sizes,
    )
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert (want[0] == 7).any(), "unused slots keep what they held"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [FP16, *on_gpu_only(BF16)])
@pytest.mark.parametrize("head_dim", [64, *on_gpu_only(128)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_products_store_what_they_turn(
    device: torch.device,
    cache: torch.dtype,
    dtype: torch.dtype,
    head_dim: int,
    has_norms: bool,
) -> None:
    """`scaled_qkv` rounds its sums otherwise than the twin: numbers may be a step apart."""
    metadata = some_tokens()
    sizes: dict[str, Any] = {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": head_dim}
    num_tokens, num_inner = len(metadata.positions), 96
    x = torch.randn(num_tokens, num_inner).to(dtype)
    weight = (torch.randn(5 * head_dim, num_inner) / 10).to(dtype)
    cos_sin = quarter_turns(head_dim)
    norms = {}
    if has_norms:
        norms = {
            name: torch.rand(head_dim).to(dtype) for name in ("q_norm_weight", "k_norm_weight")
        }

    def run(op: Any, where: torch.device) -> list[torch.Tensor]:
        numbers = written(
            lambda *args, **sizes: op(
                x.to(where),
                None,
                weight.to(where),
                None,
                metadata_on(metadata, where),
                cos_sin.to(where),
                *args,
                eps=1e-6,
                **{name: value.to(where) for name, value in norms.items()},
                **sizes,
            ),
            cache,
            where,
            **sizes,
        )
        return [
            values * scales.transpose(1, 2)[..., None]
            for values, scales in (numbers[:2], numbers[2:])
        ]

    want = run(fused_reference.scaled_qkv, torch.device("cpu"))
    got = run(kernels("fused_qkv").scaled_qkv, device)
    # A step of int8 is 1/127 of the largest entry, the largest of fp8 1/14; norms of 1 and less.
    steps = {INT8: 1 / 127, FP8: 1 / 14}[cache]
    for one, other in zip(got, want, strict=True):
        largest = other.abs().amax(-1, keepdim=True)
        assert ((one - other).abs() <= largest * steps * 1.05).all()
        assert ((one - other).abs() > largest * steps / 4).float().mean() < 0.02
