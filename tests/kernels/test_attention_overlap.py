"""What attention overlaps on a GPU: the kernel that stores its keys, and prefills with decodes.

Each graph is replayed with other inputs first. Whoever reads too early then reads what that left
behind, and not by chance the right numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from kernel_cases import AttentionCase, make_case
from triton_cases import IS_INTERPRETED, NEEDS_TRITON

from engine.kernels import dispatch

pytestmark = [
    *NEEDS_TRITON,
    pytest.mark.skipif(IS_INTERPRETED, reason="captures CUDA graphs"),
]
HEADS = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}
WIDTH, HIDDEN, NUM_LAYERS = 12 * 64, 2048, 3
DTYPE = torch.bfloat16


def captured(
    case: AttentionCase,
    attend: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    other_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend` of x, replayed from a graph after a replay with another x, and other lengths."""
    wanted, seq_lens = x.clone(), case.metadata.seq_lens.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(x)
    x.normal_()
    if other_lens is not None:
        case.metadata.seq_lens.copy_(other_lens)
    graph.replay()
    x.copy_(wanted)
    case.metadata.seq_lens.copy_(seq_lens)
    out.fill_(7.0)
    graph.replay()
    return out


def stored_queries(
    op: str, x: torch.Tensor, weight: torch.Tensor, case: AttentionCase, cos_sin: torch.Tensor
) -> torch.Tensor:
    """q of the rows of x, whose keys and values go to the case's cache."""
    cache = (case.metadata, cos_sin, case.k_cache, case.v_cache)
    if op == "rope_write_kv":
        return dispatch.rope_write_kv(x @ weight.T, *cache, **HEADS)
    if op == "scaled_qkv":
        return dispatch.scaled_qkv(x, None, weight, None, *cache, eps=1e-5, **HEADS)
    squares = x.float().square().sum(1, keepdim=True)
    norm_weight = torch.ones(HIDDEN, dtype=DTYPE, device=x.device)
    return dispatch.normed_qkv(x, squares, norm_weight, weight, None, *cache, eps=1e-5, **HEADS)


@pytest.mark.parametrize(("op", "num_seqs"), [("scaled_qkv", 64), ("normed_qkv", 8)])
def test_decode_waits_for_what_is_stored_before_it(op: str, num_seqs: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    seqs = [(700 - index * 37 % 700, 1) for index in range(num_seqs)]
    case = make_case(seqs, dtype=DTYPE, num_q_heads=8, num_kv_heads=2, block_size=64).on(device)
    caches = [(case.k_cache.clone(), case.v_cache.clone()) for _ in range(NUM_LAYERS)]
    weights = torch.randn(NUM_LAYERS, WIDTH, HIDDEN, dtype=DTYPE, device=device) * HIDDEN**-0.5
    cos_sin = torch.randn(1024, 2, 32, device=device)
    x = torch.randn(num_seqs, HIDDEN, dtype=DTYPE, device=device)

    def attend(x: torch.Tensor, between: Callable[[], None] = lambda: None) -> torch.Tensor:
        dispatch.begin_step(case.metadata)
        outs = []
        for (k_cache, v_cache), weight in zip(caches, weights, strict=True):
            layer = dataclasses.replace(case, k_cache=k_cache, v_cache=v_cache)
            q = stored_queries(op, x, weight, layer, cos_sin)
            between()
            outs.append(
                dispatch.paged_attention(
                    q, k_cache, v_cache, case.metadata, softmax_scale=case.softmax_scale
                )
            )
            between()
        return torch.stack(outs)

    got = captured(case, attend, x, case.metadata.seq_lens.flip(0))
    assert torch.equal(got, attend(x, torch.cuda.synchronize))


def test_prefills_beside_decodes() -> None:
    """Each layer's input is the layer before it: both kinds are waited for, and wait themselves."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    seqs = [(1 + index * 37 % 900, 1) for index in range(200)] + [(0, 200), (500, 130), (3, 2)]
    case = make_case(seqs, dtype=DTYPE, num_q_heads=8, num_kv_heads=2, block_size=64).on(device)
    full = case.metadata
    counts = torch.tensor([full.num_decodes, full.num_seqs], dtype=torch.int32, device=device)
    case.metadata = dataclasses.replace(
        full, device_counts=counts, num_decodes=full.num_seqs, max_prefills=full.num_seqs
    )
    caches = [(case.k_cache.clone(), case.v_cache.clone()) for _ in range(NUM_LAYERS)]
    weights = torch.randn(NUM_LAYERS, WIDTH, 512, dtype=DTYPE, device=device) * 512**-0.5
    cos_sin = torch.randn(1024, 2, 32, device=device)
    x = torch.randn(len(case.q), 512, dtype=DTYPE, device=device)
    side = torch.cuda.Stream()

    def attend(x: torch.Tensor, side: torch.cuda.Stream | None = side) -> torch.Tensor:
        metadata = dataclasses.replace(case.metadata, side_stream=side)
        dispatch.begin_step(metadata)
        for (k_cache, v_cache), weight in zip(caches, weights, strict=True):
            layer = dataclasses.replace(case, metadata=metadata, k_cache=k_cache, v_cache=v_cache)
            q = stored_queries("rope_write_kv", x, weight, layer, cos_sin)
            # Once more at once: what starts early may follow on both kernels, too.
            for _ in range(2):
                x = dispatch.paged_attention(
                    q, k_cache, v_cache, metadata, softmax_scale=case.softmax_scale
                )
        return x

    got = captured(case, attend, x)
    assert torch.equal(got, attend(x, None))
