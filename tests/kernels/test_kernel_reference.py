"""The plain-torch twins against PyTorch's SDPA and Hugging Face's modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from kernel_cases import PADDING, AttentionCase, make_case, make_metadata
from quantised_cases import KINDS, CodeKind, random_codes
from transformers.activations import ACT2FN
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

from engine.errors import ConfigError
from engine.kernels import fused_reference, quantised_reference, reference
from engine.kernels.moe_reference import Routing
from engine.kernels.quantised_layout import NormOfRows
from engine.layers.quantised_packing import pack_codes


def sdpa(case: AttentionCase, row: int, sliding_window: int | None) -> torch.Tensor:
    """One sequence's attention by F.scaled_dot_product_attention, [query_len, Hq * D]."""
    metadata = case.metadata
    start, end = metadata.query_start_loc[row : row + 2].tolist()
    seq_len = int(metadata.seq_lens[row])
    assert metadata.block_table_host is not None
    blocks = metadata.block_table_host[row]
    k, v = (
        cache[blocks].flatten(0, 1)[:seq_len].transpose(0, 1) for cache in case.arguments()[1:3]
    )
    visible = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    if sliding_window:
        visible = visible.triu(1 - sliding_window)
    mixed = F.scaled_dot_product_attention(
        case.q[start:end].transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=visible[seq_len - (end - start) :],
        scale=case.softmax_scale,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("sliding_window", [None, 5, 16, 17])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_attention_equals_sdpa_in_float64(num_kv_heads: int, sliding_window: int | None) -> None:
    case = make_case(
        [(0, 1), (15, 1), (16, 1), (40, 1), (0, 15), (0, 16), (3, 17), (32, 33)],
        dtype=torch.float64,
        num_q_heads=6,
        num_kv_heads=num_kv_heads,
        head_dim=24,
        block_size=16,
    )
    got = reference.paged_attention(
        *case.arguments(), softmax_scale=case.softmax_scale, sliding_window=sliding_window
    )
    want = torch.cat([sdpa(case, row, sliding_window) for row in range(case.metadata.num_seqs)])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_softcap_bounds_the_scores() -> None:
    case = make_case([(0, 9)], dtype=torch.float64, num_q_heads=2, num_kv_heads=2, head_dim=16)
    assert case.metadata.block_table_host is not None
    k = case.k_cache[case.metadata.block_table_host[0]].flatten(0, 1)[:9]
    v = case.v_cache[case.metadata.block_table_host[0]].flatten(0, 1)[:9]
    # Hugging Face's eager attention of Gemma 2, spelled out.
    scores = torch.einsum("qhd,khd->hqk", case.q, k) * 2.0
    scores = 3.0 * torch.tanh(scores / 3.0)
    scores = scores + torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    got = reference.paged_attention(*case.arguments(), softmax_scale=2.0, logit_softcap=3.0)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas_and_gemmas_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 48).to(dtype) * 3, torch.randn(48).to(dtype)
    llama, gemma = LlamaRMSNorm(48, eps=1e-5).to(dtype), GemmaRMSNorm(48, eps=1e-5).to(dtype)
    llama.weight.data.copy_(weight)
    gemma.weight.data.copy_(weight)
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), llama(x))
    assert torch.equal(reference.rms_norm(x, weight, 1e-5, weight_offset=1.0), gemma(x))


def test_add_rms_norm_updates_the_residual_in_place() -> None:
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    want = x + residual
    normed, returned = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert returned is residual
    torch.testing.assert_close(residual, want)
    torch.testing.assert_close(normed, F.rms_norm(want, (32,), weight, 1e-6))


@pytest.mark.parametrize(
    ("activation", "hugging_face_name"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")],
)
def test_activations_are_hugging_faces(activation: str, hugging_face_name: str) -> None:
    gate_up = torch.randn(6, 20, dtype=torch.float64)
    want = ACT2FN[hugging_face_name](gate_up[:, :10]) * gate_up[:, 10:]
    torch.testing.assert_close(reference.act_mul(gate_up, activation), want)


def test_unknown_activation_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="'relu' must be one of silu, gelu, gelu_tanh"):
        reference.act_mul(torch.randn(2, 4), "relu")


def test_rope_is_hugging_faces_and_fills_the_slots() -> None:
    num_q_heads, num_kv_heads, head_dim, block_size = 4, 2, 16, 16
    metadata = make_metadata([(20, 1), (0, 19)], block_size, [[4, 1], [3, 0]])
    metadata.slot_mapping[2] = -1
    num_tokens = 20
    qkv = torch.randn(num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=torch.float64)
    angles = torch.outer(torch.arange(32.0), 10000 ** -(torch.arange(8.0) / 8)).double()
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1)
    caches = [torch.full((5, block_size, num_kv_heads, head_dim), 7.0).double() for _ in "kv"]
    q = reference.rope_write_kv(
        qkv,
        metadata,
        cos_sin,
        *caches,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    raw_q, raw_k, raw_v = qkv.view(num_tokens, -1, head_dim).split([4, 2, 2], dim=1)
    cos, sin = (torch.cat((x, x), -1)[metadata.positions][None] for x in cos_sin.unbind(1))
    want_q, want_k = apply_rotary_pos_emb(
        raw_q.transpose(0, 1)[None], raw_k.transpose(0, 1)[None], cos, sin
    )
    torch.testing.assert_close(q, want_q[0].transpose(0, 1))
    slots = metadata.slot_mapping
    kept = slots >= 0
    for cache, want in zip(caches, (want_k[0].transpose(0, 1), raw_v), strict=True):
        rows = cache.flatten(0, 1)
        torch.testing.assert_close(rows[slots[kept]], want[kept])
        untouched = torch.ones(rows.shape[0], dtype=torch.bool)
        untouched[slots[kept]] = False
        assert (rows[untouched] == 7.0).all()


def test_partial_rope_passes_the_rest_through() -> None:
    metadata = make_metadata([(0, 6)], 16, [[0]])
    qkv = torch.randn(6, 3 * 16, dtype=torch.float64)
    angles = torch.rand(8, 3).double()
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1)
    caches = [torch.zeros(1, 16, 1, 16).double() for _ in "kv"]
    arguments = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 16}
    q = reference.rope_write_kv(qkv, metadata, cos_sin, *caches, **arguments)
    raw = qkv.view(6, 3, 16)[:, 0]
    assert torch.equal(q[:, 0, 6:], raw[:, 6:])
    pairs = torch.complex(raw[:, :3], raw[:, 3:6]) * torch.complex(*cos_sin[:6].unbind(1))
    torch.testing.assert_close(q[:, 0, :6], torch.cat((pairs.real, pairs.imag), -1))
    unrotated = reference.rope_write_kv(qkv, metadata, None, *caches, **arguments)
    assert torch.equal(unrotated[:, 0], raw)


def test_linear() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    torch.testing.assert_close(
        reference.batch_invariant_linear(x, weight, bias), F.linear(x, weight, bias)
    )


def test_products_of_few_rows_are_what_they_replace() -> None:
    """Embedding, norm, products and activation of a small feed-forward half, in float64."""
    embedding, norm_weight = torch.randn(11, 8).double(), torch.randn(8).double()
    up, down, bias = (
        torch.randn(12, 8).double(),
        torch.randn(8, 6).double(),
        torch.randn(8).double(),
    )
    ids, scale = torch.tensor([3, 10, 3]), torch.tensor(2.5).double()
    hidden, squares = reference.embed_rows(ids, embedding, scale)
    assert torch.equal(hidden, F.embedding(ids, embedding) * scale)
    x = F.rms_norm(hidden, (8,), norm_weight, 1e-5)
    close = {"rtol": 1e-6, "atol": 1e-6}  # `squares` are float32
    for activation, want in ((None, x @ up.T), ("silu", F.silu(x @ up[:6].T) * (x @ up[6:].T))):
        got = reference.normed_linear(
            hidden, squares, norm_weight, up, eps=1e-5, activation=activation
        )
        torch.testing.assert_close(got, want, **close)
    want = hidden + F.linear(got, down, bias)
    squares = reference.add_linear(got, down, hidden, bias)
    torch.testing.assert_close(hidden, want)
    torch.testing.assert_close(squares[:, 0].double(), want.pow(2).sum(-1), **close)
    torch.testing.assert_close(reference.few_row_linear(x, up), F.linear(x, up))
    metadata = make_metadata([(3, 1), PADDING, (5, 1)], 16, [[0], [], [1]])
    caches = [torch.zeros(2, 16, 1, 4).double() for _ in range(4)]
    sizes = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 4}
    cos_sin = torch.randn(8, 2, 2)
    normed = (squares, norm_weight, up)
    q = reference.normed_qkv(
        hidden, *normed, None, metadata, cos_sin, *caches[:2], **sizes, eps=1e-5
    )
    qkv = reference.normed_linear(hidden, *normed, eps=1e-5)
    want = reference.rope_write_kv(qkv, metadata, cos_sin, *caches[2:], **sizes)
    assert torch.equal(q, want)
    assert torch.equal(caches[0], caches[2])
    assert caches[1].count_nonzero() == 2 * 4


def test_fused_products_are_what_they_replace() -> None:
    """A weighed row divided by its root mean square is the row's norm, in float64."""
    embedding, norm_weight = torch.randn(11, 8).double(), torch.randn(8).double()
    up, down = torch.randn(12, 8).double(), torch.randn(8, 6).double()
    bias, next_weight = torch.randn(8).double(), torch.randn(8).double()
    ids, scale = torch.tensor([3, 10, 3]), torch.tensor(2.5).double()
    close = {"rtol": 1e-6, "atol": 1e-6}  # `squares` are float32
    hidden, x, squares = fused_reference.embed_weighed(ids, embedding, norm_weight, scale)
    assert torch.equal(hidden, F.embedding(ids, embedding) * scale)
    normed = F.rms_norm(hidden, (8,), norm_weight, 1e-5)
    got = fused_reference.scaled_linear(x, squares, up, eps=1e-5)
    torch.testing.assert_close(got, normed @ up.T, **close)
    assert torch.equal(fused_reference.scaled_linear(x, None, up, eps=1e-5), x @ up.T)
    got = fused_reference.scaled_linear(x, squares, up, eps=1e-5, activation="silu")
    want = F.silu(normed @ up[:6].T) * (normed @ up[6:].T)
    torch.testing.assert_close(got, want, **close)

    want = hidden + F.linear(got, down, bias)
    x, squares = fused_reference.add_weighed_linear(
        got, down, hidden, next_weight, bias, weight_offset=1.0
    )
    torch.testing.assert_close(hidden, want)
    normed = F.rms_norm(hidden, (8,), next_weight + 1.0, 1e-5)
    metadata = make_metadata([(3, 1), PADDING, (5, 1)], 16, [[0], [], [1]])
    caches = [torch.zeros(2, 16, 1, 4).double() for _ in range(4)]
    heads = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 4}
    head_norms = {"q_norm_weight": next_weight[:4], "k_norm_weight": next_weight[4:]}
    cos_sin = torch.randn(8, 2, 2)
    q = fused_reference.scaled_qkv(
        x, squares, up, None, metadata, cos_sin, *caches[:2], **heads, eps=1e-5, **head_norms
    )
    want = reference.rope_write_kv(
        normed @ up.T, metadata, cos_sin, *caches[2:], **heads, **head_norms
    )
    torch.testing.assert_close(q, want, **close)
    torch.testing.assert_close(caches[:2], caches[2:], **close)
    assert caches[0].count_nonzero() == 2 * 4


def test_sinks_are_gpt_oss_s() -> None:
    case = make_case([(0, 9)], dtype=torch.float64, num_q_heads=4, num_kv_heads=2, head_dim=16)
    assert case.metadata.block_table_host is not None
    k, v = (
        cache[case.metadata.block_table_host[0]].flatten(0, 1)[:9].transpose(0, 1)[None]
        for cache in case.arguments()[1:3]
    )
    sinks = torch.randn(4, dtype=torch.float64)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    queries = case.q.transpose(0, 1)[None]
    want, _ = eager_attention_forward(module, queries, k, v, mask, scaling=0.3)
    got = reference.paged_attention(*case.arguments(), softmax_scale=0.3, sinks=sinks)
    torch.testing.assert_close(got, want[0].flatten(1), atol=1e-12, rtol=1e-12)


def test_chunks_hide_what_was_before_them() -> None:
    """A query within the second chunk sees what it would see if the sequence began there."""
    case = make_case([(0, 100)], dtype=torch.float64, num_q_heads=2, num_kv_heads=1, head_dim=16)
    got = reference.paged_attention(*case.arguments(), softmax_scale=0.3, chunk_size=64)
    assert case.metadata.block_table_host is not None
    k, v = (
        cache[case.metadata.block_table_host[0]].flatten(0, 1)[:100].transpose(0, 1)[None]
        for cache in case.arguments()[1:3]
    )
    q = case.q.transpose(0, 1)[None]
    for chunk in (slice(0, 64), slice(64, 100)):
        want = F.scaled_dot_product_attention(
            q[:, :, chunk],
            k[:, :, chunk],
            v[:, :, chunk],
            scale=0.3,
            is_causal=True,
            enable_gqa=True,
        )
        torch.testing.assert_close(got[chunk], want[0].transpose(0, 1).flatten(1))


def test_moe_route_is_mixtrals_and_deepseeks() -> None:
    mixtral = MixtralTopKRouter(
        transformers.MixtralConfig(hidden_size=12, num_local_experts=6, num_experts_per_tok=3)
    )
    mixtral.weight.data.normal_()
    x = torch.randn(9, 12)
    logits, want_weights, want_experts = mixtral(x)
    weights, experts = reference.moe_route(logits, None, Routing(num_chosen=3))
    assert torch.equal(experts.long(), want_experts)
    torch.testing.assert_close(weights, want_weights)

    config = transformers.DeepseekV3Config(
        hidden_size=12,
        n_routed_experts=12,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    deepseek = DeepseekV3TopkRouter(config)
    deepseek.weight.data.normal_()
    deepseek.e_score_correction_bias.data.normal_()
    logits, want_weights, want_experts = deepseek(x)
    routing = Routing(
        num_chosen=4,
        scoring="sigmoid",
        scale=2.5,
        num_groups=4,
        num_chosen_groups=2,
        group_score="top2",
    )
    weights, experts = reference.moe_route(logits, deepseek.e_score_correction_bias, routing)
    by_number, want_by_number = (
        torch.zeros(9, 12).scatter(1, chosen.long(), weight.detach())
        for chosen, weight in ((experts, weights), (want_experts, want_weights))
    )
    torch.testing.assert_close(by_number, want_by_number)


def test_moe_experts_are_mixtrals_and_gpt_oss_s() -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_local_experts": 5}
    x, weights = torch.randn(9, 12), torch.rand(9, 2)
    experts = torch.rand(9, 5).topk(2).indices.to(torch.int32)
    mixtral = MixtralExperts(transformers.MixtralConfig(**sizes)).requires_grad_(False)
    mixtral.gate_up_proj.data.normal_()
    mixtral.down_proj.data.normal_()
    got = reference.moe_experts(
        x, mixtral.gate_up_proj, mixtral.down_proj, None, None, weights, experts, activation="silu"
    )
    torch.testing.assert_close(got, mixtral(x, experts.long(), weights), atol=1e-4, rtol=1e-4)

    oss = GptOssExperts(transformers.GptOssConfig(**sizes, swiglu_limit=1.1)).requires_grad_(False)
    for parameter in oss.parameters():
        parameter.data.normal_()
    gate_up, bias = (
        torch.cat((t[..., ::2], t[..., 1::2]), dim=-1)
        for t in (oss.gate_up_proj, oss.gate_up_proj_bias)
    )
    got = reference.moe_experts(
        x,
        gate_up.transpose(1, 2),
        oss.down_proj.transpose(1, 2),
        bias,
        oss.down_proj_bias,
        weights,
        experts,
        activation="clamped_swiglu",
        swiglu_limit=1.1,
        swiglu_alpha=1.702,
    )
    torch.testing.assert_close(got, oss(x, experts.long(), weights), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_quantised_rows_are_the_codes_numbers(kind: CodeKind) -> None:
    codes = random_codes(kind, 24, 384)
    planes = pack_codes(codes)
    want = codes.expand()
    if codes.columns is not None:
        want = want[:, codes.columns]
    got = quantised_reference.quantised_rows(planes, None, torch.float32)
    # Scales and minima, of at most 2^bits scales, are rounded to float16.
    largest = float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=largest * 2.0**-10)
    rows = torch.tensor([5, 23, 5])
    assert torch.equal(quantised_reference.quantised_rows(planes, rows, torch.float32), got[rows])


def test_quantised_linear_is_the_product_with_the_expanded_weight() -> None:
    codes = random_codes(KINDS[3], 24, 256)  # its columns are in another order
    planes = pack_codes(codes)
    x, bias = torch.randn(5, 256), torch.randn(24)
    got = quantised_reference.quantised_linear(x, planes, bias)
    # Scales' rounding, 2^-12, is shared by 128 columns of weights up to 16 scales large.
    torch.testing.assert_close(got, F.linear(x, codes.expand(), bias), rtol=0, atol=1e-2)
    out = torch.empty(5, 24)
    assert quantised_reference.quantised_linear(x, planes, bias, out) is out
    gated = quantised_reference.quantised_linear(x, planes, bias, activation="silu")
    assert torch.equal(gated, reference.act_mul(got, "silu"))
    norm = NormOfRows(torch.randn(256), 1e-5, 1.0)
    normed = quantised_reference.quantised_linear(x, planes, bias, norm=norm)
    want = reference.rms_norm(x, norm.weight, norm.eps, norm.offset)
    assert torch.equal(normed, quantised_reference.quantised_linear(want, planes, bias))
    added = torch.ones(5, 24)
    quantised_reference.quantised_linear(x, planes, bias, added, adds=True)
    assert torch.equal(added, got + 1.0)
    assert torch.equal(out, got)


def test_quantised_experts_are_those_of_the_expanded_weights() -> None:
    gate_up, down = (
        pack_codes(random_codes(KINDS[0], rows, columns))
        for rows, columns in ((192, 64), (192, 32))
    )
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    experts = torch.randint(0, 3, (5, 2), dtype=torch.int32)
    got = quantised_reference.quantised_experts(
        x, gate_up, down, None, None, weights, experts, activation="silu"
    )
    plain = (quantised_reference.quantised_rows(w, None, torch.float32) for w in (gate_up, down))
    gates_and_ups, downs = (w.view(3, -1, w.shape[1]) for w in plain)
    want = torch.zeros(5, 64)
    for token, choice in ((t, c) for t in range(5) for c in range(2)):
        expert = int(experts[token, choice])
        gate, up = (gates_and_ups[expert] @ x[token]).chunk(2)
        y = downs[expert] @ (F.silu(gate) * up)
        want[token] += weights[token, choice] * y
    torch.testing.assert_close(got, want)
