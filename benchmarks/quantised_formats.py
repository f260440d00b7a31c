"""Weights in every quantised safetensors format, each with the numbers that its own library reads.

compressed-tensors, bitsandbytes and transformers write and read their formats themselves; float8 is
torch's, in blocks as transformers' `finegrained_fp8` scales them.
GPTQ and AWQ need a GPU to be installed: their layouts are written down here after GPTQModel's
`pack_original` and `dequantize_weight`, and AutoAWQ's `packing_utils`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Format:
    """A way to store weights.

    Attributes:
        config: `quantization_config`.
        write: Weight [N, K] float32 -> (tensors by ending, the numbers they stand for).
    """

    config: dict[str, Any]
    write: Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


Written = tuple[dict[str, torch.Tensor], torch.Tensor]


def _pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """GPTQModel's `pack_original` along the first axis: [K, N] -> [K bits / 32, N] uint32."""
    codes = codes.astype(np.uint64)
    num_codes = codes.shape[0]
    words = np.zeros((-(-num_codes * bits // 32), codes.shape[1]), np.uint64)
    for index in range(num_codes):
        word, shift = divmod(index * bits, 32)
        words[word] |= (codes[index] << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[word + 1] |= codes[index] >> np.uint64(32 - shift)
    return words.astype(np.uint32)


def _min_max(
    weight: torch.Tensor, group: int, bits: int, *, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (as float16 has them) and zero points [N, G] of weight [N, K]."""
    groups = weight.view(weight.shape[0], -1, group)
    most = (1 << bits) - 1
    if sym:
        scales = groups.abs().amax(-1) * 2 / most
        zeros = torch.full_like(scales, float(1 << (bits - 1)))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / most
        zeros = (-low / scales).round().clamp(1, most)
    return scales.half().float(), zeros


def gptq(
    weight: torch.Tensor, bits: int, group: int, *, sym: bool, act_order: bool, version: int
) -> Written:
    num_columns = weight.shape[1]
    group = num_columns if group == -1 else group
    g_idx = torch.arange(num_columns) // group
    if act_order:
        g_idx = g_idx[torch.randperm(num_columns, generator=torch.Generator().manual_seed(3))]
    sorted_weight = weight[:, torch.argsort(g_idx, stable=True)]
    scales, zeros = _min_max(sorted_weight, group, bits, sym=sym)
    per_column = scales[:, g_idx], zeros[:, g_idx]
    codes = (weight / per_column[0] + per_column[1]).round().clamp(0, (1 << bits) - 1)
    stored_zeros = zeros - 1 if version == 1 else zeros
    tensors = {
        ".qweight": torch.from_numpy(_pack_words(codes.T.numpy(), bits).view(np.int32)),
        ".qzeros": torch.from_numpy(
            _pack_words(stored_zeros.numpy(), bits).T.copy().view(np.int32)
        ),
        ".scales": scales.T.half().contiguous(),
        ".g_idx": g_idx.to(torch.int32),
    }
    return tensors, (codes - per_column[1]) * per_column[0]


def awq(weight: torch.Tensor, group: int) -> Written:
    scales, zeros = _min_max(weight, group, 4, sym=False)
    wide = scales.repeat_interleave(group, 1), zeros.repeat_interleave(group, 1)
    codes = (weight / wide[0] + wide[1]).round().clamp(0, 15)

    def pack(values: torch.Tensor) -> torch.Tensor:
        """[R, N] -> [R, N / 8], as AutoAWQ's WQLinear_GEMM.from_linear."""
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        eights = values.to(torch.int64).view(values.shape[0], -1, 8)
        words = sum(eights[:, :, order[place]] << (4 * place) for place in range(8))
        return words.to(torch.uint32).view(torch.int32).contiguous()

    tensors = {
        ".qweight": pack(codes.T),
        ".qzeros": pack(zeros.T),
        ".scales": scales.T.half().contiguous(),
    }
    return tensors, (codes - wide[1]) * wide[0]


def compressed(weight: torch.Tensor, scheme: dict[str, Any], kind: str) -> Written:
    """Scale, compress and decompress with the library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**scheme)
    num_rows, num_columns = weight.shape
    if args.strategy == "tensor":
        tiles = weight.reshape(1, 1, -1)
    elif args.strategy == "block":
        high, wide = args.block_structure
        tiles = weight.view(num_rows // high, high, num_columns // wide, wide).transpose(1, 2)
        tiles = tiles.flatten(2)
    else:
        tiles = weight.view(num_rows, -1, args.group_size or num_columns)
    scales, zeros = calculate_qparams(tiles.amin(-1), tiles.amax(-1), args)
    state = {"weight": weight, "weight_scale": scales.float()}
    if not args.symmetric:
        state["weight_zero_point"] = zeros.to(torch.int8)
    if args.strategy == "tensor":
        state["weight_scale"] = scales.float().view(1)
    compressor = BaseCompressor.get_value_from_registry(kind)
    whole = QuantizationScheme(targets=["Linear"], weights=args)
    stored = compressor.compress(state, whole)
    numbers = compressor.decompress(stored, whole)["weight"]
    return {f".{name}": value for name, value in stored.items()}, numbers.float()


def block_fp8(weight: torch.Tensor, block: tuple[int, int]) -> Written:
    num_rows, num_columns = weight.shape
    shape = (-(-num_rows // block[0]), -(-num_columns // block[1]))
    padded = torch.zeros(shape[0] * block[0], shape[1] * block[1])
    padded[:num_rows, :num_columns] = weight
    tiles = padded.view(shape[0], block[0], shape[1], block[1])
    scales = tiles.abs().amax((1, 3)) / 448.0
    values = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    values = values[:num_rows, :num_columns].contiguous()
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    numbers = values.float() * wide[:num_rows, :num_columns]
    return {".weight": values, ".weight_scale_inv": scales}, numbers


def tensor_fp8(weight: torch.Tensor, *, static: bool) -> Written:
    scale = weight.abs().amax() / 448.0
    values = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {".weight": values, ".weight_scale": scale}
    if static:
        tensors[".input_scale"] = torch.tensor(0.02)
    return tensors, values.float() * scale


def bnb_4bit(weight: torch.Tensor, kind: str, *, nested: bool, block: int = 64) -> Written:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=kind
    )
    # As one long row: 0.50's CPU code reads blocks that run on into the next row otherwise than it
    # writes them, and than a GPU reads them.
    row = functional.quantize_4bit(
        weight.view(1, -1), blocksize=block, compress_statistics=nested, quant_type=kind
    )
    assert torch.equal(row[0], packed)
    numbers = functional.dequantize_4bit(*row).view_as(weight)
    entries = {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {".weight": packed, **entries}, numbers.float()


def bnb_8bit(weight: torch.Tensor) -> Written:
    from bitsandbytes import functional

    values, scales, _ = functional.int8_vectorwise_quant(weight.half())
    numbers = functional.int8_vectorwise_dequant(values, scales)
    tensors = {
        ".weight": values,
        ".SCB": scales,
        ".weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return tensors, numbers.float()


def compressed_config(scheme: dict[str, Any], kind: str, **changes: Any) -> dict[str, Any]:
    """What llm-compressor writes into config.json."""
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, **changes}},
    }


def _gptq_format(bits: int = 4, group: int = 32, **options: Any) -> Format:
    settings = {"sym": True, "act_order": False, "version": 1, **options}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": settings["act_order"],
        "sym": settings["sym"],
        "checkpoint_format": "gptq" if settings["version"] == 1 else "gptq_v2",
        "lm_head": False,
    }
    return Format(config, lambda weight: gptq(weight, bits, group, **settings))


def _awq_format(group: int) -> Format:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    return Format(config, lambda weight: awq(weight, group))


def _compressed_format(
    kind: str, activations: dict[str, Any] | None = None, **scheme: Any
) -> Format:
    scheme = {"symmetric": True, "type": "int", "num_bits": 8, **scheme}
    config = compressed_config(scheme, kind, input_activations=activations)
    return Format(config, lambda weight: compressed(weight, scheme, kind))


def _bnb_format(kind: str, *, nested: bool) -> Format:
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    return Format(config, lambda weight: bnb_4bit(weight, kind, nested=nested))


_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
_FLOAT_TOKEN = {**_TOKEN, "type": "float"}

FORMATS: dict[str, Format] = {
    "gptq": _gptq_format(),
    "gptq-rows": _gptq_format(group=-1),
    "gptq-asymmetric": _gptq_format(sym=False),
    "gptq-act-order": _gptq_format(act_order=True, sym=False),
    "gptq-v2": _gptq_format(sym=False, version=2),
    "gptq-2bit": _gptq_format(bits=2, sym=False),
    "gptq-3bit": _gptq_format(bits=3, sym=False),
    "gptq-8bit": _gptq_format(bits=8),
    "awq": _awq_format(32),
    "w4a16": _compressed_format("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "w4a16-asymmetric": _compressed_format(
        "pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False
    ),
    "w4a16-rows": _compressed_format("pack-quantized", num_bits=4, strategy="channel"),
    "w3a16": _compressed_format("pack-quantized", num_bits=3, strategy="group", group_size=32),
    "w8a16": _compressed_format("pack-quantized", strategy="channel"),
    "w8a8": _compressed_format("int-quantized", _TOKEN, strategy="channel"),
    "w8a8-asymmetric": _compressed_format(
        "int-quantized", _TOKEN, strategy="channel", symmetric=False
    ),
    "fp8-rows": _compressed_format(
        "float-quantized", _FLOAT_TOKEN, type="float", strategy="channel"
    ),
    "fp8-tensor": _compressed_format("float-quantized", type="float", strategy="tensor"),
    "fp8-blocks": _compressed_format(
        "float-quantized", type="float", strategy="block", block_structure=[32, 32]
    ),
    "deepseek-fp8": Format(
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [48, 40],
            "fmt": "e4m3",
        },
        lambda weight: block_fp8(weight, (48, 40)),
    ),
    "static-fp8": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        lambda weight: tensor_fp8(weight, static=True),
    ),
    "nf4": _bnb_format("nf4", nested=False),
    "nf4-nested": _bnb_format("nf4", nested=True),
    "fp4": _bnb_format("fp4", nested=False),
    "llm-int8": Format(
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, bnb_8bit
    ),
}


def mxfp4(weight: torch.Tensor) -> Written:
    """Stacked experts [E, K, N] as gpt-oss stores them: blocks and scales of [E, N, K]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(weight.shape[2])
    num_experts, num_columns, num_rows = weight.shape
    shape = (num_experts, num_rows, num_columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    size = float(weight.abs().mean().log2().floor())
    scales = torch.full(shape, 126 + int(size), dtype=torch.uint8)
    scales += torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator)
    numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"blocks": blocks, "scales": scales}, numbers
