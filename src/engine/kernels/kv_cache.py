"""KV caches of 8-bit numbers: what is stored, and how it is read back.

    scale = max_d |x[d]| / LIMIT;  stored[d] = round(x[d] * (1 / scale));  x[d] ~ stored[d] * scale

for each token and KV head by itself, with LIMIT 127 (int8, to the nearest, ties to even) or 448
(fp8, e4m3). Nothing needs calibration: one token with large keys takes precision from nobody else.
Scales are 4 bytes beside the D bytes of a head, so a block takes 52 % of the memory of one in
bfloat16 at D = 128, and 53 % at 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SCALE_BYTES = 4
_SMALLEST = 2.0**-100
"""Heads without a larger entry are stored as zeros: the inverse of their scale must be finite."""


@dataclass(frozen=True, slots=True)
class QuantisedCache:
    """Keys or values of one layer in 8 bits; stands where a plain cache is a tensor.

    Attributes:
        values: [N, block_size, Hkv, D] int8 or float8_e4m3fn; on a CPU contiguous.
        scales: [N, Hkv, block_size] float32, contiguous.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """[N, block_size, Hkv, D], as a plain cache has it."""
        return self.values.shape


KVTensor = torch.Tensor | QuantisedCache
"""`k_cache` or `v_cache` of one layer."""
KVCache = tuple[KVTensor, KVTensor]
"""(`k_cache`, `v_cache`) of one layer, of one kind and shape."""


def make_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> KVTensor:
    """A new cache of one layer, not initialised.

    Args:
        shape: [N, block_size, Hkv, D].
        dtype: int8 and float8_e4m3fn make a `QuantisedCache`.
        device: Where it lives.
    """
    num_blocks, block_size, num_kv_heads, _ = shape
    values = torch.empty(tuple(shape), dtype=dtype, device=device)
    if dtype not in LIMITS:
        return values
    scales = torch.empty(num_blocks, num_kv_heads, block_size, dtype=torch.float32, device=device)
    return QuantisedCache(values, scales)


def is_heads_first(cache: torch.Tensor) -> bool:
    """Whether the tokens that a head has in a block lie behind one another in memory."""
    return cache.transpose(1, 2).is_contiguous()


def bytes_of_head(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that a cache of `dtype` takes for one token and KV head of keys, or of values."""
    return head_dim * dtype.itemsize + (_SCALE_BYTES if dtype in LIMITS else 0)


def parts_of(cache: KVTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the stored numbers, their scales); a plain cache has none."""
    if isinstance(cache, QuantisedCache):
        return cache.values, cache.scales
    return cache, None


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads as a cache of `dtype` stores them.

    Args:
        x: [..., D].
        dtype: int8 or float8_e4m3fn.

    Returns:
        (new [..., D] of `dtype`, new [...] float32 scales); all zero for a head of zeros.
    """
    wide = x.float()
    largest = wide.abs().amax(-1)
    # A number over a tensor would be its reciprocal times the number, which rounds twice.
    inverses = torch.full_like(largest, LIMITS[dtype]) / largest.clamp(min=_SMALLEST)
    ratios = wide * inverses[..., None]
    return (ratios.round() if dtype == torch.int8 else ratios).to(dtype), largest / LIMITS[dtype]


def expand(cache: KVTensor, dtype: torch.dtype) -> torch.Tensor:
    """The cache as a plain one, new [N, block_size, Hkv, D] of `dtype`."""
    if not isinstance(cache, QuantisedCache):
        return cache.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (cache.values.to(wide) * cache.scales.transpose(1, 2)[..., None]).to(dtype)
