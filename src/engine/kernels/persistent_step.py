"""Launches `persistent_decode`: its tiles, and what outlives a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from engine.kernels import persistent_decode as kernel
from engine.kernels.attention_tiles import num_multiprocessors, score_factors
from engine.kernels.metadata import AttentionMetadata

_LAST_EPOCH = 2**30
_TILE_VALUES = 32768
_MAX_PREFETCHED_HIDDEN = 768
"""Largest hidden size at which asking L2 for weights ahead pays: 135M, whose layers are 7 MB."""
_MAX_HIDDEN_OF_A_WARP = 2048
"""Largest hidden size at which warps have rows of their own; beyond, all of them share each row."""
_MAX_BLOCK = 16384
"""Entries of the longest row of x that a program has registers for."""


@dataclass(frozen=True, kw_only=True)
class PersistentShape:
    """Sizes and switches of a model, as `DecoderConfig` has them."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    norm_offset: float
    softmax_scale: float
    logit_softcap: float
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_head_norms: bool

    @property
    def qkv_size(self) -> int:
        """Rows of the merged q, k and v projection."""
        return (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def heads_size(self) -> int:
        """Columns of the output projection."""
        return self.num_q_heads * self.head_dim

    @property
    def is_supported(self) -> bool:
        """Whether the kernel has tiles for these sizes."""
        sizes = (self.hidden_size, self.heads_size, self.intermediate_size)
        is_power = self.head_dim & (self.head_dim - 1) == 0
        return (
            is_power
            and 32 <= self.head_dim <= 256
            and self.num_q_heads // self.num_kv_heads <= 30
            and all(size % 8 == 0 and size <= _MAX_BLOCK for size in sizes)
        )


@dataclass(frozen=True, kw_only=True)
class PersistentTiles:
    """Launch shape of the kernel, and what its results depend on.

    Attributes:
        num_warps: Warps per program.
        programs_per_processor: Programs that share a multiprocessor.
        tile_values: Weights that a program loads at once.
        short_values: Entries of keys of a split of a short sequence, read by each query head.
        short_keys: Keys up to which a sequence is short: from long_split on, and at most
            max_splits tiles.
        long_block: Keys per tile of longer ones, of a power of two.
        long_split: Keys per split of longer ones, where max_splits are enough.
        max_splits: Most splits of a sequence, a power of two.
        merge_splits: Splits that are joined at once.
    """

    num_warps: int = 8
    programs_per_processor: int = 1
    tile_values: int = _TILE_VALUES
    short_values: int = 16384
    short_keys: int = 1024
    long_block: int = 128
    long_split: int = 512
    max_splits: int = 32
    merge_splits: int = 8


class Workspace:
    """The vectors between the phases, and the epoch. Letters: one step at a time uses it.

    Attributes:
        epoch: [1] int32.
        hidden: [H] values, words of two; likewise `middle`, after attention.
        qkv: [(Hq + 2 Hkv) D] values.
        attention: [Hq D] values.
        activation: [I] values.
        partial: [Hq, max_splits, D] words of one fp32 each.
        stats: [Hq, max_splits, 2] likewise.
    """

    def __init__(self, shape: PersistentShape, max_splits: int, device: torch.device) -> None:
        def words(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        self.epoch = torch.ones(1, dtype=torch.int32, device=device)
        self.hidden, self.middle = words(shape.hidden_size // 2), words(shape.hidden_size // 2)
        self.qkv = words(shape.qkv_size // 2)
        self.attention = words(shape.heads_size // 2)
        self.activation = words(shape.intermediate_size // 2)
        self.partial = words(shape.heads_size * max_splits)
        self.stats = words(shape.num_q_heads * max_splits * 2)


class PersistentStep:
    """Runs all layers of a model for steps of one token.

    Args:
        shape: Sizes of the model; `is_supported`.
        layers: Per layer, the tensors of `persistent_decode`'s fields in their order, None where
            there is nothing, and the window in tokens, 0 for none. Tensors are contiguous, and must
            stay alive and where they are as long as this object is used.
        embedding: [V, H].
        embedding_scale: [] or None.
        tiles: Default: as measured.
    """

    def __init__(
        self,
        shape: PersistentShape,
        layers: Sequence[tuple[Sequence[torch.Tensor | None], int]],
        embedding: torch.Tensor,
        embedding_scale: torch.Tensor | None,
        tiles: PersistentTiles | None = None,
    ) -> None:
        self._shape = shape
        self._embedding = embedding
        self._embedding_scale = embedding_scale
        self.tiles = tiles or PersistentTiles()
        rows = [
            [0 if tensor is None else tensor.data_ptr() for tensor in tensors] + [window]
            for tensors, window in layers
        ]
        self._layers = torch.tensor(rows, dtype=torch.int64).to(embedding.device)
        self.workspace = Workspace(shape, self.tiles.max_splits, embedding.device)
        k_cache = layers[0][0][kernel.K_CACHE.value]
        assert k_cache is not None, "every layer has a cache"
        self._block_size = k_cache.shape[1]
        self._cache_strides = k_cache.stride()[:3]
        self._prefetches = shape.hidden_size <= _MAX_PREFETCHED_HIDDEN and _has_bulk_prefetch(
            embedding.device
        )
        self.last_epoch = _LAST_EPOCH

    def __call__(
        self,
        input_ids: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        phases: int = 255,
        layers: tuple[int, int] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The residual stream after the last layer, new [1, H]; keys and values are stored.

        Args:
            input_ids: [1] int64.
            metadata: Of one decoding sequence, or of a row of padding.
            phases: Bits of the phases to run; all but in tests.
            layers: First and end; all but in tests.
            out: [1, H], the residual stream so far; only in tests.
        """
        shape, tiles, words = self._shape, self.tiles, self.workspace
        if out is None:
            out = self._embedding.new_empty(1, shape.hidden_size)
        first_layer, end_layer = layers or (0, shape.num_layers)
        score_scale, softcap = score_factors(shape.softmax_scale, shape.logit_softcap)
        kernel.persistent_kernel[(self.num_programs,)](
            self._layers,
            words.epoch,
            input_ids,
            self._embedding,
            self._embedding_scale,
            metadata.positions,
            metadata.slot_mapping,
            metadata.seq_lens,
            metadata.block_table,
            metadata.block_rows,
            out,
            words.hidden,
            words.qkv,
            words.attention,
            words.partial,
            words.stats,
            words.middle,
            words.activation,
            first_layer,
            end_layer,
            self.last_epoch,
            metadata.block_table.stride(0),
            *self._cache_strides,
            shape.norm_eps,
            shape.norm_eps,
            shape.norm_offset,
            score_scale,
            softcap,
            **self.constants(out.is_cuda),
            PHASES=phases,
            num_warps=tiles.num_warps,
            num_stages=1,
            enable_fp_fusion=True,
            launch_cooperative_grid=out.is_cuda,
        )
        return out

    @property
    def num_programs(self) -> int:
        """As many as run at once, and no more than there are pairs of rows of each product."""
        shape, tiles = self._shape, self.tiles
        pairs = min(shape.hidden_size, shape.qkv_size, shape.intermediate_size) // 2
        processors = num_multiprocessors(self._embedding.device)
        return min(processors * tiles.programs_per_processor, pairs)

    def constants(self, has_threads: bool) -> dict[str, Any]:
        """The kernel's compile-time arguments but PHASES."""
        shape, tiles = self._shape, self.tiles
        group = shape.num_q_heads // shape.num_kv_heads
        words = {
            name: triton.next_power_of_2(size // 2)
            for name, size in (
                ("hidden", shape.hidden_size),
                ("heads", shape.heads_size),
                ("inner", shape.intermediate_size),
            )
        }
        is_row_shared = shape.hidden_size > _MAX_HIDDEN_OF_A_WARP
        products = {}
        for name, num_rows, block, num_weights in (
            ("QKV", shape.qkv_size, words["hidden"], 1),
            ("OUTPUT", shape.hidden_size, words["heads"], 1),
            ("GATE_UP", shape.intermediate_size, words["hidden"], 2),
            ("DOWN", shape.hidden_size, words["inner"], 1),
        ):
            share = -(-(num_rows // 2) // self.num_programs)
            most = max(1, tiles.tile_values // (4 * block * num_weights))
            pairs = min(triton.next_power_of_2(share), most)
            chunks = max(1, block // 256)
            products[f"{name}_PAIRS"] = pairs
            splits = tiles.num_warps if is_row_shared else max(1, tiles.num_warps // pairs)
            products[f"{name}_SPLITS"] = min(splits, chunks)
            products[f"{name}_TILES"] = -(-share // pairs)
        return {
            "NUM_LAYERS": shape.num_layers,
            "HIDDEN": shape.hidden_size,
            "INNER": shape.intermediate_size,
            "NUM_KV_HEADS": shape.num_kv_heads,
            "GROUP": group,
            "HEAD_DIM": shape.head_dim,
            "BLOCK_SIZE": self._block_size,
            "ACTIVATION": shape.activation,
            "HAS_QKV_BIAS": shape.has_qkv_bias,
            "HAS_OUTPUT_BIAS": shape.has_output_bias,
            "HAS_MLP_BIAS": shape.has_mlp_bias,
            "HAS_HEAD_NORMS": shape.has_head_norms,
            "HAS_OFFSET": shape.norm_offset != 0.0,
            "HAS_SOFTCAP": shape.logit_softcap != 0.0,
            "SHORT_KEYS": tiles.short_keys,
            "SHORT_BLOCK": tiles.short_values // shape.head_dim,
            "LONG_BLOCK": tiles.long_block,
            "LONG_SPLIT": tiles.long_split,
            "MAX_SPLITS": tiles.max_splits,
            "PREFETCHES": self._prefetches,
            "BLOCK_M": max(16, triton.next_power_of_2(group + 2)),
            "BLOCK_S": tiles.merge_splits,
            "BLOCK_HIDDEN": words["hidden"],
            "BLOCK_HEADS": words["heads"],
            "BLOCK_INNER": words["inner"],
            **products,
            "THREADS": 32 * tiles.num_warps if has_threads else 0,
        }


def _has_bulk_prefetch(device: torch.device) -> bool:
    """Whether one instruction asks L2 for many rows. In Triton's interpreter nothing is asked."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
