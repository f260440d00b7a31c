"""Weights of integer codes in 32-bit words: GPTQ, AWQ, compressed-tensors' pack-quantized.

With code q, zero point z and scale s of its group, all three mean `w = (q - z) s`. [N, K] is the
layer's weight, G = K / group.

- *GPTQ* (arXiv 2210.17323; layout of AutoGPTQ and ModelCloud/GPTQModel): `qweight` [K bits / 32, N]
  packs down the columns, `qzeros` [G, N bits / 32] along the rows, both densely; `scales` [G, N].
  The format "gptq" stores z - 1, "gptq_v2" z. With act-order `g_idx` [K] names each column's group:
  columns are sorted by it here, and the order is kept.
- *AWQ* (arXiv 2306.00978; layout of casper-hansen/AutoAWQ, version "gemm"): `qweight` [K, N / 8],
  `qzeros` [G, N / 8], `scales` [G, N]; the eight rows of a word stand in the order 0 2 4 6 1 3 5 7.
- *pack-quantized* (vllm-project/compressed-tensors): `weight_packed` [N, K bits / 32],
  `weight_scale` [N, G], `weight_zero_point` [N bits / 32, G] if there are any, `weight_shape`,
  `weight_g_idx` [K] with act-order. Codes are signed and stored with 2 ** (bits - 1) added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.loader.packed_codes import unpack_dense
from engine.loader.stored_rows import StoredRows, chosen_rows

if TYPE_CHECKING:
    from engine.layers.quantised_factory import QuantisedWeight
    from engine.loader.module_tensors import ModuleTensors
    from engine.loader.weight_scheme import WeightScheme

_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word column i of eight stands."""
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)


class StoredGPTQ(StoredRows):
    """A GPTQ layer; see the head of this module.

    Args:
        tensors: Of the layer.
        scheme: Of layout "gptq".

    Raises:
        CheckpointError: Tensors are missing, misshapen or contradict the scheme.
    """

    def __init__(self, tensors: ModuleTensors, scheme: WeightScheme) -> None:
        bits = scheme.bits
        self._scheme = scheme
        self._qweight = tensors.get(".qweight", torch.int32)
        words, num_rows = _two_sizes(tensors, ".qweight", self._qweight)
        num_columns = words * 32 // bits
        group = scheme.group or num_columns
        num_groups = _num_groups(tensors, ".qweight", num_columns, group)
        self._scales = tensors.shaped(".scales", (num_groups, num_rows), *_FLOATS)
        shape = (num_groups, -(-num_rows * bits // 32))
        self._qzeros = tensors.shaped(".qzeros", shape, torch.int32)
        self._columns = None
        if tensors.has(".g_idx"):
            groups = tensors.shaped(".g_idx", (num_columns,), torch.int32, torch.int64)
            self._columns = _sorted_columns(tensors, ".g_idx", groups, group)
        super().__init__((num_rows, num_columns))

    def unpack(self, rows: slice | torch.Tensor, device: torch.device) -> QuantisedWeight:
        """See `StoredRows.unpack`."""
        bits, num_columns = self._scheme.bits, self.shape[1]
        words = self._qweight[:, rows].to(device)  # [K bits / 32, R]
        codes = unpack_dense(_bytes(words.T.contiguous()), bits, num_columns)
        zeros = unpack_dense(_bytes(self._qzeros.to(device)), bits, self._scales.shape[1])
        zeros = zeros[:, rows].T.float()
        if self._scheme.zeros_less_one:
            zeros = torch.remainder(zeros + 1.0, float(1 << bits))
        columns = None
        if self._columns is not None:
            columns = self._columns.to(device)
            codes = codes.index_select(1, columns)
        scales = self._scales[:, rows].to(device).T.float().contiguous()
        return QuantisedCodes(
            bits=bits,
            group=num_columns // scales.shape[1],
            codes=codes,
            scales=scales,
            minima=zeros.mul_(scales).neg_(),
            columns=columns,
        )


class StoredAWQ(StoredRows):
    """An AWQ layer; see the head of this module.

    Args:
        tensors: Of the layer.
        scheme: Of layout "awq".

    Raises:
        CheckpointError: Tensors are missing, misshapen or contradict the scheme.
    """

    def __init__(self, tensors: ModuleTensors, scheme: WeightScheme) -> None:
        self._qweight = tensors.get(".qweight", torch.int32)
        num_columns, words = _two_sizes(tensors, ".qweight", self._qweight)
        group = scheme.group or num_columns
        num_groups = _num_groups(tensors, ".qweight", num_columns, group)
        self._scales = tensors.shaped(".scales", (num_groups, words * 8), *_FLOATS)
        self._qzeros = tensors.shaped(".qzeros", (num_groups, words), torch.int32)
        super().__init__((words * 8, num_columns))

    def unpack(self, rows: slice | torch.Tensor, device: torch.device) -> QuantisedWeight:
        """See `StoredRows.unpack`."""
        # Eight rows share a word.
        words = slice(0, self._qweight.shape[1])
        if isinstance(rows, slice):
            words = slice(rows.start // 8, -(-rows.stop // 8))
            rows = slice(rows.start - words.start * 8, rows.stop - words.start * 8)
        codes = _awq_codes(self._qweight[:, words].to(device)).T.contiguous()
        scales = self._scales[:, words.start * 8 : words.stop * 8].to(device).float().T.contiguous()
        zeros = _awq_codes(self._qzeros[:, words].to(device)).T.float()
        weight = QuantisedCodes(
            bits=4,
            group=self.shape[1] // scales.shape[1],
            codes=codes,
            scales=scales,
            minima=zeros.mul_(scales).neg_(),
        )
        return chosen_rows(weight, rows)


class StoredPacked(StoredRows):
    """A layer that compressed-tensors packed; see the head of this module.

    Args:
        tensors: Of the layer.
        scheme: Of layout "packed".

    Raises:
        CheckpointError: Tensors are missing, misshapen or contradict the scheme.
    """

    def __init__(self, tensors: ModuleTensors, scheme: WeightScheme) -> None:
        bits = scheme.bits
        self._scheme = scheme
        shape = tensors.shaped(".weight_shape", (2,), torch.int64, torch.int32)
        num_rows, num_columns = map(int, shape.tolist())
        self._packed = tensors.shaped(
            ".weight_packed", (num_rows, -(-num_columns * bits // 32)), torch.int32
        )
        group = scheme.group or num_columns
        num_groups = _num_groups(tensors, ".weight_shape", num_columns, group)
        self._scales = tensors.get(".weight_scale", *_FLOATS)
        if self._scales.numel() == 1:
            self._scales = self._scales.view(1, 1).expand(num_rows, num_groups)
        else:
            self._scales = tensors.shaped(".weight_scale", (num_rows, num_groups), *_FLOATS)
        self._zeros = None
        if not scheme.is_symmetric:
            words = (-(-num_rows * bits // 32), num_groups)
            self._zeros = tensors.shaped(".weight_zero_point", words, torch.int32)
        self._columns = None
        if tensors.has(".weight_g_idx"):
            groups = tensors.shaped(".weight_g_idx", (num_columns,), torch.int32, torch.int64)
            self._columns = _sorted_columns(tensors, ".weight_g_idx", groups, group)
        super().__init__((num_rows, num_columns))

    def unpack(self, rows: slice | torch.Tensor, device: torch.device) -> QuantisedWeight:
        """See `StoredRows.unpack`."""
        bits, num_columns = self._scheme.bits, self.shape[1]
        codes = unpack_dense(_bytes(self._packed[rows].to(device)), bits, num_columns)
        scales = self._scales[rows].to(device).float().contiguous()
        zeros = torch.full_like(scales, float(1 << (bits - 1)))
        if self._zeros is not None:
            words = self._zeros.to(device).T.contiguous()
            zeros = unpack_dense(_bytes(words), bits, self._packed.shape[0])[:, rows].T.float()
        columns = None
        if self._columns is not None:
            columns = self._columns.to(device)
            codes = codes.index_select(1, columns)
        return QuantisedCodes(
            bits=bits,
            group=num_columns // scales.shape[1],
            codes=codes,
            scales=scales,
            minima=zeros.mul_(scales).neg_(),
            columns=columns,
        )


def _two_sizes(tensors: ModuleTensors, ending: str, tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        tensors.wrong(ending, f"has the shape {tuple(tensor.shape)}", "two dimensions")
    return tensor.shape[0], tensor.shape[1]


def _num_groups(tensors: ModuleTensors, ending: str, num_columns: int, group: int) -> int:
    if num_columns % group:
        found = f"stands for {num_columns} columns"
        tensors.wrong(ending, found, f"a multiple of the group size {group}")
    return num_columns // group


def _sorted_columns(
    tensors: ModuleTensors, ending: str, groups: torch.Tensor, group: int
) -> torch.Tensor | None:
    """Columns sorted by their group; None where they are already."""
    num_columns = groups.shape[0]
    found = groups.long()
    columns = torch.argsort(found, stable=True)
    if not torch.equal(found[columns], torch.arange(num_columns) // group):
        expected = f"every group below {num_columns // group} exactly {group} times"
        tensors.wrong(ending, "names the groups of columns otherwise", expected)
    return None if torch.equal(columns, torch.arange(num_columns)) else columns


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """[..., words] int32, contiguous -> [..., 4 words] uint8."""
    return words.contiguous().view(dtype=torch.uint8)


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    """[R, words] int32 -> new [R, 8 words] uint8."""
    num_rows, num_words = words.shape
    nibbles = unpack_dense(_bytes(words), 4, num_words * 8).view(num_rows, num_words, 8)
    places = torch.tensor(_AWQ_PLACES, device=words.device)
    return nibbles.index_select(2, places).flatten(1)
