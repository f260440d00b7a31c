"""`PlainMLP`: a feed-forward half without a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from engine.layers.linear import Linear

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
}
PLAIN_ACTIVATIONS = tuple(_ACTIVATIONS)
"""Names that `PlainMLP` knows; "relu2" is the square of a relu."""


class PlainMLP:
    """`down(activation(up(x)))`.

    Args:
        hidden_size: H.
        intermediate_size: I.
        activation: One of `PLAIN_ACTIVATIONS`.
        bias: Whether both projections have one.
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
        self.up_proj, self.down_proj = (
            Linear(
                columns,
                {name: rows},
                bias=bias,
                device=device,
                dtype=dtype,
                batch_invariant=batch_invariant,
            )
            for name, columns, rows in (
                ("up_proj", hidden_size, intermediate_size),
                ("down_proj", intermediate_size, hidden_size),
            )
        )
        self._activate = _ACTIVATIONS[activation]

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights under Llama's names."""
        yield from self.up_proj.named_weights()
        yield from self.down_proj.named_weights()

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        self.up_proj.finish_loading()
        self.down_proj.finish_loading()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """New [T, H] from x [T, H]."""
        return self.down_proj(self._activate(self.up_proj(x)))
