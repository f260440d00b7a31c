"""`Attention`: grouped-query attention of one layer over the paged KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.kernels import dispatch
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
        qk_norm_eps: Epsilon of the per-head norm of q and k; None where the family has no such.
        norm_offset: As in `RMSNorm`, for that norm.
        softmax_scale: Factor on the scores.
        sliding_window: Tokens a position sees, itself included; None for all.
        logit_softcap: Bound on the scores; 0 for none.
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
        qk_norm_eps: float | None,
        norm_offset: float,
        softmax_scale: float,
        sliding_window: int | None,
        logit_softcap: float,
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
        if qk_norm_eps is not None:
            self.q_norm, self.k_norm = (
                RMSNorm(head_dim, eps=qk_norm_eps, offset=norm_offset, device=device, dtype=dtype)
                for _ in "qk"
            )
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.norm_eps = qk_norm_eps or 0.0
        self.norm_offset = norm_offset
        self.softmax_scale = softmax_scale
        self.sliding_window = sliding_window
        self.logit_softcap = logit_softcap
        self.batch_invariant = batch_invariant

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the merged weights under the checkpoint's names."""
        yield from self.qkv_proj.named_weights()
        yield from self.o_proj.named_weights()
        if self.q_norm is not None and self.k_norm is not None:
            yield "q_norm.weight", self.q_norm.weight
            yield "k_norm.weight", self.k_norm.weight

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        self.qkv_proj.finish_loading()
        self.o_proj.finish_loading()

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Attention output, new [T, H].

        Args:
            x: [T, H], normalised.
            cos_sin: [P, 2, rot_dim // 2] float32; None for a layer without positions.
            k_cache: [num_blocks, block_size, Hkv, D]; new keys are written in place.
            v_cache: Likewise.
            metadata: Layout of the batch.
        """
        if self.qkv_proj.beats_library("qkv", x) and self._turns_whole_heads(cos_sin):
            q = self._turned_product(x, None, 0.0, cos_sin, k_cache, v_cache, metadata)
        else:
            qkv = self.qkv_proj(x)  # [T, (Hq + 2 Hkv) D]
            q = self._rotate_and_store(qkv, cos_sin, k_cache, v_cache, metadata)
        return self.o_proj(self._attend(q, k_cache, v_cache, metadata))

    def fused(
        self,
        hidden: torch.Tensor,
        squares: torch.Tensor,
        norm: RMSNorm,
        cos_sin: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`hidden += attention(norm(hidden))` in place; returns the new `squares`.

        `hidden` and `squares` as in `Linear.of_normed`, the rest as in the call.
        """
        if self._rotates_in_product(cos_sin):
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
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden += attention(norm(hidden))` in place, where x is hidden weighed for `norm`.

        Returns:
            (hidden weighed for `next_norm`, its `squares`), new.
        """
        if self._turns_whole_heads(cos_sin):
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
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
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

    def _turns_whole_heads(self, cos_sin: torch.Tensor | None) -> bool:
        """Whether `dispatch.scaled_qkv` can norm and turn the heads."""
        has_whole_heads = cos_sin is None or 2 * cos_sin.shape[-1] == self.head_dim
        power_of_two = self.head_dim & -self.head_dim
        has_size = power_of_two >= 32
        if self.q_norm is not None:  # a program has the whole head
            has_size = self.head_dim in (32, 64, 128)
        return has_whole_heads and has_size

    def _rotates_in_product(self, cos_sin: torch.Tensor | None) -> bool:
        """Whether rotation needs no more of a head than two halves of 16 columns and more."""
        has_whole_heads = cos_sin is None or 2 * cos_sin.shape[-1] == self.head_dim
        return self.q_norm is None and has_whole_heads and self.head_dim % 32 == 0

    def _rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Queries for attention, new [T, Hq, D]; keys and values go to the cache."""
        return dispatch.rope_write_kv(
            qkv,
            metadata,
            cos_sin,
            k_cache,
            v_cache,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            q_norm_weight=None if self.q_norm is None else self.q_norm.weight,
            k_norm_weight=None if self.k_norm is None else self.k_norm.weight,
            norm_eps=self.norm_eps,
            norm_weight_offset=self.norm_offset,
        )

    def _attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """What the output projection takes, new [T, Hq D]."""
        return dispatch.paged_attention(
            q,
            k_cache,
            v_cache,
            metadata,
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            logit_softcap=self.logit_softcap,
            batch_invariant=self.batch_invariant,
        )
