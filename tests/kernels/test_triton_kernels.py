"""The Triton kernels against their float64 twins.

On a GPU the whole grid runs. Without one the cases that are small enough run in Triton's
interpreter, which must be chosen before triton is imported: `test_triton_interpreter.py` runs this
file so.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    PADDING,
    TOLERANCE,
    AttentionCase,
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

from engine.errors import ConfigError
from engine.kernels import dispatch, reference

pytestmark = NEEDS_TRITON


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (dtype, block_size, num_q_heads, num_kv_heads): each axis by itself and a few corners, since each
# case compiles two kernels of seconds each.
ATTENTION_GRID = (
    [(FP32, 16, 9, 3), (FP32, 64, 9, 3), (FP16, 16, 9, 3), (FP16, 64, 9, 3)]
    if IS_INTERPRETED
    else [
        *((BF16, block_size, 9, 3) for block_size in (16, 32, 64, 128)),
        *((BF16, 64, *heads) for heads in ((3, 3), (8, 2), (8, 1), (32, 1))),
        *((dtype, *rest) for dtype in (FP16, FP32) for rest in ((64, 9, 3), (16, 8, 2))),
    ]
)


def attend(case: AttentionCase, device: torch.device, **options: object) -> torch.Tensor:
    on_device = case.on(device)
    dispatch.begin_step(on_device.metadata)
    return (
        kernels("attention")
        .paged_attention(*on_device.arguments(), softmax_scale=case.softmax_scale, **options)
        .cpu()
    )


def check_attention(case: AttentionCase, device: torch.device, **options: object) -> None:
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, **options
    )
    got = attend(case, device, **options)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[got.dtype])
    assert torch.equal(attend(case, device, **options), got), "same input, other bits"


@pytest.mark.parametrize(("dtype", "block_size", "num_q_heads", "num_kv_heads"), ATTENTION_GRID)
def test_decode(
    device: torch.device, dtype: torch.dtype, block_size: int, num_q_heads: int, num_kv_heads: int
) -> None:
    b = block_size
    long = [] if IS_INTERPRETED else [(1000, 1), (8192, 1), (9001, 1)]
    case = make_case(
        [(0, 1), (b - 2, 1), (b - 1, 1), (b, 1), (256, 1), (300, 1), PADDING, *long],
        dtype=dtype,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        block_size=block_size,
        is_strided=True,
    )
    check_attention(case, device)


@pytest.mark.parametrize(("dtype", "block_size", "num_q_heads", "num_kv_heads"), ATTENTION_GRID)
def test_prefill(
    device: torch.device, dtype: torch.dtype, block_size: int, num_q_heads: int, num_kv_heads: int
) -> None:
    b = block_size
    long = [] if IS_INTERPRETED else [(0, 1000), (777, 300), (2000, 5)]
    case = make_case(
        [(0, b - 1), (0, b), (0, b + 1), (70, 2), (5, 60), *long],
        dtype=dtype,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        block_size=block_size,
        is_strided=True,
    )
    check_attention(case, device)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (FP32, 80),
        *on_gpu_only(*((BF16, head_dim) for head_dim in (16, 80, 96, 128, 256))),
        *on_gpu_only((FP16, 128), (FP32, 256)),
    ],
)
def test_mixed_batch_of_head_dim(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    check_attention(
        make_case([(7, 1), (270, 1), (0, 5), (60, 70)], dtype=dtype, head_dim=head_dim), device
    )


@pytest.mark.parametrize(
    ("dtype", "block_size", "window"),
    [
        (FP32, 16, 5),
        (FP16, 16, 70),
        *on_gpu_only((BF16, 16, 5), (BF16, 16, 70), (FP32, 64, 70)),
        *on_gpu_only((BF16, 64, 64), (BF16, 64, 300), (BF16, 64, 4096)),
    ],
)
def test_sliding_window_reads_nothing_before_it(
    device: torch.device, dtype: torch.dtype, window: int, block_size: int
) -> None:
    long = [] if IS_INTERPRETED else [(5000, 1)]
    longer = [] if IS_INTERPRETED else [(600, 700)]
    case = make_case(
        [(2, 1), (63, 1), (330, 1), *long, (0, 70), (150, 20), *longer],
        dtype=dtype,
        block_size=block_size,
    )
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, sliding_window=window
    )
    assert case.metadata.block_table_host is not None
    for row, blocks in enumerate(case.metadata.block_table_host):
        first_query = int(case.metadata.seq_lens[row] - case.metadata.query_lens[row])
        for block in blocks[: max(0, first_query - window + 1) // block_size]:
            case.k_cache[block] = float("nan")
            case.v_cache[block] = float("nan")
    got = attend(case, device, sliding_window=window)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_softcap(device: torch.device, dtype: torch.dtype) -> None:
    check_attention(make_case([(99, 1), (10, 70)], dtype=dtype), device, logit_softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
def test_neighbours_never_change_a_sequence(
    device: torch.device, dtype: torch.dtype, window: int | None
) -> None:
    options = {"sliding_window": window, "batch_invariant": True}
    seqs = [(5, 1), (300, 1), (600, 1), (0, 3), (60, 10)]
    if not IS_INTERPRETED:
        seqs = [(9000, 1), *((37 * n, 1) for n in range(60)), *seqs, (0, 500), (128, 1000)]
    case = make_case(seqs, dtype=dtype, num_q_heads=6, num_kv_heads=2, block_size=64)
    together = attend(case, device, **options)
    for row in range(0, len(seqs), 1 if IS_INTERPRETED else 7):
        start, end = case.metadata.query_start_loc[row : row + 2].tolist()
        alone = attend(only_sequence(case, row), device, **options)
        assert torch.equal(together[start:end], alone), seqs[row]


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_boundaries_never_change_a_prompt(device: torch.device, dtype: torch.dtype) -> None:
    length, sizes = (100, (2, 61, 37)) if IS_INTERPRETED else (3000, (2, 61, 937, 1000, 128, 872))
    whole = make_case([(0, length)], dtype=dtype, num_q_heads=6, num_kv_heads=2, block_size=64)
    want = attend(whole, device)
    assert whole.metadata.block_table_host is not None
    start = 0
    for size in sizes:
        chunk = AttentionCase(
            whole.q[start : start + size],
            whole.k_cache,
            whole.v_cache,
            make_metadata([(start, size)], 64, whole.metadata.block_table_host),
            whole.softmax_scale,
        )
        assert_rows_alike(attend(chunk, device), want[start : start + size])
        start += size


def test_spare_rows_and_empty_sequences_of_a_padded_batch(device: torch.device) -> None:
    """A batch padded at both ends, lengths on the device only: what a captured graph sees."""
    exact = make_case([(7, 1), (40, 1), (0, 20), (33, 30)], block_size=16)
    want = attend(exact, device, batch_invariant=True)
    full = exact.metadata
    # Decodes padded from 2 to 4 rows, prefills from 2 to 3 sequences, tokens from 52 to 64.
    padded = dataclasses.replace(
        full,
        block_table=torch.cat(
            (
                full.block_table[:2],
                torch.zeros_like(full.block_table[:2]),
                full.block_table[2:],
                torch.zeros_like(full.block_table[:1]),
            )
        ),
        seq_lens=torch.tensor([8, 41, 0, 0, 20, 63, 0], dtype=torch.int32),
        query_lens=torch.tensor([1, 1, 1, 1, 20, 30, 0], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 1, 2, 3, 4, 24, 54, 54], dtype=torch.int32),
        num_decodes=4,
        max_query_len=64,
        max_seq_len=4096,
        seq_lens_host=None,
        query_lens_host=None,
        block_table_host=None,
    )
    q = torch.full((64, *exact.q.shape[1:]), float("nan"))
    q[:2], q[4:54] = exact.q[:2], exact.q[2:]
    got = attend(dataclasses.replace(exact, q=q, metadata=padded), device, batch_invariant=True)
    assert torch.equal(torch.cat((got[:2], got[4:54])), want)
    assert (got[2:4] == 0).all()
    assert (got[54:] == 0).all()


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not run Gluon")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("head_dim", "block_size", "num_q_heads", "num_kv_heads"),
    [
        *((64, block_size, 9, 3) for block_size in (16, 64, 128)),
        *((128, block_size, 8, 2) for block_size in (32, 64, 256)),
        *((128, 64, *heads) for heads in ((2, 2), (16, 8), (10, 2), (128, 1))),
    ],
)
@pytest.mark.parametrize("is_hopper", [True, False])
def test_prefill_of_either_kernel(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    is_hopper: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ends at, before and after tiles of 64 and 128 keys; the last values of a block are NaN."""
    prefill = kernels("prefill_attention")
    if is_hopper and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("no Hopper GPU")
    calls = []
    if is_hopper:
        hopper = prefill.hopper_kernel()
        run = hopper.prefill_on_hopper
        monkeypatch.setattr(
            hopper, "prefill_on_hopper", lambda *a, **kw: (calls.append(1), run(*a, **kw))
        )
    else:
        monkeypatch.setattr(prefill, "hopper_kernel", lambda: None)
    seqs = [(0, 127), (0, 128), (0, 129), (64, 64), (1, 2), (63, 2), (500, 140)]
    case = make_case(
        seqs,
        dtype=dtype,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        is_strided=True,
    )
    check_attention(case, device)
    assert bool(calls) == is_hopper


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not run Gluon")
def test_consumers_of_a_hopper_program_never_change_a_row(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("no Hopper GPU")
    hopper = kernels("prefill_hopper")
    seqs = [(0, 700), (300, 130), (64, 64), (1, 2)]
    case = make_case(seqs, dtype=BF16, num_q_heads=9, num_kv_heads=3, block_size=64).on(device)
    two, three = (torch.zeros(len(case.q), 9 * 64, dtype=BF16, device=device) for _ in range(2))
    for consumers, out in ((2, two), (3, three)):
        hopper.prefill_on_hopper(
            *case.arguments(),
            out,
            softmax_scale=case.softmax_scale,
            tiles=hopper.HopperTiles(consumers, 128, 3),
        )
    assert torch.equal(two, three)
    assert two.abs().sum() > 0


def captured_prefill(case: AttentionCase, device: torch.device) -> AttentionCase:
    """The batch as a captured step has it: padded, counts on the device, rows of a wider table.

    Everything that padding may hold is poison: lengths, places and table rows far outside.
    """
    full = case.metadata
    num_decodes, num_seqs, num_tokens = full.num_decodes, full.num_seqs, len(full.positions)
    num_rows = num_seqs + 4
    rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3))[:num_seqs]
    table = torch.full((num_rows, full.block_table.shape[1] + 5), 1 << 30, dtype=torch.int32)
    table[rows, : full.block_table.shape[1]] = full.block_table

    def padded(values: torch.Tensor, count: int) -> torch.Tensor:
        return torch.cat((values, torch.full((count,), 1 << 30, dtype=values.dtype)))

    metadata = dataclasses.replace(
        full,
        block_table=table,
        block_rows=padded(rows, 3),
        seq_lens=padded(full.seq_lens, 3),
        query_lens=padded(full.query_lens, 3),
        query_start_loc=padded(full.query_start_loc, 3),
        num_decodes=num_seqs + 3,
        max_query_len=num_tokens + 40,
        max_seq_len=1 << 20,
        device_counts=torch.tensor([num_decodes, num_seqs], dtype=torch.int32),
        max_prefills=num_seqs - num_decodes + 2,
        seq_lens_host=None,
        query_lens_host=None,
        block_table_host=None,
    )
    q = torch.full((num_tokens + 40, *case.q.shape[1:]), float("nan"), dtype=case.q.dtype)
    q[num_decodes:num_tokens] = case.q[num_decodes:]
    return dataclasses.replace(case, q=q, metadata=metadata).on(device)


def prefill_into(case: AttentionCase, out: torch.Tensor) -> torch.Tensor:
    """`prefill_attention` by itself, into `out`."""
    kernels("prefill_attention").prefill_attention(
        *case.arguments(),
        out,
        softmax_scale=case.softmax_scale,
        sliding_window=None,
        logit_softcap=0.0,
    )
    return out


@pytest.mark.parametrize(
    ("block_q", "seqs"),
    [
        (32, [(0, 1000)]),
        (32, [(9, 1)] * 3),
        (16, [(7, 1), (300, 1), (0, 70), (33, 30), (54, 32), (0, 86), (130, 2), (0, 2)]),
        (3, [(5 * n % 37, 2 + n % 11) for n in range(70)]),
        *on_gpu_only((42, [(9, 1)] * 40 + [(3 * n, 2 + n % 137) for n in range(500)])),
    ],
)
@pytest.mark.parametrize("is_captured", [False, True])
def test_every_tile_is_planned_once_and_the_longest_first(
    device: torch.device, block_q: int, seqs: list[tuple[int, int]], is_captured: bool
) -> None:
    plan_file = kernels("prefill_plan")
    case = make_case(seqs, num_q_heads=1, num_kv_heads=1, head_dim=16)
    host = case.metadata
    on_device = captured_prefill(case, device) if is_captured else case.on(device)
    rows = on_device.metadata.block_rows.tolist() if is_captured else list(range(len(seqs)))
    want = []
    for seq, (computed, new) in enumerate(seqs[host.num_decodes :], start=host.num_decodes):
        first_token = int(host.query_start_loc[seq])
        for first in range(0, new, block_q):
            count = min(block_q, new - first)
            want.append([first_token + first, count, computed + first, computed + new, rows[seq]])
    # Sorted by the end of the keys; Python's sort keeps the order of sequences among equals.
    want.sort(key=lambda tile: -(tile[1] + tile[2]))
    plan, max_tiles = plan_file.prefill_plan(on_device.metadata, len(on_device.q), block_q)
    got = plan[plan_file.HEADER :].view(-1, plan_file.ITEM)[: len(want), :5].tolist()
    assert int(plan[0]) == len(want) <= max_tiles
    assert got == want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "seqs",
    [
        [(0, 20)],
        [(7, 1), (300, 1), (0, 70), (33, 30), (130, 2)],
        [(7, 1), (40, 1)],
        *on_gpu_only([(9, 1)] * 40 + [(3 * n, 2 + n % 37) for n in range(300)], [(100, 3000)]),
    ],
    ids=lambda seqs: f"{len(seqs)} sequences",
)
def test_prefill_of_a_captured_step_writes_its_tokens_and_nothing_else(
    device: torch.device, dtype: torch.dtype, seqs: list[tuple[int, int]]
) -> None:
    exact = make_case(seqs, dtype=dtype, num_q_heads=6, num_kv_heads=2, block_size=64)
    want = attend(exact, device)
    case = captured_prefill(exact, device)
    got = prefill_into(case, torch.full_like(case.q, 7.0).flatten(1)).cpu()
    first, last = exact.metadata.num_decodes, len(exact.q)
    assert torch.equal(got[first:last], want[first:])
    assert (got[:first] == 7.0).all()
    assert (got[last:] == 7.0).all()


@pytest.mark.skipif(IS_INTERPRETED, reason="captures a CUDA graph")
def test_a_captured_prefill_follows_the_counts_on_the_device(device: torch.device) -> None:
    """One graph for batches of one shape bound: other counts, lengths and table rows."""
    seqs = [(3000, 1), (40, 1), (0, 200), (33, 300), (700, 90)]
    exact = make_case(seqs, dtype=BF16, num_q_heads=8, num_kv_heads=2, block_size=64)
    case = captured_prefill(exact, device)
    metadata = case.metadata
    out = torch.zeros_like(case.q).flatten(1)
    prefill_into(case, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill_into(case, out)
    # All sequences; without the last; without prefills; without decodes (the first two gone).
    for first, last in ((0, 5), (0, 4), (0, 2), (2, 5), (0, 5)):
        part = exact.metadata
        start, end = part.query_start_loc[[first, last]].tolist()
        num_decodes = max(2 - first, 0)
        metadata.device_counts.copy_(torch.tensor([num_decodes, last - first]))
        metadata.seq_lens[: last - first] = part.seq_lens[first:last].to(device)
        starts = part.query_start_loc[first : last + 1] - start
        metadata.query_start_loc[: len(starts)] = starts.to(device)
        rows = captured_prefill(exact, device).metadata.block_rows
        metadata.block_rows[: last - first] = rows[first:last]
        case.q[: end - start] = exact.q[start:end].to(device)
        out.fill_(7.0)
        graph.replay()
        want = attend(exact, device)[start:end].to(device)
        assert torch.equal(out[num_decodes : end - start], want[num_decodes:]), (first, last)
        assert (out[:num_decodes] == 7.0).all()
        assert (out[end - start :] == 7.0).all()


def test_out_with_a_row_stride(device: torch.device) -> None:
    case = make_case([(7, 1), (300, 1), (0, 9)]).on(device)
    wide = torch.full((11, 300), 7.0, device=device)
    paged_attention = kernels("attention").paged_attention
    returned = paged_attention(*case.arguments(), softmax_scale=0.1, out=wide[:, :256])
    assert returned.data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :256], paged_attention(*case.arguments(), softmax_scale=0.1))
    assert (wide[:, 256:] == 7.0).all()


def want_plan(
    lengths: list[int],
    rows: list[int],
    blocks: list[list[int]],
    reach: tuple[int | None, int | None],
    layout: Any,
) -> tuple[list[list[int]], list[list[int]], list[int], int]:
    """Items, columns, places and tiles as the head of `decode_plan` defines them, one by one."""
    tile, (window, chunk) = layout.tile, reach
    lows = [max(0, length - window) if window else 0 for length in lengths]
    if chunk:
        lows = [
            max(low, (length - 1) // chunk * chunk if length else 0)
            for low, length in zip(lows, lengths, strict=True)
        ]
    firsts = [low // tile * tile for low in lows]
    tiles = [
        max(1, -(-(length - first) // tile)) for length, first in zip(lengths, firsts, strict=True)
    ]
    per_column = max(
        -(-sum(tiles) // layout.num_columns),
        layout.min_tiles,
        -(-max(tiles) // (layout.max_parts - 1)),
        layout.split // tile,
    )
    # Borders of the columns among all tiles, moved to the end of a sequence where one is near.
    starts = [0, *itertools.accumulate(tiles)]
    column_starts = []
    for border in range(0, starts[-1], per_column):
        seq = max(seq for seq, start in enumerate(starts) if start <= border)
        offset, count = border - starts[seq], tiles[seq]
        if count < 2 * layout.snap:
            offset = 0 if offset < (count + 1) // 2 else count
        elif offset < layout.snap:
            offset = 0
        elif count - offset < layout.snap:
            offset = count
        column_starts.append(starts[seq] + offset)
    items, columns, places, place = [], [], [], 0
    for seq, (length, first, count) in enumerate(zip(lengths, firsts, tiles, strict=True)):
        before = starts[seq]
        if layout.split:
            num_parts = layout.num_fixed_parts(length - first)
            borders = [part * count // num_parts for part in range(num_parts + 1)]
        else:
            inner = {start - before for start in column_starts if before < start < before + count}
            borders = [0, *sorted(inner), count]
            num_parts = len(borders) - 1
        places.append(place)
        for part, (start, end) in enumerate(itertools.pairwise(borders)):
            first_key = first + start * tile
            end_key = min(first + end * tile, length)
            item = [
                seq,
                rows[seq],
                first_key,
                end_key,
                place + part if num_parts > 1 else -1,
                lows[seq],
                blocks[seq][first_key // 16] if first_key < end_key else 0,
            ]
            if layout.split:
                inside = range(before + start, before + end)
                count_first = sum(1 for tile_index in inside if tile_index % per_column == 0)
            else:
                count_first = column_starts.count(before + start)
            columns += [[*item, len(items), before + start]] * count_first
            items.append([*item, num_parts * 257 + part * 65536])
        place += num_parts if num_parts > 1 else 0
    return items, columns, places, starts[-1]


@pytest.mark.parametrize("num_seqs", [1, 4, 40, *on_gpu_only(1025, 4096)])
@pytest.mark.parametrize("reach", [(None, None), (700, None), (700, 1024)])
@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize(("split", "snap"), [(0, 1), (0, 3), (256, 2)])
@pytest.mark.parametrize("num_columns", [33, *on_gpu_only(1, 700)])
def test_every_key_is_planned_once(
    device: torch.device,
    num_seqs: int,
    reach: tuple[int | None, int | None],
    is_captured: bool,
    split: int,
    snap: int,
    num_columns: int,
) -> None:
    decode_plan, decode_layout = kernels("decode_plan"), kernels("decode_layout")
    layout = decode_layout.SplitLayout(num_columns, 64, 4, snap, max_parts=32, split=split)
    random = torch.Generator().manual_seed(num_seqs)
    seq_lens = torch.randint(0, 20000, (num_seqs,), generator=random)
    seq_lens[:4] = torch.tensor([0, 1, 256, 257])[:num_seqs]
    table = torch.randint(0, 10**6, (num_seqs, 1250), generator=random)
    metadata = make_metadata([(0, 1)] * num_seqs, 16, table.tolist())
    metadata.seq_lens = seq_lens.int()
    num_planned, rows = num_seqs, torch.arange(num_seqs)
    if is_captured:
        num_planned, rows = num_seqs // 2, torch.randperm(num_seqs + 3, generator=random)[:num_seqs]
        metadata.block_rows = rows
        metadata.block_table = torch.full((num_seqs + 3, 1250), 2**30, dtype=torch.int32)
        metadata.block_table[rows] = table.int()
        metadata.device_counts = torch.tensor([num_planned, num_seqs], dtype=torch.int32)
    no_groups = decode_layout.PrefixLayout(1, 64, 64, 4, 16)
    plan = decode_plan.plan_decode(
        metadata_on(metadata, device), num_seqs, 9, 3, 16, *reach, layout, no_groups
    )
    # Copied once: thousands of copies from a busy GPU take minutes.
    items, columns, places = (x.tolist() for x in (plan.items, plan.columns, plan.places))
    want_items, want_columns, want_places, num_tiles = [], [], [], 0
    if num_planned:
        want_items, want_columns, want_places, num_tiles = want_plan(
            seq_lens.tolist()[:num_planned],
            rows.tolist(),
            table.tolist(),
            reach,
            layout,
        )
    assert items[: len(want_items)] == want_items
    assert places[:num_planned] == want_places
    assert [column[:9] for column in columns[: len(want_columns)]] == want_columns
    # Behind the last column with work: where it ends.
    ends = [column[:9] for column in columns[len(want_columns) :]]
    end = [*[0] * 7, len(want_items), num_tiles]
    assert ends == [end] * (num_columns + 1 - len(want_columns))
    assert sum(item[4] >= 0 for item in want_items) <= plan.max_places
    assert not any(plan.arrivals.tolist()[: num_planned * 3])
    if not split:
        shares = [b - a for a, b in itertools.pairwise(column[8] for column in want_columns)]
        assert not shares or max(shares) - sum(shares) / len(shares) <= 2 * snap


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [64, 576, *on_gpu_only(1, 1000, 4096, 12288)])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_norms(
    device: torch.device, dtype: torch.dtype, hidden_size: int, weight_offset: float
) -> None:
    rms_norm = kernels("rms_norm")
    x, residual = (
        (torch.randn(5, hidden_size + 8, device=device) * 3).to(dtype)[:, :hidden_size]
        for _ in range(2)
    )
    weight = torch.randn(hidden_size, device=device).to(dtype)
    got = rms_norm.rms_norm(x, weight, 1e-5, weight_offset)
    want = reference.rms_norm(x.double(), weight.double(), 1e-5, weight_offset)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])
    assert torch.equal(rms_norm.rms_norm(x[3:4], weight, 1e-5, weight_offset), got[3:4])
    cube = x[:4].reshape(2, 2, hidden_size)
    assert torch.equal(rms_norm.rms_norm(cube, weight, 1e-5, weight_offset).view(4, -1), got[:4])

    total = x + residual
    normed, returned = rms_norm.add_rms_norm(x, residual, weight, 1e-5, weight_offset)
    assert returned is residual
    assert torch.equal(residual, total)
    assert torch.equal(normed, rms_norm.rms_norm(total, weight, 1e-5, weight_offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_act_mul(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    gate_up = (torch.randn(3, 2 * 1100 + 6, device=device) * 3).to(dtype)[:, :2200]
    got = kernels("act_mul").act_mul(gate_up, activation)
    want = reference.act_mul(gate_up.double(), activation)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


def test_unknown_activation(device: torch.device) -> None:
    with pytest.raises(ConfigError, match="'relu' must be one of"):
        kernels("act_mul").act_mul(torch.randn(2, 4, device=device), "relu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, 0.0, *on_gpu_only(1.0)])
@pytest.mark.parametrize(
    ("head_dim", "rot_dim", "num_q_heads", "num_kv_heads"),
    [(64, 64, 9, 3), (80, 32, 9, 3), *on_gpu_only((80, 32, 32, 8), (128, 0, 1, 1))],
)
def test_rope_write_kv(
    device: torch.device,
    dtype: torch.dtype,
    norm: float | None,
    head_dim: int,
    rot_dim: int,
    num_q_heads: int,
    num_kv_heads: int,
) -> None:
    metadata = make_metadata([(17, 1), PADDING, (0, 20)], 16, [[4, 1], [], [3, 0]])
    width = (num_q_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(22, width + 16).to(dtype)[:, :width]
    angles = torch.rand(64, rot_dim // 2) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1) if rot_dim else None
    weights = (
        {}
        if norm is None
        else {name: torch.randn(head_dim).to(dtype) for name in ("q_norm_weight", "k_norm_weight")}
    )
    sizes = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    shape = (6, 16, num_kv_heads, head_dim)
    want_caches = [torch.full(shape, 7.0, dtype=torch.float64) for _ in "kv"]
    want_q = reference.rope_write_kv(
        qkv.double(),
        metadata,
        cos_sin,
        *want_caches,
        **sizes,
        **{name: weight.double() for name, weight in weights.items()},
        norm_weight_offset=norm or 0.0,
    )
    # Both caches are planes of one tensor: no stride is a product of the shape.
    planes = torch.full((6, 2, *shape[1:]), 7.0, dtype=dtype, device=device)
    q = kernels("rope_write_kv").rope_write_kv(
        qkv.to(device),
        metadata_on(metadata, device),
        None if cos_sin is None else cos_sin.to(device),
        planes[:, 0],
        planes[:, 1],
        **sizes,
        **{name: weight.to(device) for name, weight in weights.items()},
        norm_weight_offset=norm or 0.0,
    )
    is_real = metadata.slot_mapping >= 0
    # Norm weights up to 4 scale the values, and so their rounding.
    tolerance = {name: 4 * value for name, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(q.cpu().double()[is_real], want_q[is_real], **tolerance)
    for plane, want in zip(planes.cpu().unbind(1), want_caches, strict=True):
        torch.testing.assert_close(plane.double(), want, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(72, 100), *on_gpu_only((576, 960), (4096, 1536))])
def test_rows_of_a_linear_layer_never_change_each_other(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    num_rows = 70 if IS_INTERPRETED else 600
    linear = kernels("batch_invariant_linear").batch_invariant_linear
    x = torch.randn(num_rows, shape[0] + 8, device=device).to(dtype)[:, : shape[0]]
    weight = (torch.randn(*shape[::-1], device=device) / shape[0] ** 0.5).to(dtype)
    bias = torch.randn(shape[1], device=device).to(dtype)
    want = linear(x, weight, bias)
    wide = F.linear(x.double(), weight.double(), bias.double())
    tolerance = dict(TOLERANCE[dtype])
    # K products with terms of size 1 / sqrt(K), added in order in float32: each of the K sums is
    # rounded by 2^-24 of a random walk, together sqrt(K / 2) * 2^-24 rms, and the worst of a
    # million elements is 6 times that.
    tolerance["atol"] = max(tolerance["atol"], 6 * (shape[0] / 2) ** 0.5 * 2**-24)
    torch.testing.assert_close(want.double(), wide, **tolerance)
    for count in (1, 2, 33, num_rows - 1):
        assert_rows_alike(linear(x[-count:], weight, bias), want[-count:])
    assert linear(x[:6].reshape(2, 3, -1), weight).shape == (2, 3, shape[1])


@pytest.mark.skipif(IS_INTERPRETED, reason="captures a CUDA graph")
@pytest.mark.parametrize("window", [None, 100])
def test_a_captured_step_follows_the_lengths_on_the_device(
    device: torch.device, window: int | None
) -> None:
    # Both batches lie in the same blocks; the graph's bounds fit either.
    case = make_case([(3000, 1), (40, 1), (200, 1), (0, 20), (33, 30)], block_size=64).on(device)
    shorter = case.metadata.seq_lens - torch.tensor([2900, 41, 7, 0, 2], device=device).int()
    metadata = dataclasses.replace(
        case.metadata,
        max_seq_len=8192,
        seq_lens_host=None,
        query_lens_host=None,
        block_table_host=None,
    )
    arguments = {"softmax_scale": case.softmax_scale, "sliding_window": window}

    def step() -> torch.Tensor:
        dispatch.begin_step(metadata)
        layers = [
            dispatch.paged_attention(case.q, case.k_cache, case.v_cache, metadata, **arguments)
            for _ in range(2)
        ]
        return torch.stack(layers)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured, eager)
    metadata.seq_lens.copy_(shorter)
    graph.replay()
    got = captured.clone()
    assert torch.equal(got, step())
    assert not torch.equal(got[0, 0], eager[0, 0])
    assert (got[:, 1] == 0).all(), "a sequence of length 0 is padding"


@pytest.mark.skipif(IS_INTERPRETED, reason="needs the memory of a GPU")
@pytest.mark.large_memory
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    block_size, num_kv_heads, head_dim = 64, 8, 128
    block_elements = block_size * num_kv_heads * head_dim
    # The first block whose first element's offset no longer fits in a signed 32-bit integer.
    first_far = 2**31 // block_elements
    shape = (first_far + 8, block_size, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in "kv")
    blocks = [[first_far + 7, first_far, first_far + 3], [first_far + 1, first_far + 5]]
    near = make_metadata([(150, 1), (0, 100)], block_size, [[0, 1, 2], [3, 4]])
    far = make_metadata([(150, 1), (0, 100)], block_size, blocks)
    sizes = {"num_q_heads": 8, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    prompt = make_metadata([(0, 150)], block_size, [[0, 1, 2]])
    far_prompt = make_metadata([(0, 150)], block_size, blocks[:1])
    results = []
    for metadata, prefix in ((near, prompt), (far, far_prompt)):
        torch.manual_seed(0)
        for part in (prefix, metadata):
            qkv = torch.randn(len(part.positions), 24 * head_dim, device=device).bfloat16()
            on_device = metadata_on(part, device)
            q = dispatch.rope_write_kv(qkv, on_device, None, k_cache, v_cache, **sizes)
        results.append(dispatch.paged_attention(q, k_cache, v_cache, on_device, softmax_scale=0.1))
    assert torch.equal(*results)
    assert results[0].abs().sum() > 0
