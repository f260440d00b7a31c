"""Decode attention as captured steps use it: bounds on the host, numbers on the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import PADDING, TOLERANCE, AttentionCase, make_case
from triton_cases import DTYPES, IS_INTERPRETED, NEEDS_TRITON, kernels, on_gpu_only

from engine.kernels import dispatch, reference
from engine.kernels.metadata import AttentionMetadata

pytestmark = NEEDS_TRITON
NAN = float("nan")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


def decode(
    case: AttentionCase,
    device: torch.device,
    *,
    metadata: AttentionMetadata | None = None,
    fill: float = 7.0,
    **options: object,
) -> torch.Tensor:
    """Two layers' worth of `decode_attention` into rows that hold `fill`."""
    on_device = dataclasses.replace(case, metadata=metadata or case.metadata).on(device)
    q = on_device.q[: on_device.metadata.num_decodes]
    outs = torch.full((2, len(q), q.shape[1] * q.shape[2]), fill, dtype=q.dtype, device=device)
    dispatch.begin_step(on_device.metadata)
    arguments = {"sliding_window": None, "logit_softcap": 0.0, **options}
    for out in outs:
        kernels("decode_attention").decode_attention(
            q,
            on_device.k_cache,
            on_device.v_cache,
            on_device.metadata,
            out,
            softmax_scale=case.softmax_scale,
            **arguments,
        )
    assert torch.equal(outs[0], outs[1]), "the second layer of a step differs"
    return outs[0].cpu()


def captured(case: AttentionCase, num_decodes: int, seed: int = 0) -> AttentionMetadata:
    """The case's leading decodes in a step with more room: rows of the table in another order,
    whatever past sequences left in the rest, and a bound on lengths that nobody reaches."""
    full = case.metadata
    random = torch.Generator().manual_seed(seed)
    num_rows = full.num_seqs + 3
    rows = torch.randperm(num_rows, generator=random)[: full.num_seqs]
    table = torch.full((num_rows, full.block_table.shape[1]), 2**30, dtype=torch.int32)
    table[rows] = full.block_table
    return dataclasses.replace(
        full,
        block_table=table,
        block_rows=rows,
        device_counts=torch.tensor([num_decodes, num_decodes], dtype=torch.int32),
        max_seq_len=2**20,
        seq_lens_host=None,
        query_lens_host=None,
        block_table_host=None,
    )


def tiles_for(dtype: torch.dtype, head_dim: int, **changes: object) -> object:
    return dataclasses.replace(kernels("decode_attention").decode_tiles(dtype, head_dim), **changes)


LENGTHS = [(0, 1), (300, 1), (63, 1), (700, 1), *on_gpu_only((5000, 1), (20000, 1)), (64, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge_here", [False, True])
@pytest.mark.parametrize("num_decodes", [0, 1, len(LENGTHS) - 1, len(LENGTHS)])
def test_only_the_counted_sequences_are_computed(
    device: torch.device, dtype: torch.dtype, merge_here: bool, num_decodes: int
) -> None:
    tiles = tiles_for(dtype, 64, merge_here=merge_here)
    case = make_case(LENGTHS, dtype=dtype, num_q_heads=9, num_kv_heads=3, block_size=64)
    want = decode(case, device, tiles=tiles)
    expected = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale
    )
    torch.testing.assert_close(want.double(), expected, **TOLERANCE[dtype])
    metadata = captured(case, num_decodes)
    # Lengths past the count are left over from another step.
    metadata.seq_lens = metadata.seq_lens.clone()
    metadata.seq_lens[num_decodes:] = 12345
    q = case.q.clone()
    q[num_decodes:] = NAN
    got = decode(dataclasses.replace(case, q=q), device, metadata=metadata, tiles=tiles)
    assert torch.equal(got[:num_decodes], want[:num_decodes])
    assert (got[num_decodes:] == 7.0).all()


@pytest.mark.parametrize("merge_here", [False, True])
def test_rows_of_the_table_in_any_order(device: torch.device, merge_here: bool) -> None:
    tiles = tiles_for(torch.float32, 64, merge_here=merge_here)
    case = make_case([*LENGTHS, PADDING], block_size=16)
    want = decode(case, device, tiles=tiles)
    metadata = dataclasses.replace(captured(case, len(LENGTHS)), device_counts=None)
    assert torch.equal(decode(case, device, metadata=metadata, tiles=tiles), want)
    assert (want[-1] == 0).all()


@pytest.mark.parametrize("merge_here", [False, True])
@pytest.mark.parametrize("options", [{"sliding_window": 600}, {"logit_softcap": 2.0}])
def test_splits_under_windows_and_softcaps(
    device: torch.device, merge_here: bool, options: dict[str, float]
) -> None:
    case = make_case(LENGTHS, block_size=16)
    tiles = tiles_for(torch.float32, 64, merge_here=merge_here)
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, **options
    )
    got = decode(case, device, tiles=tiles, **options)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[torch.float32])


def test_the_oracle_reads_counts_and_rows() -> None:
    case = make_case(LENGTHS, block_size=16)
    want = reference.paged_attention(*case.arguments(), softmax_scale=case.softmax_scale)
    case.metadata = captured(case, 3)
    got = reference.paged_attention(*case.arguments(), softmax_scale=case.softmax_scale)
    assert torch.equal(got[:3], want[:3])


def test_the_cpu_path_refuses_what_it_does_not_read() -> None:
    case = make_case(LENGTHS, block_size=16)
    case.metadata = captured(case, 3)
    with pytest.raises(AssertionError, match="row b"):
        dispatch.paged_attention(*case.arguments(), softmax_scale=case.softmax_scale)
    case.metadata.block_rows = None
    with pytest.raises(AssertionError, match="exact counts"):
        dispatch.paged_attention(*case.arguments(), softmax_scale=case.softmax_scale)


@pytest.mark.parametrize("num_prefills", [0, 2])
def test_a_captured_mixed_step(device: torch.device, num_prefills: int) -> None:
    """Bounds above the counts: the first prefill starts within the rows that could be decodes."""
    seqs = [(0, 1), (300, 1), (0, 20), (33, 30)][: 2 + num_prefills]
    case = make_case(seqs, block_size=16)
    want = reference.paged_attention(*case.widened().arguments(), softmax_scale=case.softmax_scale)
    num_rows, num_tokens = 6, 80
    used = len(case.q)
    metadata = captured(case, 2)
    metadata.device_counts = torch.tensor([2, len(seqs)], dtype=torch.int32)
    for name, rest in (("seq_lens", 77), ("query_lens", 0), ("block_rows", 0)):
        value = torch.full((num_rows,), rest, dtype=getattr(metadata, name).dtype)
        value[: len(seqs)] = getattr(metadata, name)
        setattr(metadata, name, value)
    starts = torch.full((num_rows + 1,), used, dtype=torch.int32)
    starts[: len(seqs) + 1] = metadata.query_start_loc
    metadata = dataclasses.replace(
        metadata, query_start_loc=starts, num_decodes=5, max_query_len=num_tokens, max_prefills=3
    )
    q = torch.full((num_tokens, *case.q.shape[1:]), NAN)
    q[:used] = case.q
    case = dataclasses.replace(case, q=q, metadata=metadata)
    oracle = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale
    )
    assert torch.equal(oracle[:used], want)
    on_device = case.on(device)
    dispatch.begin_step(on_device.metadata)
    got = kernels("attention").paged_attention(
        *on_device.arguments(), softmax_scale=case.softmax_scale
    )
    torch.testing.assert_close(got[:used].cpu().double(), want, **TOLERANCE[torch.float32])
