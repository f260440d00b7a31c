"""Codes of 2 to 8 bits out of the words that checkpoints pack them in."""

from __future__ import annotations

import torch


def unpack_dense(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes that follow each other without gaps, lowest bits first.

    That is how GPTQ and compressed-tensors fill their words: code i has bits i * `bits` to
    (i + 1) * `bits` - 1 of the row's bit string, whatever the width of the words.

    Args:
        packed: [..., bytes] uint8, little endian.
        bits: 2 to 8.
        count: Codes wanted; at most bytes * 8 / `bits`.

    Returns:
        New [..., count] uint8, contiguous.
    """
    if bits == 8:
        return packed[..., :count].contiguous()
    # `bits` bytes hold 8 codes; of a few bits, 8 / bits in a byte.
    num_bytes, num_codes = (1, 8 // bits) if 8 % bits == 0 else (bits, 8)
    num_groups = -(-count // num_codes)
    missing = num_groups * num_bytes - packed.shape[-1]
    if missing > 0:
        packed = torch.nn.functional.pad(packed, (0, missing))
    groups = packed[..., : num_groups * num_bytes].unflatten(-1, (num_groups, num_bytes))
    codes = packed.new_empty(*groups.shape[:-1], num_codes)
    for index in range(num_codes):
        first, shift = divmod(index * bits, 8)
        code = groups[..., first] >> shift
        if shift + bits > 8:
            code |= groups[..., first + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., index])
    flat = codes.flatten(-2)
    return flat if flat.shape[-1] == count else flat[..., :count].contiguous()


def halves(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high) four bits of bytes: new, of `packed`'s shape."""
    return packed & 15, packed >> 4


def unpack_pairs(packed: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """Codes of neighbouring columns in one byte: [..., bytes] uint8 -> new [..., 2 * bytes]."""
    low, high = halves(packed)
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)
