"""`GatedMLP`: the feed-forward half of a decoder layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.kernels import dispatch
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm


class GatedMLP:
    """`down(activation(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202), gate and up merged.

    Args:
        hidden_size: H.
        intermediate_size: I.
        activation: A name that `dispatch.act_mul` knows.
        bias: Whether the three projections have one.
        device: Where the weights live.
        dtype: Of weights and activations.
        batch_invariant: As in `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
        batch_invariant: bool,
    ) -> None:
        self.gate_up_proj = Linear(
            hidden_size,
            {"gate_proj": intermediate_size, "up_proj": intermediate_size},
            bias=bias,
            device=device,
            dtype=dtype,
            batch_invariant=batch_invariant,
        )
        self.down_proj = Linear(
            intermediate_size,
            {"down_proj": hidden_size},
            bias=bias,
            device=device,
            dtype=dtype,
            batch_invariant=batch_invariant,
        )
        self.activation = activation

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the merged weights under the checkpoint's names."""
        yield from self.gate_up_proj.named_weights()
        yield from self.down_proj.named_weights()

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        self.gate_up_proj.finish_loading()
        self.down_proj.finish_loading()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """New [T, H] from x [T, H]."""
        return self.down_proj(self._gated(x))

    def accumulate(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """`hidden += self(x)` in place, where `down_proj.accumulates`."""
        self.down_proj.accumulate(hidden, self._gated(x))

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        """What the last product takes, new [T, I]."""
        if self.gate_up_proj.beats_library("gated", x, self.activation):
            return self.gate_up_proj.gated(x, self.activation)
        gate_up = self.gate_up_proj(x)  # [T, 2 I]
        return dispatch.act_mul(gate_up, self.activation)

    def fused(self, hidden: torch.Tensor, squares: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`hidden += mlp(norm(hidden))` in place; returns the new `squares`."""
        x = self.gate_up_proj.of_normed(hidden, squares, norm, self.activation)  # [T, I]
        return self.down_proj.add_to(hidden, x)

    def weighed(
        self,
        x: torch.Tensor,
        squares: torch.Tensor,
        hidden: torch.Tensor,
        norm: RMSNorm,
        next_norm: RMSNorm,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden += mlp(norm(hidden))` in place, where x is hidden weighed for `norm`.

        Returns:
            (hidden weighed for `next_norm`, its `squares`), new.
        """
        y = self.gate_up_proj.of_weighed(x, squares, norm.eps, self.activation)  # [T, I]
        return self.down_proj.add_weighed(hidden, y, next_norm)
