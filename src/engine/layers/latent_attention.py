"""`LatentAttention`: keys and values that are all made from one small vector per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.kernels import dispatch
from engine.kernels.kv_cache import KVTensor
from engine.kernels.metadata import AttentionMetadata
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Sizes of latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        query_rank: Width of the queries' latent vector; None where queries are one product.
        kv_rank: Width of the latent vector of keys and values.
        rope_dim: Entries of a head that turn; they are the same for all heads of a key.
        nope_dim: Entries of a head that do not.
        value_dim: Entries of a head's value, at most `rope_dim + nope_dim`.
        norm_eps: Epsilon of the norms of both latent vectors.
    """

    query_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    norm_eps: float

    @property
    def head_dim(self) -> int:
        """Entries of a head of queries and keys."""
        return self.rope_dim + self.nope_dim


class LatentAttention:
    """Latent attention with its keys and values written out in the KV cache, one per query head.

    The latent vector alone (512 + 64 numbers in DeepSeek-V2-Lite, against 16 heads of 2 * 192)
    would take a tenth of the memory, but heads of 576 numbers, for which there is no attention
    kernel on a GPU. Written out, every kernel, block and prefix works as for any other model, and
    prompts cost a third of the multiplications. Values are padded with zeros to the keys' size. A
    head is [rope_dim, nope_dim]: what turns comes first.

    Args:
        hidden_size: H.
        num_heads: Hq, and as many heads of keys and values.
        config: Sizes.
        bias: Whether the first products and the last one have biases.
        softmax_scale: Factor on the scores.
        device: Where the weights live.
        dtype: Of weights, activations and KV cache.
        batch_invariant: As in `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        config: LatentConfig,
        *,
        bias: bool,
        softmax_scale: float,
        device: torch.device,
        dtype: torch.dtype,
        batch_invariant: bool,
    ) -> None:
        def linear(columns: int, name: str, rows: int, *, bias: bool) -> Linear:
            return Linear(
                columns,
                {name: rows},
                bias=bias,
                device=device,
                dtype=dtype,
                batch_invariant=batch_invariant,
            )

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, eps=config.norm_eps, offset=0.0, device=device, dtype=dtype)

        q_size, rank = num_heads * config.head_dim, config.query_rank
        self.q_a_proj = self.q_a_norm = None
        if rank is not None:
            self.q_a_proj = linear(hidden_size, "q_a_proj", rank, bias=bias)
            self.q_a_norm = norm(rank)
        self.q_proj = linear(
            hidden_size if rank is None else rank,
            "q_proj" if rank is None else "q_b_proj",
            q_size,
            bias=False,
        )
        self.kv_a_proj = linear(
            hidden_size, "kv_a_proj_with_mqa", config.kv_rank + config.rope_dim, bias=bias
        )
        self.kv_a_norm = norm(config.kv_rank)
        self.kv_b_proj = linear(
            config.kv_rank,
            "kv_b_proj",
            num_heads * (config.nope_dim + config.value_dim),
            bias=False,
        )
        self.o_proj = linear(num_heads * config.value_dim, "o_proj", hidden_size, bias=bias)
        self.config = config
        self.num_heads = num_heads
        self.softmax_scale = softmax_scale

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights under the checkpoint's names."""
        if self.q_a_proj is not None and self.q_a_norm is not None:
            yield from self.q_a_proj.named_weights()
            yield "q_a_layernorm.weight", self.q_a_norm.weight
        yield from self.q_proj.named_weights()
        yield from self.kv_a_proj.named_weights()
        yield "kv_a_layernorm.weight", self.kv_a_norm.weight
        yield from self.kv_b_proj.named_weights()
        yield from self.o_proj.named_weights()

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        for linear in (self.q_a_proj, self.q_proj, self.kv_a_proj, self.kv_b_proj, self.o_proj):
            if linear is not None:
                linear.finish_loading()

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Attention output, new [T, H]; arguments as in `Attention`."""
        config, heads = self.config, self.num_heads
        if self.q_a_proj is not None and self.q_a_norm is not None:
            queries = self.q_proj(self.q_a_norm(self.q_a_proj(x)))
        else:
            queries = self.q_proj(x)
        k_rope, latent = self.kv_a_proj(x).split([config.rope_dim, config.kv_rank], dim=-1)
        k_rope = k_rope[:, None].expand(-1, heads, -1)
        expanded = self.kv_b_proj(self.kv_a_norm(latent.contiguous()))
        k_nope, values = expanded.view(-1, heads, config.nope_dim + config.value_dim).split(
            [config.nope_dim, config.value_dim], dim=-1
        )
        qkv = torch.cat(
            (
                queries.view(-1, heads, config.head_dim),
                torch.cat((k_rope, k_nope), dim=-1),
                F.pad(values, (0, config.head_dim - config.value_dim)),
            ),
            dim=1,
        )
        q = dispatch.rope_write_kv(
            qkv.flatten(1),
            metadata,
            cos_sin,
            k_cache,
            v_cache,
            num_q_heads=heads,
            num_kv_heads=heads,
            head_dim=config.head_dim,
        )
        mixed = dispatch.paged_attention(
            q, k_cache, v_cache, metadata, softmax_scale=self.softmax_scale
        )
        mixed = mixed.view(-1, heads, config.head_dim)[..., : config.value_dim]
        return self.o_proj(mixed.flatten(1))
