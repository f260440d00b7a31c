"""`ModuleTensors`: the tensors of one quantised layer, fetched by name and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from engine.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

_CURE = "Download the checkpoint again, or correct quantization_config."


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors that a checkpoint has for one layer.

    Attributes:
        module: Name of the layer, as "model.layers.0.self_attn.q_proj".
        shapes: Full name -> shape, of all tensors of the checkpoint.
        fetch: Full name -> a view of the mapped file.
        place: The folder, for errors.
    """

    module: str
    shapes: Mapping[str, tuple[int, ...]]
    fetch: Callable[[str], torch.Tensor]
    place: str

    def has(self, ending: str) -> bool:
        """Whether there is a tensor `module` + `ending`."""
        return self.module + ending in self.shapes

    def get(self, ending: str, *dtypes: torch.dtype) -> torch.Tensor:
        """The tensor `module` + `ending`, of one of the dtypes (any if none is given).

        Raises:
            CheckpointError: There is none, or it has another dtype.
        """
        name = self.module + ending
        if name not in self.shapes:
            msg = (
                f"{self.place}: tensor {name!r} is missing, without which the codes of "
                f"{self.module} mean nothing. {_CURE}"
            )
            raise CheckpointError(msg)
        tensor = self.fetch(name)
        if dtypes and tensor.dtype not in dtypes:
            self.wrong(ending, f"has the dtype {tensor.dtype}", " or ".join(map(str, dtypes)))
        return tensor

    def shaped(self, ending: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> torch.Tensor:
        """`get`, of that shape.

        Raises:
            CheckpointError: It has another shape.
        """
        tensor = self.get(ending, *dtypes)
        if tuple(tensor.shape) != shape:
            self.wrong(ending, f"has the shape {tuple(tensor.shape)}", str(shape))
        return tensor

    def wrong(self, ending: str, found: str, expected: str) -> NoReturn:
        """Refuse a tensor.

        Raises:
            CheckpointError: Always.
        """
        msg = (
            f"{self.place}: tensor {self.module + ending!r} {found}; its quantization_config "
            f"and the other tensors of the layer ask for {expected}. {_CURE}"
        )
        raise CheckpointError(msg)
