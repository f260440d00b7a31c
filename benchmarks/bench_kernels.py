"""Times the kernels: time, bandwidth or arithmetic, share of the H100's peak, and torch's own way.

`python benchmarks/bench_kernels.py` prints one table, on the GPU inside CUDA graphs as the engine
runs them, else of the CPU path; rows also go to bench-results/kernels.jsonl. `--sweep` tries other
tiles for decode and prefill (GPU), `--quantised` times products with weights of codes. Keys and
values of a row rotate over enough copies to leave no part of them in the L2 cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from environment import print_table, write_rows
from quantised_products import FORMATS, quantised_expert_rows, quantised_rows
from quantised_products import ROWS as QUANTISED_ROWS

from engine.kernels import dispatch
from engine.kernels.kv_cache import (
    QuantisedCache,
    bytes_of_head,
    is_heads_first,
    make_cache,
    quantise,
)
from engine.kernels.metadata import AttentionMetadata, SharedPrefixes
from engine.kernels.moe_reference import Routing

PEAK_GB_PER_S = 3000.0  # measured copy bandwidth of an H100 SXM; its data sheet says 3350
PEAK_TFLOP_PER_S = 700.0  # bf16 as cuBLAS reaches it; 989 on the data sheet
COLD_BYTES = 200e6  # four times the L2 cache
CALLS = 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model's layer."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def heads(self) -> dict[str, int]:
        """The head counts as the ops take them."""
        return {
            "num_q_heads": self.num_q_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }


SHAPES = (
    Shape("135M", 576, 1536, 9, 3, 64),
    Shape("0.6B", 1024, 3072, 16, 8, 128),
    Shape("8B", 4096, 14336, 32, 8, 128),
)


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """Sizes of a layer's experts."""

    name: str
    hidden_size: int
    width: int
    num_experts: int
    num_chosen: int


EXPERT_SHAPES = (
    ExpertShape("Qwen3-30B", 2048, 768, 128, 8),
    ExpertShape("Mixtral-8x7B", 4096, 14336, 8, 2),
)
SMALL_EXPERTS = ExpertShape("small", 512, 256, 16, 4)
DECODES = ((1, 32768), (32, 600), (256, 800), (512, 100))
PREFILLS = {
    "16k": [(0, 16384)],
    "second chunk": [(8192, 7808)],
    "64 x 128": [(0, 128)] * 64,
    "suffixes 64 x 64 after 4096": [(4096, 64)] * 64,
}
CPU_DECODES = ((1, 256), (8, 256), (64, 256), (1, 2048), (8, 2048))


@dataclasses.dataclass
class Row:
    """One measurement. `op` is a name in `dispatch.PUBLIC_OPS`."""

    op: str
    case: str
    run: Callable[[int], Any]
    copies: int = 1
    num_bytes: float = 0.0
    flops: float = 0.0
    baseline: Callable[[int], Any] | None = None


def metadata_of(
    seqs: list[tuple[int, int]], block_size: int, device: torch.device
) -> AttentionMetadata:
    """(computed, new) tokens of each sequence over shuffled blocks, decodes first."""
    counts = [-(-(computed + new) // block_size) for computed, new in seqs]
    order = torch.randperm(sum(counts), dtype=torch.int32)
    table = torch.zeros(len(seqs), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts)):
        table[row, : len(blocks)] = blocks
    seq_lens = torch.tensor([computed + new for computed, new in seqs], dtype=torch.int32)
    query_lens = torch.tensor([new for _, new in seqs], dtype=torch.int32)
    positions = torch.cat([torch.arange(computed, computed + new) for computed, new in seqs])
    owners = torch.repeat_interleave(torch.arange(len(seqs)), query_lens)
    slots = table[owners, positions // block_size].long() * block_size + positions % block_size
    starts = torch.zeros(len(seqs) + 1, dtype=torch.int32)
    starts[1:] = query_lens.cumsum(0)
    return AttentionMetadata(
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        block_table=table.to(device),
        seq_lens=seq_lens.to(device),
        query_lens=query_lens.to(device),
        query_start_loc=starts.to(device),
        num_decodes=int((query_lens == 1).sum()),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        query_lens_host=query_lens.tolist(),
    )


def attention_inputs(
    shape: Shape, metadata: AttentionMetadata, block_size: int, dtype: torch.dtype, cold: float
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """q, and enough pairs of caches that together exceed `cold` bytes."""
    device = metadata.positions.device
    num_blocks = int(metadata.block_table.max()) + 1
    size = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
    cache_bytes = 2 * torch.Size(size).numel() * dtype.itemsize
    caches = [
        (random_cache(size, dtype, device), random_cache(size, dtype, device))
        for _ in range(min(8, max(1, round(cold / cache_bytes))))
    ]
    q = torch.randn(
        len(metadata.positions), shape.num_q_heads, shape.head_dim, device=device, dtype=dtype
    )
    return q, caches


def random_cache(
    size: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A plain cache as an engine's on that device."""
    cache = make_cache(size, dtype, device)
    assert isinstance(cache, torch.Tensor)
    return cache.normal_()


def attention_row(
    shape: Shape,
    seqs: list[tuple[int, int]],
    case: str,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int = 64,
    run: Callable[..., Any] | None = None,
) -> Row:
    metadata = metadata_of(seqs, block_size, device)
    cold = COLD_BYTES if device.type == "cuda" else 0.0
    q, caches = attention_inputs(shape, metadata, block_size, dtype, cold)
    scale = shape.head_dim**-0.5
    op = run or dispatch.paged_attention

    def ours(call: int) -> None:
        if call == 0:
            dispatch.begin_step(metadata)
        k_cache, v_cache = caches[call % len(caches)]
        op(q, k_cache, v_cache, metadata, softmax_scale=scale)

    (computed, new), num_seqs = seqs[0], len(seqs)
    seq_len = computed + new
    dense = (num_seqs, seq_len, shape.num_kv_heads, shape.head_dim)
    num_dense = torch.Size(dense).numel()

    def sdpa(call: int) -> None:
        # The same bytes as dense tensors: what torch does when no blocks are in its way.
        k, v = (
            (cache.transpose(1, 2) if is_heads_first(cache) else cache)
            .reshape(-1)[:num_dense]
            .view(dense)
            .transpose(1, 2)
            for cache in caches[call % len(caches)]
        )
        queries = q.view(num_seqs, new, shape.num_q_heads, shape.head_dim).transpose(1, 2)
        if new == 1:
            # The heads of a group as rows of one matrix: several times faster than enable_gqa.
            queries = queries.view(num_seqs, shape.num_kv_heads, -1, shape.head_dim)
        F.scaled_dot_product_attention(
            queries, k, v, scale=scale, is_causal=new > 1, enable_gqa=new > 1
        )

    return Row(
        op="paged_attention",
        case=f"{shape.name} {case}",
        run=ours,
        copies=len(caches),
        num_bytes=sum(a + b for a, b in seqs) * 2 * num_dense / num_seqs / seq_len * dtype.itemsize
        if new == 1
        else 0.0,
        flops=sum(4 * n * (c + n / 2) for c, n in seqs) * shape.num_q_heads * shape.head_dim
        if new > 1
        else 0.0,
        baseline=sdpa if computed == 0 or new == 1 else None,
    )


def shared_prefix_row(
    shape: Shape,
    num_seqs: int,
    num_blocks: int,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int = 64,
) -> Row:
    """Decodes of two blocks each behind a common prefix; the baseline reads it for each of them."""
    length = (num_blocks + 2) * block_size
    metadata = metadata_of([(length - 1, 1)] * num_seqs, block_size, device)
    metadata.block_table[:, :num_blocks] = metadata.block_table[0, :num_blocks]
    prefix_len = num_blocks * block_size

    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    shared = SharedPrefixes(
        members=integers(*range(num_seqs)),
        member_start=integers(0, *[num_seqs] * 16),
        group_lens=integers(prefix_len, *[0] * 15),
        prefix_lens=integers(*[prefix_len] * num_seqs),
    )
    grouped = dataclasses.replace(metadata, shared_prefixes=shared)
    q, caches = attention_inputs(shape, metadata, block_size, dtype, COLD_BYTES)
    scale = shape.head_dim**-0.5

    def runner(layout: AttentionMetadata) -> Callable[[int], None]:
        def run(call: int) -> None:
            if call == 0:
                dispatch.begin_step(layout)
            dispatch.paged_attention(q, *caches[call % len(caches)], layout, softmax_scale=scale)

        return run

    num_keys = prefix_len + num_seqs * (length - prefix_len)
    return Row(
        op="paged_attention",
        case=f"{shape.name} decode B={num_seqs} over one prefix of {prefix_len}",
        run=runner(grouped),
        copies=len(caches),
        num_bytes=num_keys * 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize,
        baseline=runner(metadata),
    )


def in_order_of(cache: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values`, in memory as `cache` is."""
    if is_heads_first(cache):
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    return values.contiguous()


def eight_bit_row(
    shape: Shape,
    seqs: list[tuple[int, int]],
    stored: torch.dtype,
    case: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Row:
    """Attention over a cache of 8 bits; the baseline reads a plain one."""
    metadata = metadata_of(seqs, 64, device)
    cold = COLD_BYTES if device.type == "cuda" else 0.0
    plain = attention_row(shape, seqs, case, device, dtype)
    q, caches = attention_inputs(shape, metadata, 64, dtype, 2 * cold)
    # Blocks by themselves: in float32, as they are rounded, all would take twice the memory.
    pairs = [
        tuple(
            QuantisedCache(
                in_order_of(cache, torch.cat(values)),
                torch.cat(scales).transpose(1, 2).contiguous(),
            )
            for cache, (values, scales) in (
                (cache, zip(*(quantise(part, stored) for part in cache.split(1024)), strict=True))
                for cache in pair
            )
        )
        for pair in caches
    ]
    bytes_per_token = 2 * shape.num_kv_heads * bytes_of_head(shape.head_dim, stored)
    is_decode = seqs[0][1] == 1

    def run(call: int) -> None:
        if call == 0:
            dispatch.begin_step(metadata)
        k_cache, v_cache = pairs[call % len(pairs)]
        dispatch.paged_attention(q, k_cache, v_cache, metadata, softmax_scale=shape.head_dim**-0.5)

    return Row(
        op="paged_attention",
        case=f"{shape.name} {case} {str(stored).removeprefix('torch.')}",
        run=run,
        copies=len(pairs),
        num_bytes=sum(map(sum, seqs)) * bytes_per_token if is_decode else 0.0,
        flops=plain.flops,
        baseline=plain.run,
    )


def layer_rows(
    shape: Shape, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """Everything of a layer but attention and cuBLAS."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    case = f"{shape.name} T={num_tokens}"
    x, residual, weight = random(num_tokens, hidden), random(num_tokens, hidden), random(hidden)
    gate_up = random(num_tokens, 2 * inner)
    linear_weight = random(inner, hidden)
    metadata = metadata_of([(300, 1)] * num_tokens, 64, device)
    width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
    qkv = random(num_tokens, width)
    cos_sin = torch.randn(512, 2, shape.head_dim // 2, device=device)
    _, [(k_cache, v_cache)] = attention_inputs(shape, metadata, 64, dtype, 0.0)
    row_bytes = num_tokens * hidden * dtype.itemsize
    rope = (qkv, metadata, cos_sin, k_cache, v_cache)
    return [
        Row(
            "rms_norm",
            case,
            lambda _: dispatch.rms_norm(x, weight, 1e-5),
            num_bytes=2 * row_bytes,
            baseline=lambda _: F.rms_norm(x, (hidden,), weight, 1e-5),
        ),
        Row(
            "add_rms_norm",
            case,
            lambda _: dispatch.add_rms_norm(x, residual, weight, 1e-5),
            num_bytes=4 * row_bytes,
            baseline=lambda _: F.rms_norm(residual.add_(x), (hidden,), weight, 1e-5),
        ),
        Row(
            "act_mul",
            case,
            lambda _: dispatch.act_mul(gate_up, "silu"),
            num_bytes=3 * num_tokens * inner * dtype.itemsize,
            baseline=lambda _: F.silu(gate_up[:, :inner]) * gate_up[:, inner:],
        ),
        Row(
            "rope_write_kv",
            case,
            lambda _: dispatch.rope_write_kv(*rope, **shape.heads),
            num_bytes=2 * num_tokens * width * dtype.itemsize,
        ),
        Row(
            "batch_invariant_linear",
            f"{case} {hidden}->{inner}",
            lambda _: dispatch.batch_invariant_linear(x, linear_weight),
            flops=2 * num_tokens * hidden * inner,
            baseline=lambda _: F.linear(x, linear_weight),
        ),
    ]


def few_row_rows(
    shape: Shape, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """A layer's products for few rows, beside the kernels that they replace."""
    hidden_size, inner = shape.hidden_size, shape.intermediate_size
    width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
    mixed_size = shape.num_q_heads * shape.head_dim
    num_vocabulary = 4096
    case = f"{shape.name} T={num_tokens}"
    hidden = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype)
    squares = hidden.float().pow(2).sum(-1, keepdim=True)
    norm_weight = torch.randn(hidden_size, device=device, dtype=dtype)
    ids = torch.arange(num_tokens, device=device)
    metadata = metadata_of([(255, 1)] * num_tokens, 64, device)
    cos_sin = torch.randn(512, 2, shape.head_dim // 2, device=device)
    _, [kv_cache] = attention_inputs(shape, metadata, 64, dtype, 0.0)

    def weights(rows: int, cols: int) -> list[torch.Tensor]:
        """Enough copies of a weight that none is found in the cache."""
        cold = COLD_BYTES if device.type == "cuda" else 0.0
        copies = min(64, max(1, round(cold / (rows * cols * dtype.itemsize))))
        return [torch.randn(rows, cols, device=device, dtype=dtype) * 0.02 for _ in range(copies)]

    def row(
        op: str,
        name: str,
        copies: list[torch.Tensor],
        run: Callable[[torch.Tensor], Any],
        baseline: Callable[[torch.Tensor], Any],
    ) -> Row:
        return Row(
            op,
            f"{case} {name}",
            lambda call: run(copies[call % len(copies)]),
            copies=len(copies),
            num_bytes=copies[0].numel() * dtype.itemsize,
            baseline=lambda call: baseline(copies[call % len(copies)]),
        )

    def adding(name: str, cols: int) -> Row:
        x = torch.randn(num_tokens, cols, device=device, dtype=dtype)
        return row(
            "add_linear",
            name,
            weights(hidden_size, cols),
            lambda w: dispatch.add_linear(x, w, hidden),
            lambda w: dispatch.add_rms_norm(F.linear(x, w), hidden, norm_weight, 1e-5),
        )

    def normed(name: str, rows: int, activation: str | None) -> Row:
        def plain(w: torch.Tensor) -> torch.Tensor:
            y = F.linear(hidden, w)
            return y if activation is None else dispatch.act_mul(y, activation)

        return row(
            "normed_linear",
            name,
            weights(rows, hidden_size),
            lambda w: dispatch.normed_linear(
                hidden, squares, norm_weight, w, eps=1e-5, activation=activation
            ),
            plain,
        )

    def qkv(w: torch.Tensor) -> torch.Tensor:
        rope = (dispatch.rms_norm(hidden, norm_weight, 1e-5) @ w.T, metadata, cos_sin, *kv_cache)
        return dispatch.rope_write_kv(*rope, **shape.heads)

    return [
        row(
            "normed_qkv",
            "",
            weights(width, hidden_size),
            lambda w: dispatch.normed_qkv(
                hidden,
                squares,
                norm_weight,
                w,
                None,
                metadata,
                cos_sin,
                *kv_cache,
                **shape.heads,
                eps=1e-5,
            ),
            qkv,
        ),
        row(
            "embed_rows",
            "",
            weights(num_vocabulary, hidden_size)[:1],
            lambda w: dispatch.embed_rows(ids, w),
            lambda w: dispatch.rms_norm(F.embedding(ids, w), norm_weight, 1e-5),
        ),
        normed("qkv", width, None),
        adding("o", mixed_size),
        normed("gate_up", 2 * inner, "silu"),
        adding("down", inner),
        row(
            "few_row_linear",
            f"{hidden_size}->{num_vocabulary}",
            weights(num_vocabulary, hidden_size),
            lambda w: dispatch.few_row_linear(hidden, w),
            lambda w: F.linear(hidden, w),
        ),
    ]


def fused_rows(
    shape: Shape, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """A layer's fused products for a batch of decoding rows, beside what they replace."""
    hidden_size, inner = shape.hidden_size, shape.intermediate_size
    mixed_size = shape.num_q_heads * shape.head_dim
    width = mixed_size + 2 * shape.num_kv_heads * shape.head_dim
    x, hidden = (torch.randn(num_tokens, hidden_size, device=device, dtype=dtype) for _ in range(2))
    squares = hidden.float().pow(2).sum(-1, keepdim=True)
    norm_weight = torch.randn(hidden_size, device=device, dtype=dtype)
    ids = torch.arange(num_tokens, device=device)
    metadata = metadata_of([(255, 1)] * num_tokens, 64, device)
    cos_sin = torch.randn(512, 2, shape.head_dim // 2, device=device)
    _, [kv_cache] = attention_inputs(shape, metadata, 64, dtype, 0.0)
    heads = shape.heads

    def row(
        op: str,
        name: str,
        size: tuple[int, int],
        run: Callable[[torch.Tensor], Any],
        baseline: Callable[[torch.Tensor], Any],
    ) -> Row:
        cold = COLD_BYTES if device.type == "cuda" else 0.0
        copies = min(64, max(1, round(cold / (size[0] * size[1] * dtype.itemsize))))
        weights = [torch.randn(*size, device=device, dtype=dtype) * 0.02 for _ in range(copies)]
        return Row(
            op,
            f"{shape.name} T={num_tokens} {name}",
            lambda call: run(weights[call % copies]),
            copies=copies,
            num_bytes=weights[0].numel() * dtype.itemsize,
            baseline=lambda call: baseline(weights[call % copies]),
        )

    def adding(name: str, cols: int) -> Row:
        y = torch.randn(num_tokens, cols, device=device, dtype=dtype)
        return row(
            "add_weighed_linear",
            name,
            (hidden_size, cols),
            lambda w: dispatch.add_weighed_linear(y, w, hidden, norm_weight),
            lambda w: dispatch.add_rms_norm(F.linear(y, w), hidden, norm_weight, 1e-5),
        )

    return [
        row(
            "embed_weighed",
            "",
            (4096, hidden_size),
            lambda w: dispatch.embed_weighed(ids, w, norm_weight),
            lambda w: dispatch.rms_norm(F.embedding(ids, w), norm_weight, 1e-5),
        ),
        row(
            "scaled_qkv",
            "",
            (width, hidden_size),
            lambda w: dispatch.scaled_qkv(
                x, squares, w, None, metadata, cos_sin, *kv_cache, **heads, eps=1e-5
            ),
            lambda w: dispatch.rope_write_kv(x @ w.T, metadata, cos_sin, *kv_cache, **heads),
        ),
        adding("o", mixed_size),
        row(
            "scaled_linear",
            "gate_up",
            (2 * inner, hidden_size),
            lambda w: dispatch.scaled_linear(x, squares, w, eps=1e-5, activation="silu"),
            lambda w: dispatch.act_mul(F.linear(x, w), "silu"),
        ),
        adding("down", inner),
    ]


def prompt_row(shape: Shape, num_tokens: int, device: torch.device, dtype: torch.dtype) -> Row:
    """gate_up of prompts with its activation in one launch, beside the library's product."""
    size = (2 * shape.intermediate_size, shape.hidden_size)
    x = torch.randn(num_tokens, shape.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(*size, device=device, dtype=dtype) * 0.02
    return Row(
        "scaled_linear",
        f"{shape.name} T={num_tokens} gate_up of prompts",
        lambda _: dispatch.scaled_linear(x, None, weight, eps=0.0, activation="silu"),
        flops=2.0 * num_tokens * weight.numel(),
        baseline=lambda _: dispatch.act_mul(F.linear(x, weight), "silu"),
    )


def expert_rows(
    shape: ExpertShape, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """A layer's experts: decode reads the weights of those that are chosen, prefill multiplies."""
    hidden, width, num_experts = shape.hidden_size, shape.width, shape.num_experts
    x = torch.randn(num_tokens, hidden, device=device, dtype=dtype)
    gate_up = torch.randn(num_experts, 2 * width, hidden, device=device, dtype=dtype) * 0.02
    down = torch.randn(num_experts, hidden, width, device=device, dtype=dtype) * 0.02
    logits = torch.randn(num_tokens, num_experts, device=device)
    routing = Routing(num_chosen=shape.num_chosen)
    weights, experts = dispatch.moe_route(logits, None, routing)
    num_used = len(experts.unique())
    case = f"{shape.name} T={num_tokens}"
    flops = 6 * num_tokens * shape.num_chosen * hidden * width

    def one_dense_layer(_: int) -> torch.Tensor:
        # The same multiplications as two dense products, without choosing or sorting.
        rows = x.repeat_interleave(shape.num_chosen, 0)
        active = rows @ gate_up[0].T
        return (F.silu(active[:, :width]) * active[:, width:]) @ down[0].T

    return [
        Row(
            "moe_route",
            case,
            lambda _: dispatch.moe_route(logits, None, routing),
            num_bytes=logits.numel() * 4,
            baseline=lambda _: logits.softmax(-1).topk(shape.num_chosen),
        ),
        Row(
            "moe_experts",
            f"{case} ({num_used} experts)",
            lambda _: dispatch.moe_experts(
                x, gate_up, down, None, None, weights, experts, activation="silu"
            ),
            num_bytes=0.0 if num_tokens > 512 else num_used * 3 * hidden * width * dtype.itemsize,
            flops=flops,
            baseline=one_dense_layer,
        ),
    ]


def gpu_rows(device: torch.device) -> list[Row]:
    dtype = torch.bfloat16
    rows = [
        attention_row(
            shape, [(ctx - 1, 1)] * num_seqs, f"decode B={num_seqs} ctx={ctx}", device, dtype
        )
        for shape in SHAPES
        for num_seqs, ctx in DECODES
    ]
    rows += [
        attention_row(shape, seqs, f"prefill {case} D={shape.head_dim}", device, dtype)
        for shape in SHAPES
        for case, seqs in PREFILLS.items()
    ]
    rows += [shared_prefix_row(shape, 64, 93, device, dtype) for shape in SHAPES]
    rows += [
        eight_bit_row(shape, seqs, stored, case, device, dtype)
        for shape in SHAPES
        for case, seqs in (
            ("decode B=256 ctx=800", [(799, 1)] * 256),
            ("prefill 2 x 4096", [(0, 4096)] * 2),
        )
        for stored in (torch.int8, torch.float8_e4m3fn)
    ]
    for shape, num_tokens in itertools.product(SHAPES, (1, 256, 8192)):
        rows += layer_rows(shape, num_tokens, device, dtype)
    for shape, num_tokens in itertools.product(SHAPES, (1, 8, 16)):
        rows += few_row_rows(shape, num_tokens, device, dtype)
    for shape, num_tokens in itertools.product(SHAPES, (16, 64, 160, 256)):
        rows += fused_rows(shape, num_tokens, device, dtype)
    rows += [prompt_row(shape, 8192, device, dtype) for shape in SHAPES]
    for form, num_tokens in itertools.product(FORMATS[:1], (1, 16, 64)):
        rows += quantised_rows(Row, num_tokens, (4096, 4096), form, device, dtype)
    for expert_shape, num_tokens in itertools.product(EXPERT_SHAPES, (1, 64, 1024)):
        rows += quantised_expert_rows(Row, expert_shape, num_tokens, FORMATS[1], device, dtype)
    for expert_shape, num_tokens in itertools.product(EXPERT_SHAPES, (1, 16, 64, 256, 8192)):
        rows += expert_rows(expert_shape, num_tokens, device, dtype)
    return rows


def cpu_rows(device: torch.device) -> list[Row]:
    shape = SHAPES[0]
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        rows += [
            attention_row(
                shape,
                [(ctx - 1, 1)] * num_seqs,
                f"{name} decode B={num_seqs} ctx={ctx}",
                device,
                dtype,
            )
            for num_seqs, ctx in CPU_DECODES
        ]
        rows.append(
            eight_bit_row(
                shape, [(255, 1)] * 8, torch.int8, f"{name} decode B=8 ctx=256", device, dtype
            )
        )
        rows.append(attention_row(shape, [(0, 512)], f"{name} prefill 512", device, dtype))
        for num_tokens in (1, 64):
            rows += layer_rows(shape, num_tokens, device, dtype)
            rows += expert_rows(SMALL_EXPERTS, num_tokens, device, dtype)
    return rows


def time_us(function: Callable[[int], Any], device: torch.device, calls: int = CALLS) -> float:
    """Mean of `calls` calls, best of a few rounds; call 0 begins a step."""
    if device.type != "cuda":
        return time_cpu_us(function)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function(0)
        function(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            function(call)
    graph.replay()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return min(times)


def time_cpu_us(function: Callable[[int], Any]) -> float:
    function(0)
    best = float("inf")
    until = time.perf_counter() + 0.3
    while time.perf_counter() < until:
        start = time.perf_counter()
        for call in range(1, 4):
            function(call)
        best = min(best, (time.perf_counter() - start) / 3 * 1e6)
    return best


def report(rows: list[Row], device: torch.device) -> None:
    lines, records = [], []
    for row in rows:
        try:
            us = time_us(row.run, device)
            baseline_us = time_us(row.baseline, device) if row.baseline else None
        except torch.cuda.OutOfMemoryError:
            lines.append([row.op, row.case, "out of memory", "", "", "", ""])
            continue
        gb_per_s = row.num_bytes / us / 1e3
        tflop_per_s = row.flops / us / 1e6
        rate = f"{gb_per_s:.0f} GB/s" if row.num_bytes else f"{tflop_per_s:.1f} TFLOP/s"
        share = gb_per_s / PEAK_GB_PER_S if row.num_bytes else tflop_per_s / PEAK_TFLOP_PER_S
        records.append(
            {
                "op": row.op,
                "case": row.case,
                "us": us,
                "torch_us": baseline_us,
                "gb_per_s": gb_per_s,
                "tflop_per_s": tflop_per_s,
            }
        )
        lines.append(
            [
                row.op,
                row.case,
                f"{us:.1f}",
                rate,
                f"{share:.0%}" if device.type == "cuda" else "",
                f"{baseline_us:.1f}" if baseline_us else "",
                f"{baseline_us / us:.2f}x" if baseline_us else "",
            ]
        )
    print_table(["op", "case", "us", "rate", "of peak", "torch us", "speed-up"], lines)
    write_rows("kernels", records)


def sweep(device: torch.device) -> None:
    """Tiles of the attention kernels, fastest first."""
    from engine.kernels.decode_attention import DecodeTiles, decode_attention
    from engine.kernels.prefill_attention import PrefillTiles, prefill_attention
    from engine.kernels.prefill_hopper import HopperTiles, prefill_on_hopper

    def runner(kernel: Any, tiles: Any) -> Callable[..., Any]:
        def run(q: torch.Tensor, k: Any, v: Any, metadata: Any, *, softmax_scale: float) -> None:
            out = torch.empty_like(q).flatten(1)
            kernel(q, k, v, metadata, out, softmax_scale=softmax_scale, tiles=tiles)

        return run

    cases: list[tuple[str, Any, Shape, list[tuple[int, int]], list[Any]]] = []
    # More programs than a processor holds would run after the others: 227 KiB, and 16 Ki registers
    # for the warps of each quarter.
    decode_grid = [
        DecodeTiles(
            block_n,
            num_stages,
            num_warps,
            programs,
            min_tiles=min_tiles,
            max_registers=min(16384 // 32 // -(-num_warps * programs // 4) // 8 * 8, 248),
        )
        for (block_n, num_stages, num_warps, programs), min_tiles in itertools.product(
            (
                (64, 2, 1, 8),
                (64, 2, 2, 4),
                (64, 2, 2, 6),
                (64, 3, 2, 4),
                (64, 3, 4, 2),
                (64, 3, 4, 3),
                (128, 3, 4, 2),
            ),
            (2, 4),
        )
    ]
    prefill_grid = [
        PrefillTiles(*tiles)
        for tiles in (
            (128, 64, 2, 8),
            (128, 64, 3, 8),
            (128, 64, 4, 8),
            (128, 128, 2, 8),
            (128, 128, 3, 8),
            (64, 64, 2, 4),
            (64, 64, 3, 4),
            (64, 128, 2, 4),
        )
    ]
    options: dict[str, Any] = {"sliding_window": None, "logit_softcap": 0.0}
    decode = functools.partial(decode_attention, **options)
    prefill = functools.partial(prefill_attention, **options)
    hopper_grids = {
        64: [HopperTiles(2, 128, 3), HopperTiles(3, 128, 3), HopperTiles(3, 128, 4)],
        128: [HopperTiles(2, 128, 2)],
    }
    for shape in (SHAPES[0], SHAPES[2]):
        for num_seqs, ctx in DECODES:
            seqs = [(ctx - 1, 1)] * num_seqs
            cases.append((f"decode B={num_seqs} ctx={ctx}", decode, shape, seqs, decode_grid))
        seqs = PREFILLS["16k"]
        cases.append(("prefill 16k, portable kernel", prefill, shape, seqs, prefill_grid))
        hopper_grid = hopper_grids[shape.head_dim]
        cases.append(("prefill 16k, Hopper kernel", prefill_on_hopper, shape, seqs, hopper_grid))
    for case, kernel, shape, seqs, grid in cases:
        found = []
        for tiles in grid:
            row = attention_row(
                shape, seqs, case, device, torch.bfloat16, run=runner(kernel, tiles)
            )
            try:
                found.append((time_us(row.run, device, 10), tiles))
            except Exception as error:
                # A tile that needs more shared memory than there is belongs in no list.
                print(f"  {tiles}: {type(error).__name__}")
        found.sort(key=lambda pair: pair[0])
        print(f"{shape.name} {case}")
        for us, tiles in found[:4]:
            print(f"  {us:9.1f} us  {tiles}", flush=True)


def sweep_few_rows(device: torch.device) -> None:
    """Tiles of the products of few rows, fastest first."""
    from engine.kernels import few_row_linear, few_row_qkv
    from engine.kernels.few_row_tiles import FewRowTiles

    vector = [(8, 512, 3, 4), (16, 256, 3, 4), (4, 1024, 3, 4), (4, 1024, 1, 4), (8, 1024, 3, 4)]
    matrix = [(16, 256, 4, 2), (16, 256, 4, 4), (32, 128, 4, 4), (32, 256, 4, 4), (64, 128, 4, 4)]
    for shape, num_rows in itertools.product(SHAPES, (1, 8, 16, 32, 64)):
        block_m = 1 if num_rows == 1 else max(16, num_rows)
        grid = [FewRowTiles(block_m, *tiles) for tiles in (vector if block_m == 1 else matrix)]
        for row in few_row_rows(shape, num_rows, device, torch.bfloat16):
            if row.op == "embed_rows":
                continue
            found = []
            for tiles in grid:
                for module in (few_row_linear, few_row_qkv):
                    module.tiles_for = lambda *_, tiles=tiles: tiles  # type: ignore[assignment]
                try:
                    found.append((time_us(row.run, device), tiles))
                except Exception as error:
                    # A tile that needs more shared memory than there is belongs in no list.
                    print(f"  {tiles}: {type(error).__name__}")
            assert row.baseline is not None, "every product has one"
            found.sort(key=lambda pair: pair[0])
            print(f"{row.op} {row.case}: torch {time_us(row.baseline, device):.2f} us")
            for us, tiles in found[:4]:
                print(f"  {us:9.2f} us {row.num_bytes / us / 1e3:6.0f} GB/s  {tiles}", flush=True)


def report_quantised(device: torch.device) -> None:
    """Products of llama-8b's shapes with weights of codes, a table for each format and shape."""
    shape = next(shape for shape in SHAPES if shape.name == "8B")
    hidden_size, inner = shape.hidden_size, shape.intermediate_size
    width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
    sizes = [(width, hidden_size), (2 * inner, hidden_size), (hidden_size, inner)]
    for form, size in itertools.product(FORMATS, sizes):
        rows = [
            quantised_rows(Row, num_rows, size, form, device, torch.bfloat16)[0]
            for num_rows in QUANTISED_ROWS
        ]
        report(rows, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="try other attention tiles (GPU)")
    parser.add_argument("--sweep-few-rows", action="store_true", help="try tiles of products (GPU)")
    parser.add_argument("--quantised", action="store_true", help="weights of codes (GPU)")
    parser.add_argument("--only", default="", help="ops or cases whose name contains this")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.sweep:
        sweep(device)
        return
    if options.sweep_few_rows:
        sweep_few_rows(device)
        return
    if options.quantised:
        report_quantised(device)
        return
    rows = gpu_rows(device) if device.type == "cuda" else cpu_rows(device)
    report([row for row in rows if options.only in f"{row.op} {row.case}"], device)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
