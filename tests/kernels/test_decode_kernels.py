"""Decode attention as captured steps use it: bounds on the host, numbers on the device."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from kernel_cases import PADDING, TOLERANCE, AttentionCase, make_case
from triton_cases import (
    DTYPES,
    IS_INTERPRETED,
    NEEDS_TRITON,
    kernels,
    on_gpu_only,
)

from engine.kernels import dispatch, reference
from engine.kernels.metadata import AttentionMetadata, SharedPrefixes

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
    head_dim = q.shape[2]
    arguments = {
        "sliding_window": None,
        "logit_softcap": 0.0,
        "tiles": tiles_for(q.dtype, head_dim),
        "tiles_of_prefixes": prefix_tiles_for(q.dtype, head_dim),
        **options,
    }
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
    """Launch shape; in the interpreter, whose time goes by operations, with wider tiles, and with
    more programs than its device has, so that they share sequences."""
    tiles = kernels("decode_attention").decode_tiles(dtype, head_dim, dtype, 4)
    many = {"block_n": 64, "programs_per_processor": 12, "min_tiles": 2}
    return dataclasses.replace(tiles, **(many if IS_INTERPRETED else {}), **changes)


def prefix_tiles_for(dtype: torch.dtype, head_dim: int, **changes: object) -> object:
    tiles = kernels("shared_prefix").prefix_tiles(dtype, head_dim)
    wide = {"block_m": 32, "block_n": 64} if IS_INTERPRETED else {}
    return dataclasses.replace(tiles, **wide, **changes)


LENGTHS = [(0, 1), (300, 1), (63, 1), (700, 1), *on_gpu_only((5000, 1), (20000, 1)), (64, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_decodes", [0, len(LENGTHS) - 1, *on_gpu_only(1)])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_only_the_counted_sequences_are_computed(
    device: torch.device, dtype: torch.dtype, num_decodes: int, batch_invariant: bool
) -> None:
    options = {"batch_invariant": batch_invariant}
    case = make_case(LENGTHS, dtype=dtype, num_q_heads=9, num_kv_heads=3, block_size=64)
    want = decode(case, device, **options)
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
    got = decode(dataclasses.replace(case, q=q), device, metadata=metadata, **options)
    assert (got[num_decodes:] == 7.0).all()
    got = got[:num_decodes]
    torch.testing.assert_close(got.double(), expected[:num_decodes], **TOLERANCE[dtype])
    if batch_invariant:
        assert torch.equal(got, want[:num_decodes])


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_rows_of_the_table_in_any_order(device: torch.device, batch_invariant: bool) -> None:
    options = {"batch_invariant": batch_invariant}
    case = make_case([*LENGTHS, PADDING], block_size=16)
    want = decode(case, device, **options)
    metadata = dataclasses.replace(captured(case, len(LENGTHS)), device_counts=None)
    assert torch.equal(decode(case, device, metadata=metadata, **options), want)
    assert (want[-1] == 0).all()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("options", [{"sliding_window": 600}, {"logit_softcap": 2.0}])
def test_parts_under_windows_and_softcaps(
    device: torch.device, batch_invariant: bool, options: dict[str, float]
) -> None:
    case = make_case(LENGTHS, block_size=16)
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, **options
    )
    got = decode(case, device, batch_invariant=batch_invariant, **options)
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


def share(
    case: AttentionCase, groups: list[tuple[int, list[int]]], max_groups: int, block_size: int
) -> AttentionCase:
    """The case with groups of (blocks in common, members), whose first member lends its blocks.

    Of the others' own leading blocks nothing is left: NaN in the cache, and on the device not even
    an entry of the table.
    """
    full = case.metadata
    k_cache, v_cache, table = case.k_cache.clone(), case.v_cache.clone(), full.block_table.clone()
    prefix_lens = torch.zeros(full.num_seqs, dtype=torch.int32)
    for num_blocks, members in groups:
        for member in members:
            prefix_lens[member] = num_blocks * block_size
            if member != members[0]:
                own = full.block_table[member, :num_blocks].long()
                k_cache[own], v_cache[own] = NAN, NAN
                table[member, :num_blocks] = full.block_table[members[0], :num_blocks]
    sizes = [len(members) for _, members in groups] + [0] * (max_groups - len(groups))
    members = [member for _, members in groups for member in members]
    unused = [2**30] * (full.num_seqs - len(members))
    shared = SharedPrefixes(
        members=torch.tensor(members + unused, dtype=torch.int32),
        member_start=torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32),
        group_lens=torch.tensor(
            [num_blocks * block_size for num_blocks, _ in groups]
            + [0] * (max_groups - len(groups)),
            dtype=torch.int32,
        ),
        prefix_lens=prefix_lens,
    )
    metadata = dataclasses.replace(full, block_table=table, shared_prefixes=shared)
    return dataclasses.replace(case, k_cache=k_cache, v_cache=v_cache, metadata=metadata)


def without_borrowed_entries(case: AttentionCase) -> AttentionMetadata:
    """Metadata in which only the first member of a group knows the blocks of the prefix."""
    metadata = case.metadata
    shared = metadata.shared_prefixes
    assert shared is not None
    table = metadata.block_table.clone()
    for start, end in itertools.pairwise(shared.member_start.tolist()):
        for member in shared.members[start:end].tolist()[1:]:
            width = -(-int(shared.prefix_lens[member]) // BLOCK_SIZE)
            table[member, :width] = 2**30
    return dataclasses.replace(metadata, block_table=table)


BLOCK_SIZE = 16
GROUP_LENGTHS = [(n, 1) for n in (50, 333, 170, 40, 171, 400, 310, 33, 700, 300)]
GROUPINGS = {
    "none": [],
    "one": [(9, [4, 1, 8])],
    "all": [(2, list(range(10)))],
    "several": [(2, [7, 3]), (18, [1, 6, 8, 5, 9]), (10, [2, 4])],
    "of one": [(3, [0]), (43, [8])],
}


@pytest.mark.parametrize("dtype", [DTYPES[0], *on_gpu_only(*DTYPES[1:])])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_shared_prefixes(device: torch.device, dtype: torch.dtype, grouping: str) -> None:
    case = make_case(
        GROUP_LENGTHS, dtype=dtype, num_q_heads=6, num_kv_heads=2, block_size=BLOCK_SIZE
    )
    case = share(case, GROUPINGS[grouping], 4, BLOCK_SIZE)
    want = reference.paged_attention(*case.widened().arguments(), softmax_scale=case.softmax_scale)
    arguments = {"tiles_of_prefixes": prefix_tiles_for(dtype, 64, min_tiles=2, max_parts=4)}
    metadata = without_borrowed_entries(case)
    got = decode(case, device, metadata=metadata, **arguments)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])
    assert torch.equal(decode(case, device, metadata=metadata, **arguments), got)
    if grouping == "none":
        metadata.shared_prefixes = None
        assert torch.equal(decode(case, device, metadata=metadata, **arguments), got)


def test_batch_invariance_shares_nothing(device: torch.device) -> None:
    case = make_case(GROUP_LENGTHS, dtype=torch.float16, block_size=BLOCK_SIZE)
    case = share(case, GROUPINGS["several"], 3, BLOCK_SIZE)
    got = decode(case, device, batch_invariant=True)
    case.metadata.shared_prefixes = None
    assert torch.equal(decode(case, device, batch_invariant=True), got)


@pytest.mark.parametrize("options", [{"sliding_window": 300}, {"logit_softcap": 2.0}])
def test_shared_prefixes_under_windows_and_softcaps(
    device: torch.device, options: dict[str, float]
) -> None:
    case = make_case(GROUP_LENGTHS, block_size=BLOCK_SIZE)
    case = share(case, GROUPINGS["several"], 3, BLOCK_SIZE)
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, **options
    )
    got = decode(case, device, **options)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[torch.float32])
    if "sliding_window" in options:
        case.metadata.shared_prefixes = None
        assert torch.equal(decode(case, device, **options), got), "windows ignore groups"


@pytest.mark.parametrize("num_decodes", [len(GROUP_LENGTHS), 8])
def test_shared_prefixes_of_a_captured_step(device: torch.device, num_decodes: int) -> None:
    case = make_case(GROUP_LENGTHS, block_size=BLOCK_SIZE)
    case = share(case, [(10, [4, 1, 6]), (2, [2, 0])], 16, BLOCK_SIZE)
    want = decode(case, device)
    got = decode(case, device, metadata=captured(case, num_decodes))
    assert (got[num_decodes:] == 7.0).all()
    # The fewer sequences, the more they are cut.
    torch.testing.assert_close(got[:num_decodes], want[:num_decodes], **TOLERANCE[torch.float32])
    assert torch.equal(got, want) == (num_decodes == len(want))


@pytest.mark.skipif(IS_INTERPRETED, reason="captures a CUDA graph")
def test_a_captured_step_follows_the_groups_on_the_device(device: torch.device) -> None:
    case = make_case(GROUP_LENGTHS, block_size=BLOCK_SIZE)
    grouped = share(case, [(10, [4, 1, 6]), (2, [2, 0])], 16, BLOCK_SIZE).on(device)
    metadata = grouped.metadata
    shared = metadata.shared_prefixes
    assert shared is not None

    def step() -> torch.Tensor:
        dispatch.begin_step(metadata)
        return dispatch.paged_attention(*grouped.arguments(), softmax_scale=case.softmax_scale)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert torch.equal(got, eager)
    for tensor in (shared.member_start, shared.group_lens, shared.prefix_lens):
        tensor.zero_()
    graph.replay()
    assert torch.equal(got, step())
    metadata.shared_prefixes = None
    assert torch.equal(got, step()), "no groups at all: the same bits as without bounds for them"
