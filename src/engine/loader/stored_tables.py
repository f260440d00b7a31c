"""Weights of 4-bit codes with a table of values: bitsandbytes' NF4 and FP4, and MXFP4.

- *bitsandbytes* (arXiv 2305.14314; bitsandbytes-foundation/bitsandbytes, `QuantState.as_dict`): the
  numbers of the whole weight, row after row, in blocks of `blocksize`; two codes in a byte, the
  first one high: `weight` [N K / 2, 1]. `weight.absmax` are the blocks' scales, `weight.quant_map`
  the table, `weight.quant_state.bitsandbytes__nf4` JSON in bytes. With double quantisation the
  scales are 8-bit codes themselves: `nested_quant_map`[absmax] * `nested_absmax` of their block
  plus `nested_offset`.
- *MXFP4* (OCP microscaling formats 1.0): 32 columns share a power of two, numbers are float4 e2m1.
  gpt-oss stacks the experts: `…_blocks` [E, N, K / 32, 16], `…_scales` [E, N, K / 32];
  compressed-tensors has `weight_packed` [N, K / 2] and `weight_scale` [N, K / 32]. The first of
  two codes is low.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.loader.gguf_blocks import FP4_VALUES, powers_of_two
from engine.loader.packed_codes import unpack_pairs
from engine.loader.stored_rows import StoredRows

if TYPE_CHECKING:
    from engine.layers.quantised_factory import QuantisedWeight
    from engine.loader.module_tensors import ModuleTensors

_MX_GROUP: Final = 32
QUANT_STATE: Final = ".weight.quant_state.bitsandbytes__"


class StoredNF4(StoredRows):
    """A layer of bitsandbytes in 4 bits; see the head of this module.

    Args:
        tensors: Of the layer.

    Raises:
        CheckpointError: Tensors are missing, misshapen or contradict each other.
    """

    def __init__(self, tensors: ModuleTensors) -> None:
        state = _quant_state(tensors)
        num_rows, num_columns = state["shape"]
        numbers = num_rows * num_columns
        block = state["blocksize"]
        # Some are saved as numbers of another dtype, for the sake of their trainers.
        self._packed = tensors.get(".weight").reshape(-1).view(torch.uint8)
        if self._packed.numel() != -(-numbers // 2):
            found = f"has {self._packed.numel()} bytes"
            tensors.wrong(".weight", found, f"{-(-numbers // 2)} for {num_rows} x {num_columns}")
        # Blocks run on from row to row; within a row, this many columns surely share one.
        self._group = math.gcd(num_columns, block)
        if numbers % 2 or num_columns % 2:
            tensors.wrong(".weight", f"has rows of {num_columns} numbers", "an even number")
        self._block = block
        self._table = tensors.shaped(".weight.quant_map", (16,), torch.float32)
        self._scales = _scales(tensors, state, -(-numbers // block))
        super().__init__((num_rows, num_columns))

    def unpack(self, rows: slice | torch.Tensor, device: torch.device) -> QuantisedWeight:
        """See `StoredRows.unpack`."""
        num_columns = self.shape[1]
        packed = self._packed.view(-1, num_columns // 2)[rows].to(device)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop)
        firsts = rows[:, None] * num_columns + torch.arange(0, num_columns, self._group)
        return QuantisedCodes(
            bits=4,
            group=self._group,
            codes=unpack_pairs(packed, high_first=True),
            scales=self._scales[firsts // self._block].to(device),
            table=self._table.to(device),
        )


class StoredMXFP4(StoredRows):
    """A matrix in MXFP4; see the head of this module.

    Args:
        packed: [N, K / 2] uint8.
        exponents: [N, K / 32] uint8.
    """

    def __init__(self, packed: torch.Tensor, exponents: torch.Tensor) -> None:
        self._packed = packed
        self._exponents = exponents
        super().__init__((packed.shape[0], packed.shape[1] * 2))

    def unpack(self, rows: slice | torch.Tensor, device: torch.device) -> QuantisedWeight:
        """See `StoredRows.unpack`."""
        return QuantisedCodes(
            bits=4,
            group=_MX_GROUP,
            codes=unpack_pairs(self._packed[rows].to(device)),
            scales=powers_of_two(self._exponents[rows].to(device)),
            table=torch.tensor(FP4_VALUES, device=device),
        )


def packed_mxfp4(tensors: ModuleTensors) -> StoredMXFP4:
    """A layer of compressed-tensors in MXFP4.

    Raises:
        CheckpointError: Tensors are missing or misshapen.
    """
    packed = tensors.get(".weight_packed", torch.uint8)
    if packed.dim() != 2 or packed.shape[1] * 2 % _MX_GROUP:
        found = f"has the shape {tuple(packed.shape)}"
        tensors.wrong(".weight_packed", found, f"[rows, a multiple of {_MX_GROUP // 2}]")
    shape = (packed.shape[0], packed.shape[1] * 2 // _MX_GROUP)
    return StoredMXFP4(packed, tensors.shaped(".weight_scale", shape, torch.uint8))


def stacked_mxfp4(tensors: ModuleTensors) -> list[StoredMXFP4]:
    """The experts of gpt-oss that stand in one tensor.

    Raises:
        CheckpointError: Tensors are missing or misshapen.
    """
    blocks = tensors.get("_blocks", torch.uint8)
    if blocks.dim() != 4 or blocks.shape[3] != _MX_GROUP // 2:
        found = f"has the shape {tuple(blocks.shape)}"
        tensors.wrong("_blocks", found, "[experts, rows, columns / 32, 16]")
    exponents = tensors.shaped("_scales", tuple(blocks.shape[:3]), torch.uint8)
    return [
        StoredMXFP4(packed.flatten(1), scales)
        for packed, scales in zip(blocks, exponents, strict=True)
    ]


def _quant_state(tensors: ModuleTensors) -> dict[str, Any]:
    """The description that bitsandbytes stores of a weight, checked."""
    kind = next((kind for kind in ("nf4", "fp4") if tensors.has(QUANT_STATE + kind)), "nf4")
    ending = QUANT_STATE + kind
    try:
        state = json.loads(bytes(tensors.get(ending, torch.uint8).tolist()))
        shape = tuple(int(size) for size in state["shape"])
        block = int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        tensors.wrong(ending, f"is not a description ({error!r})", "JSON with shape and blocksize")
    if len(shape) != 2 or block < 2 or block & (block - 1):
        found = f"says shape {shape} and blocksize {block}"
        tensors.wrong(ending, found, "two sizes and a power of two")
    return {**state, "shape": shape, "blocksize": block}


def _scales(tensors: ModuleTensors, state: dict[str, Any], num_blocks: int) -> torch.Tensor:
    """[blocks] float32."""
    if not tensors.has(".weight.nested_absmax"):
        return tensors.shaped(".weight.absmax", (num_blocks,), torch.float32)
    codes = tensors.shaped(".weight.absmax", (num_blocks,), torch.uint8)
    table = tensors.shaped(".weight.nested_quant_map", (256,), torch.float32)
    nested_block = int(state.get("nested_blocksize", 256))
    shape = (-(-num_blocks // nested_block),)
    factors = tensors.shaped(".weight.nested_absmax", shape, torch.float32)
    factors = factors.repeat_interleave(nested_block)[:num_blocks]
    return table[codes.long()] * factors + float(state.get("nested_offset", 0.0))
