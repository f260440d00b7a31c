"""The CPU path: right against the float64 twin, and blind to batch neighbours and chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    PADDING,
    TOLERANCE,
    AttentionCase,
    make_case,
    make_metadata,
    only_sequence,
)
from quantised_cases import KINDS, random_codes

from engine.kernels import cpu_attention, dispatch, reference
from engine.kernels.moe_reference import Routing
from engine.layers.quantised_packing import pack_codes

DTYPES = list(TOLERANCE)


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def attend(case: AttentionCase, **options: object) -> torch.Tensor:
    return dispatch.paged_attention(*case.arguments(), softmax_scale=case.softmax_scale, **options)


def check_attention(case: AttentionCase, **options: object) -> None:
    want = reference.paged_attention(
        *case.widened().arguments(), softmax_scale=case.softmax_scale, **options
    )
    got = attend(case, **options)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[got.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(3, 3), (9, 3), (8, 2), (8, 1)])
def test_attention(
    dtype: torch.dtype, block_size: int, num_q_heads: int, num_kv_heads: int
) -> None:
    b = block_size
    check_attention(
        make_case(
            [(0, 1), (b - 2, 1), (b - 1, 1), (b, 1), (300, 1), (0, b), (0, b + 1), (70, 65)],
            dtype=dtype,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=64,
            block_size=block_size,
            is_strided=True,
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_attention_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    check_attention(make_case([(77, 1), (3, 70)], dtype=dtype, head_dim=head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"sliding_window": 5}, {"sliding_window": 64}])
def test_sliding_window_reads_nothing_before_it(
    dtype: torch.dtype, options: dict[str, int]
) -> None:
    window = options["sliding_window"]
    case = make_case([(2, 1), (63, 1), (199, 1), (0, 70), (150, 20)], dtype=dtype)
    assert case.metadata.block_table_host is not None
    for row, blocks in enumerate(case.metadata.block_table_host):
        first_query = int(case.metadata.seq_lens[row] - case.metadata.query_lens[row])
        for block in blocks[: max(0, first_query - window + 1) // 16]:
            case.k_cache[block] = float("nan")
            case.v_cache[block] = float("nan")
    widened = case.widened()
    want = reference.paged_attention(
        widened.q,
        widened.k_cache.nan_to_num(),
        widened.v_cache.nan_to_num(),
        case.metadata,
        softmax_scale=case.softmax_scale,
        **options,
    )
    torch.testing.assert_close(attend(case, **options).double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_softcap(dtype: torch.dtype) -> None:
    check_attention(make_case([(99, 1), (10, 70)], dtype=dtype), logit_softcap=2.0)


def test_one_long_sequence_and_many_lengths() -> None:
    check_attention(make_case([(3000, 1), *((n * 37, 1) for n in range(20))], block_size=64))


def test_padding_rows_are_zero() -> None:
    case = make_case([(7, 1), PADDING, (3, 1), PADDING], dtype=torch.bfloat16)
    out = attend(case)
    assert (out[[1, 3]] == 0).all()
    assert torch.equal(out[2:3], attend(only_sequence(case, 2)))


def test_out_is_written_in_place() -> None:
    case = make_case([(7, 1), (3, 1)])
    wide = torch.full((2, 300), 7.0)
    returned = attend(case, out=wide[:, :256])
    assert returned.data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :256], attend(case))
    assert (wide[:, 256:] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40}, {"logit_softcap": 5.0}])
def test_neighbours_never_change_a_sequence(
    dtype: torch.dtype, options: dict[str, float], num_threads: int
) -> None:
    seqs = [(n, 1) for n in (0, 5, 62, 63, 64, 65, 90, 100, 101, 600, 777, 60, 61)]
    seqs += [(0, 3), (0, 64), (60, 10), (128, 100)]
    case = make_case(seqs, dtype=dtype, num_q_heads=9, num_kv_heads=3, block_size=64)
    together = attend(case, **options)
    for row in range(len(seqs)):
        start, end = case.metadata.query_start_loc[row : row + 2].tolist()
        alone = attend(only_sequence(case, row), **options)
        assert torch.equal(together[start:end], alone), seqs[row]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40}, {"logit_softcap": 5.0}])
def test_chunk_boundaries_never_change_a_prompt(
    dtype: torch.dtype, options: dict[str, float], num_threads: int
) -> None:
    whole = make_case([(0, 200)], dtype=dtype, num_q_heads=9, num_kv_heads=3, block_size=64)
    want = attend(whole, **options)
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
        assert torch.equal(attend(chunk, **options), want[start : start + size]), start
        start += size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 960), (64, 50)])
def test_rows_of_a_linear_layer_never_change_each_other(
    dtype: torch.dtype, shape: tuple[int, int], num_threads: int
) -> None:
    x, weight, bias = torch.randn(70, shape[0]), torch.randn(*shape[::-1]), torch.randn(shape[1])
    x, weight, bias = x.to(dtype), (weight / shape[0] ** 0.5).to(dtype), bias.to(dtype)
    want = dispatch.batch_invariant_linear(x, weight, bias)
    torch.testing.assert_close(
        want.double(),
        F.linear(x.double(), weight.double(), bias.double()),
        **TOLERANCE[dtype],
    )
    for num_rows in (1, 2, 3, 5, 7, 9, 10, 11, 13, 33, 69):
        got = dispatch.batch_invariant_linear(x[-num_rows:], weight, bias)
        assert torch.equal(got, want[-num_rows:]), num_rows
    assert dispatch.batch_invariant_linear(x[:6].view(2, 3, -1), weight).shape == (2, 3, shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_norms_are_the_references_and_row_by_row(
    dtype: torch.dtype, weight_offset: float, num_threads: int
) -> None:
    x, residual = (torch.randn(33, 640).to(dtype)[:, :576] for _ in range(2))
    weight = torch.randn(576).to(dtype)
    normed = dispatch.rms_norm(x, weight, 1e-5, weight_offset)
    want = reference.rms_norm(x, weight, 1e-5, weight_offset)
    torch.testing.assert_close(normed, want, **TOLERANCE[dtype])
    for num_rows in (1, 2, 7):
        alone = dispatch.rms_norm(x[:num_rows], weight, 1e-5, weight_offset)
        assert torch.equal(alone, normed[:num_rows])

    total = x + residual
    added, returned = dispatch.add_rms_norm(x, residual, weight, 1e-5, weight_offset)
    assert returned is residual
    assert torch.equal(residual, total)
    assert torch.equal(added, dispatch.rms_norm(total, weight, 1e-5, weight_offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(dtype: torch.dtype, activation: str) -> None:
    gate_up = torch.randn(9, 200).to(dtype)
    torch.testing.assert_close(
        dispatch.act_mul(gate_up, activation).double(),
        reference.act_mul(gate_up.double(), activation),
        **TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("rot_dim", [0, 24, 64])
def test_rope_write_kv(dtype: torch.dtype, has_norm: bool, rot_dim: int) -> None:
    metadata = make_metadata(
        [(17, 1), PADDING, (0, 20), (3, 30)], 16, [[4, 1], [], [3, 0], [5, 2, 6]]
    )
    qkv = torch.randn(52, (9 + 6) * 64).to(dtype)
    angles = torch.rand(64, rot_dim // 2) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1) if rot_dim else None
    norms = (
        {"q_norm_weight": torch.randn(64).to(dtype), "k_norm_weight": torch.randn(64).to(dtype)}
        if has_norm
        else {}
    )
    caches = [torch.full((8, 16, 3, 64), 7.0, dtype=dtype) for _ in range(4)]
    arguments = {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64, **norms}
    dispatch.begin_step(metadata)
    for _ in range(2):  # the second layer uses what the first one left in the step's cache
        q = dispatch.rope_write_kv(qkv, metadata, cos_sin, *caches[:2], **arguments)
    want = reference.rope_write_kv(qkv, metadata, cos_sin, *caches[2:], **arguments)
    torch.testing.assert_close(q, want, **TOLERANCE[dtype])
    torch.testing.assert_close(caches[0], caches[2], **TOLERANCE[dtype])
    assert torch.equal(caches[1], caches[3])
    assert q.is_contiguous()


def test_a_step_plans_once_and_the_next_step_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(7, 1), (3, 1)])
    plans = []
    make_plan = cpu_attention.plan_attention
    monkeypatch.setattr(
        cpu_attention, "plan_attention", lambda *arguments: plans.append(1) or make_plan(*arguments)
    )
    attend(case)
    attend(case)
    assert len(plans) == 2, "without begin_step nothing is kept"
    dispatch.begin_step(case.metadata)
    first = attend(case)
    assert torch.equal(attend(case), first)
    attend(case, sliding_window=2)
    assert len(plans) == 4
    case.metadata.seq_lens[0] -= 1
    dispatch.begin_step(case.metadata)
    assert not torch.equal(attend(case)[0], first[0])


def test_ops_for_few_rows_are_plain_on_a_cpu() -> None:
    embedding, weight = torch.randn(7, 8), torch.randn(8, 8)
    ids = torch.tensor([5, 2])
    hidden, squares = dispatch.embed_rows(ids, embedding)
    want = reference.embed_rows(ids, embedding)[0]
    x = dispatch.normed_linear(hidden, squares, weight[0], weight, eps=1e-5)
    assert torch.equal(
        x, dispatch.few_row_linear(reference.rms_norm(want, weight[0], 1e-5), weight)
    )
    caches = [torch.zeros(1, 16, 1, 2) for _ in range(4)]
    sizes = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 2}
    metadata = make_metadata([(3, 1), (5, 1)], 16, [[0], [0]])
    q = dispatch.normed_qkv(
        hidden, squares, weight[0], weight, None, metadata, None, *caches[:2], **sizes, eps=1e-5
    )
    assert torch.equal(q, reference.rope_write_kv(x, metadata, None, *caches[2:], **sizes))
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    dispatch.add_linear(x, weight, hidden)
    assert torch.equal(hidden, want + dispatch.few_row_linear(x, weight))


def test_fused_products_are_plain_on_a_cpu() -> None:
    embedding, weight = torch.randn(7, 8), torch.randn(8, 8)
    ids = torch.tensor([5, 2])
    hidden, x, squares = dispatch.embed_weighed(ids, embedding, weight[0])
    assert torch.equal(hidden, embedding[ids])
    y = dispatch.scaled_linear(x, squares, weight, eps=1e-5)
    torch.testing.assert_close(y, reference.rms_norm(hidden, weight[0], 1e-5) @ weight.T)
    caches = [torch.zeros(1, 16, 1, 2) for _ in range(4)]
    sizes = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 2}
    metadata = make_metadata([(3, 1), (5, 1)], 16, [[0], [0]])
    q = dispatch.scaled_qkv(
        x, squares, weight, None, metadata, None, *caches[:2], **sizes, eps=1e-5
    )
    assert torch.equal(q, reference.rope_write_kv(y, metadata, None, *caches[2:], **sizes))
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    want = hidden + y @ weight.T
    x, squares = dispatch.add_weighed_linear(y, weight, hidden, weight[0])
    torch.testing.assert_close(hidden, want)
    torch.testing.assert_close(x, want * weight[0])
    torch.testing.assert_close(squares.sum(-1), want.pow(2).sum(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"chunk_size": 64}, {"chunk_size": 128}, {}])
def test_sinks_and_chunks(dtype: torch.dtype, options: dict[str, int]) -> None:
    seqs = [(2, 1), (63, 1), (64, 1), (199, 1), (0, 70), (100, 80)]
    case = make_case(seqs, dtype=dtype, num_q_heads=6, num_kv_heads=2)
    sinks = torch.randn(6).to(dtype) * 2
    check_attention(case, sinks=sinks, **options)
    plain, with_sinks = attend(case, **options), attend(case, sinks=sinks, **options)
    assert (plain - with_sinks).abs().max() > 0.01
    # Neither neighbours nor the cut of the prompt change a sequence.
    for row in range(case.metadata.num_seqs):
        start, end = case.metadata.query_start_loc[row : row + 2].tolist()
        alone = attend(only_sequence(case, row), sinks=sinks, **options)
        assert torch.equal(alone, with_sinks[start:end])


def test_chunks_read_nothing_before_them() -> None:
    case = make_case([(130, 1), (140, 20)], dtype=torch.float32)
    assert case.metadata.block_table_host is not None
    for blocks in case.metadata.block_table_host:
        case.k_cache[blocks[:8]] = float("nan")  # 8 blocks of 16 tokens: the first chunk
        case.v_cache[blocks[:8]] = float("nan")
    assert attend(case, chunk_size=128).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_experts_row_by_row(dtype: torch.dtype) -> None:
    """Close to the twin, and a token's bits are its own."""
    x = torch.randn(37, 48).to(dtype)
    weight = {
        "gate_up": (torch.randn(5, 2 * 40, 48) * 48**-0.5).to(dtype),
        "down": (torch.randn(5, 48, 40) * 40**-0.5).to(dtype),
        "gate_up_bias": (torch.randn(5, 80) * 0.25).to(dtype),
        "down_bias": (torch.randn(5, 48) * 0.25).to(dtype),
    }
    routing = Routing(num_chosen=3)
    weights, experts = dispatch.moe_route(torch.randn(37, 5), None, routing)
    got = dispatch.moe_experts(x, **weight, weights=weights, experts=experts, activation="silu")
    want = reference.moe_experts(x, **weight, weights=weights, experts=experts, activation="silu")
    # Six roundings on the way (both products, activation, gating, weight, sum), not three.
    tolerance = {key: 2 * value for key, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(got, want, **tolerance)
    for rows in (slice(3, 4), slice(10, 15)):
        alone = dispatch.moe_experts(
            x[rows], **weight, weights=weights[rows], experts=experts[rows], activation="silu"
        )
        assert torch.equal(alone, got[rows])


def test_quantised_products_take_the_plain_twins() -> None:
    """On a CPU the factory of its layers takes other products; these are for comparison."""
    planes = pack_codes(random_codes(KINDS[1], 16, 128))
    x = torch.randn(3, 128)
    got = dispatch.quantised_linear(x, planes)
    rows = dispatch.quantised_rows(planes, None, torch.float32)
    torch.testing.assert_close(got, F.linear(x, rows))
    both = pack_codes(random_codes(KINDS[1], 64, 128)), pack_codes(random_codes(KINDS[1], 128, 32))
    experts = torch.zeros(3, 1, dtype=torch.int32)
    y = dispatch.quantised_experts(
        x, *both, None, None, torch.ones(3, 1), experts, activation="silu"
    )
    gate_up, down = (dispatch.quantised_rows(planes, None, torch.float32) for planes in both)
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    torch.testing.assert_close(y, F.linear(F.silu(gate) * up, down))
