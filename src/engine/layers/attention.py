"""`Attention`: grouped-query attention of one layer over the paged KV cache.

What families add to it: norms of q and k, sinks, and factors on the queries by position.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.kernels import dispatch
from engine.kernels.kv_cache import KVTensor, QuantisedCache
from engine.kernels.metadata import AttentionMetadata
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm


class Attention:
    """qkv projection, optional norm of q and k heads, rotation, attention, output projection.

    Args:
        hidden_size: H.
        num_q_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq.
        head_dim: D.
        qkv_bias: Whether the q, k and v projections have one.
        output_bias: Whether the output projection has one.
        qk_norm: Norm of q and k before rotation: "" for none, "head" for each head by itself,
            "projection" over all heads, "unweighted" for each head and without a weight.
        norm_eps: Epsilon of that norm.
        norm_offset: As in `RMSNorm`, for that norm.
        softmax_scale: Factor on the scores.
        sliding_window: Tokens a position sees, itself included; None for all.
        chunk_size: Tokens of the chunk a position sees, up to itself; None for all.
        logit_softcap: Bound on the scores; 0 for none.
        has_sinks: Whether every query head has a score that no value belongs to.
        query_scales: [max_model_len] float32, factor on the queries by position; None for none.
        device: Where the weights live.
        dtype: Of weights, activations and KV cache.
        batch_invariant: As in `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm: str,
        norm_eps: float,
        norm_offset: float,
        softmax_scale: float,
        sliding_window: int | None,
        chunk_size: int | None,
        logit_softcap: float,
        has_sinks: bool,
        query_scales: torch.Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        batch_invariant: bool,
    ) -> None:
        q_size, kv_size = num_q_heads * head_dim, num_kv_heads * head_dim
        self.qkv_proj = Linear(
            hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=qkv_bias,
            device=device,
            dtype=dtype,
            batch_invariant=batch_invariant,
        )
        self.o_proj = Linear(
            q_size,
            {"o_proj": hidden_size},
            bias=output_bias,
            device=device,
            dtype=dtype,
            batch_invariant=batch_invariant,
        )
        self.q_norm = self.k_norm = None
        if qk_norm:
            sizes = (q_size, kv_size) if qk_norm == "projection" else (head_dim, head_dim)
            self.q_norm, self.k_norm = (
                RMSNorm(size, eps=norm_eps, offset=norm_offset, device=device, dtype=dtype)
                for size in sizes
            )
        self.qk_norm = qk_norm
        self.sinks = torch.empty(num_q_heads, device=device, dtype=dtype) if has_sinks else None
        self.query_scales = query_scales
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.norm_eps = norm_eps
        self.norm_offset = norm_offset
        self.softmax_scale = softmax_scale
        self.sliding_window = sliding_window
        self.chunk_size = chunk_size
        self.logit_softcap = logit_softcap
        self.batch_invariant = batch_invariant

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the merged weights under the checkpoint's names."""
        yield from self.qkv_proj.named_weights()
        yield from self.o_proj.named_weights()
        if self.qk_norm != "unweighted" and self.q_norm is not None and self.k_norm is not None:
            yield "q_norm.weight", self.q_norm.weight
            yield "k_norm.weight", self.k_norm.weight
        if self.sinks is not None:
            yield "sinks", self.sinks

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        if self.qk_norm == "unweighted" and self.q_norm is not None and self.k_norm is not None:
            self.q_norm.weight.fill_(1.0)
            self.k_norm.weight.fill_(1.0)
        self.qkv_proj.finish_loading()
        self.o_proj.finish_loading()

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Attention output, new [T, H].

        Args:
            x: [T, H], normalised.
            cos_sin: [P, 2, rot_dim // 2] float32; None for a layer without positions.
            k_cache: [num_blocks, block_size, Hkv, D], plain or 8 bits; new keys are written in
                place.
            v_cache: Likewise.
            metadata: Layout of the batch.
        """
        return self.o_proj(self._attended(x, cos_sin, k_cache, v_cache, metadata))

    def accumulate(
        self,
        hidden: torch.Tensor,
        x: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> None:
        """`hidden += self(x, …)` in place, where `o_proj.accumulates`."""
        y = self._attended(x, cos_sin, k_cache, v_cache, metadata)
        self.o_proj.accumulate(hidden, y)

    def _attended(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """What the output projection takes, new [T, Hq D], of normalised x."""
        if self.qkv_proj.beats_library("qkv", x) and self._turns_whole_heads(cos_sin, k_cache):
            q = self._turned_product(x, None, 0.0, cos_sin, k_cache, v_cache, metadata)
        else:
            qkv = self.qkv_proj(x)  # [T, (Hq + 2 Hkv) D]
            q = self._rotate_and_store(qkv, cos_sin, k_cache, v_cache, metadata)
        return self._attend(q, k_cache, v_cache, metadata)

    def fused(
        self,
        hidden: torch.Tensor,
        squares: torch.Tensor,
        norm: RMSNorm,
        cos_sin: torch.Tensor | None,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`hidden += attention(norm(hidden))` in place; returns the new `squares`.

        `hidden` and `squares` as in `Linear.of_normed`, the rest as in the call.
        """
        rotates = self._rotates_in_product(cos_sin) and self.qkv_proj.uses_plain_product
        if rotates and isinstance(k_cache, torch.Tensor):
            assert isinstance(v_cache, torch.Tensor), "both caches are of one kind"
            q = dispatch.normed_qkv(
                hidden,
                squares,
                norm.weight,
                self.qkv_proj.weight,
                self.qkv_proj.bias,
                metadata,
                cos_sin,
                k_cache,
                v_cache,
                num_q_heads=self.num_q_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                eps=norm.eps,
                weight_offset=norm.offset,
            )
        else:
            qkv = self.qkv_proj.of_normed(hidden, squares, norm)
            q = self._rotate_and_store(qkv, cos_sin, k_cache, v_cache, metadata)
        return self.o_proj.add_to(hidden, self._attend(q, k_cache, v_cache, metadata))

    def weighed(
        self,
        x: torch.Tensor,
        squares: torch.Tensor,
        hidden: torch.Tensor,
        norm: RMSNorm,
        next_norm: RMSNorm,
        cos_sin: torch.Tensor | None,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden += attention(norm(hidden))` in place, where x is hidden weighed for `norm`.

        Returns:
            (hidden weighed for `next_norm`, its `squares`), new.
        """
        if self._turns_whole_heads(cos_sin, k_cache):
            q = self._turned_product(x, squares, norm.eps, cos_sin, k_cache, v_cache, metadata)
        else:
            qkv = self.qkv_proj.of_weighed(x, squares, norm.eps)
            q = self._rotate_and_store(qkv, cos_sin, k_cache, v_cache, metadata)
        y = self._attend(q, k_cache, v_cache, metadata)
        return self.o_proj.add_weighed(hidden, y, next_norm)

    def _turned_product(
        self,
        x: torch.Tensor,
        squares: torch.Tensor | None,
        eps: float,
        cos_sin: torch.Tensor | None,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Queries for attention, new [T, Hq, D], from x in one kernel; `dispatch.scaled_qkv`."""
        return dispatch.scaled_qkv(
            x,
            squares,
            self.qkv_proj.weight,
            self.qkv_proj.bias,
            metadata,
            cos_sin,
            k_cache,
            v_cache,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            eps=eps,
            q_norm_weight=None if self.q_norm is None else self.q_norm.weight,
            k_norm_weight=None if self.k_norm is None else self.k_norm.weight,
            norm_eps=self.norm_eps,
            norm_weight_offset=self.norm_offset,
        )

    def _turns_whole_heads(self, cos_sin: torch.Tensor | None, k_cache: KVTensor) -> bool:
        """Whether `dispatch.scaled_qkv` can norm and turn the heads, and store them."""
        has_whole_heads = cos_sin is None or 2 * cos_sin.shape[-1] == self.head_dim
        power_of_two = self.head_dim & -self.head_dim
        has_size = power_of_two >= 32
        if self.q_norm is not None or isinstance(k_cache, QuantisedCache):
            # A program has the whole head: its norm, or its scale, needs it.
            has_size = self.head_dim in (32, 64, 128)
        return has_whole_heads and has_size and self.qk_norm != "projection"

    def _rotates_in_product(self, cos_sin: torch.Tensor | None) -> bool:
        """Whether rotation needs no more of a head than two halves of 16 columns and more."""
        has_whole_heads = cos_sin is None or 2 * cos_sin.shape[-1] == self.head_dim
        return self.q_norm is None and has_whole_heads and self.head_dim % 32 == 0

    def _rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Queries for attention, new [T, Hq, D]; keys and values go to the cache."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if self.qk_norm == "projection" and q_norm is not None and k_norm is not None:
            q_size, kv_size = (n * self.head_dim for n in (self.num_q_heads, self.num_kv_heads))
            for norm, part in zip(
                (q_norm, k_norm), qkv.split([q_size, kv_size, kv_size], dim=-1), strict=False
            ):
                part.copy_(norm(part))
            q_norm = k_norm = None
        return dispatch.rope_write_kv(
            qkv,
            metadata,
            cos_sin,
            k_cache,
            v_cache,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            q_norm_weight=None if q_norm is None else q_norm.weight,
            k_norm_weight=None if k_norm is None else k_norm.weight,
            norm_eps=self.norm_eps,
            norm_weight_offset=self.norm_offset,
        )

    def _attend(
        self,
        q: torch.Tensor,
        k_cache: KVTensor,
        v_cache: KVTensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """What the output projection takes, new [T, Hq D]."""
        if self.query_scales is not None:
            scales = self.query_scales.index_select(0, metadata.positions)
            q = (q * scales[:, None, None]).to(q.dtype)
        return dispatch.paged_attention(
            q,
            k_cache,
            v_cache,
            metadata,
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            logit_softcap=self.logit_softcap,
            batch_invariant=self.batch_invariant,
            sinks=self.sinks,
            chunk_size=self.chunk_size,
        )
