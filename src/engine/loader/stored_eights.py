"""Weights of 8-bit numbers: float8 e4m3 and int8, with scales per tensor, row, group or block.

`weight` [N, K] holds the numbers. Its scale is called `weight_scale` by compressed-tensors and
AutoFP8, `weight_scale_inv` by DeepSeek and transformers (it is multiplied all the same), and is
`SCB` [N] / 127 for bitsandbytes' int8. `input_scale` (transformers: `activation_scale`) is there
where x is meant to be rounded by a fixed scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import Activations, QuantisedEight
from engine.loader.stored_rows import StoredRows, chosen_rows

if TYPE_CHECKING:
    from engine.layers.quantised_factory import QuantisedWeight
    from engine.loader.module_tensors import ModuleTensors
    from engine.loader.weight_scheme import WeightScheme

_SCALES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_INT8_MAX: Final = 127.0


class StoredEight(StoredRows):
    """A layer of 8-bit numbers; see the head of this module.

    Args:
        tensors: Of the layer.
        scheme: Of layout "eight" or "bnb8".

    Raises:
        CheckpointError: Tensors are missing, misshapen or contradict the scheme.
    """

    def __init__(self, tensors: ModuleTensors, scheme: WeightScheme) -> None:
        dtype = torch.float8_e4m3fn if scheme.is_float else torch.int8
        self._values = tensors.get(".weight", dtype)
        if self._values.dim() != 2:
            found = f"has the shape {tuple(self._values.shape)}"
            tensors.wrong(".weight", found, "two dimensions")
        num_rows, num_columns = self._values.shape
        self._tile = (scheme.tile[0] or num_rows, scheme.tile[1] or num_columns)
        if scheme.layout == "bnb8":
            scales = tensors.shaped(".SCB", (num_rows,), torch.float32)
            self._scales = scales[:, None] / _INT8_MAX
            if tensors.has(".weight_format") and int(tensors.get(".weight_format")) != 0:
                tensors.wrong(".weight_format", "is not 0", "rows as they are (0)")
        else:
            self._scales = self._read_scales(tensors, num_rows, num_columns)
        self._zeros = None
        if not scheme.is_symmetric:
            zeros = tensors.get(".weight_zero_point", torch.int8)
            if self._tile[0] != 1:
                tensors.wrong(".weight_zero_point", "is there", "a scale for each row, or none")
            self._zeros = zeros.reshape(self._scales.shape)
        self._activations = _activations(tensors, scheme)
        super().__init__((num_rows, num_columns))

    def unpack(self, rows: slice | torch.Tensor, device: torch.device) -> QuantisedWeight:
        """See `StoredRows.unpack`."""
        # Not every device and version of torch takes rows of float8; bytes are bytes.
        values = self._values.view(torch.int8)[rows].to(device)
        if self._zeros is not None:
            scales = self._scales[rows].to(device)
            zeros = self._zeros[rows].to(device).float() + 128.0
            return QuantisedCodes(
                bits=8,
                group=self._tile[1],
                codes=values.view(torch.uint8) ^ 128,
                scales=scales,
                minima=zeros.mul_(scales).neg_(),
            )
        whole = isinstance(rows, slice) and rows == slice(0, self.shape[0])
        tile = self._tile
        if whole:
            scales = self._scales
        else:
            scales, tile = self._row_scales(rows), (1, tile[1])
        return QuantisedEight(
            values=values.contiguous().view(self._values.dtype),
            tile=tile,
            scales=scales.to(device).contiguous(),
            activations=self._activations,
        )

    def read(self, device: torch.device) -> QuantisedWeight:
        """The whole weight, its tiles as they are in the file where the rows are."""
        if self.order is None:
            return self.unpack(slice(0, self.shape[0]), device)
        return chosen_rows(self.unpack(slice(0, self._values.shape[0]), device), self.order)

    def _row_scales(self, rows: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop)
        return self._scales[rows // self._tile[0]]

    def _read_scales(self, tensors: ModuleTensors, num_rows: int, num_columns: int) -> torch.Tensor:
        ending = ".weight_scale" if tensors.has(".weight_scale") else ".weight_scale_inv"
        scales = tensors.get(ending, *_SCALES)
        shape = (-(-num_rows // self._tile[0]), -(-num_columns // self._tile[1]))
        same = scales.shape == (num_rows,) and shape == (num_rows, 1)
        if scales.numel() == 1 and shape == (1, 1):
            same = True
        if tuple(scales.shape) != shape and not same:
            tensors.wrong(ending, f"has the shape {tuple(scales.shape)}", str(shape))
        return scales.reshape(shape).float()


def _activations(tensors: ModuleTensors, scheme: WeightScheme) -> Activations:
    if scheme.activations != "tensor":
        return Activations(scheme.activations, scheme.activation_group)
    ending = ".input_scale" if tensors.has(".input_scale") else ".activation_scale"
    scale = tensors.get(ending, *_SCALES)
    if scale.numel() != 1:
        tensors.wrong(ending, f"has the shape {tuple(scale.shape)}", "one number")
    return Activations("tensor", scale=float(scale))
