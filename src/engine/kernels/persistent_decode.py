"""All decoder layers of a step with one token, in one launch.

    hidden = embedding[id] scale
    per layer:  qkv    = W_qkv norm(hidden)                                   QKV
                attn   = attention(rotated q, cache and rotated k, v)         ATTEND, MERGE
                hidden += W_o attn                                            OUTPUT
                act    = activation(W_gate norm(hidden)) * (W_up norm(hidden)) GATE_UP
                hidden += W_down act                                          DOWN

A layer of a small model is a few microseconds of memory traffic; as kernels of its own it is five
starts and ends of 2.5 us. Here as many programs as fit the GPU run through all layers together and
hand each other the vectors between the phases (`persistent_exchange`); weights do not depend on
those, so each program loads the first of its rows into registers before it waits. Known from Hazy
Research's "Look Ma, No Bubbles" (2025) and from Mirage's persistent kernels; neither is copied.

| argument           | shape, dtype                   | duty                                     |
|--------------------|--------------------------------|------------------------------------------|
| layers_ptr         | [layers, NUM_FIELDS] int64     | addresses of each layer, see `LayerField`|
| epoch_ptr          | [1] int32                      | epoch of the next launch, > 0; advanced  |
| input_ids_ptr      | [1] int64                      | in [0, V)                                |
| embedding_ptr      | [V, H] bf16 or fp16            | contiguous                               |
| embedding_scale_ptr| [] in the embedding's dtype    | None: no scale                           |
| positions_ptr      | [1] int64                      | as in `AttentionMetadata`                |
| slots_ptr          | [1] int64                      | likewise                                 |
| seq_lens_ptr       | [1] int32                      | likewise                                 |
| block_table_ptr    | [rows, blocks] int32           | likewise                                 |
| block_rows_ptr     | [1] int64                      | likewise; None: row 0                    |
| hidden_ptr         | [1, H], the embedding's dtype  | written: the residual stream at the end  |
| *_words_ptr        | int64                          | see `Workspace`                          |

Grid: programs that all run at once, guaranteed by a cooperative launch (a second engine on the same
GPU waits for all of its places, so neither can hold half of them), and no more than every program
has rows of every product, on which the reuse of the words relies:

Words are written again one layer later. Whoever writes them has read vectors that depend on
all programs having read the old ones: each output of a phase needs the whole input, every program
has a share of each product, and an output of attention is published after its inputs were read.

Epochs: a launch uses one per layer and one for the embedding. They are counted on the device and
start again at 1 before int32 ends, when the words of splits, which short sequences leave alone for
a long time, are cleared: no old word can be mistaken for a new one.

Numerics: those of the kernels for few rows and of decode attention, see there. No atomics: the same
input gives the same bits. int64: weight rows, block offsets. constexpr: all sizes of the model.
PHASES and the range of layers are for tests, which run the phases one launch each.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable
from engine.kernels.persistent_attention import attend_phase, merge_phase
from engine.kernels.persistent_exchange import pair, publish
from engine.kernels.persistent_product import product_phase, share_of_pairs

# Fields of a layer in the table: addresses, 0 where there is nothing, and the window.
ATTENTION_NORM = tl.constexpr(0)
QKV_WEIGHT = tl.constexpr(1)
QKV_BIAS = tl.constexpr(2)
Q_NORM = tl.constexpr(3)
K_NORM = tl.constexpr(4)
COS_SIN = tl.constexpr(5)
K_CACHE = tl.constexpr(6)
V_CACHE = tl.constexpr(7)
OUTPUT_WEIGHT = tl.constexpr(8)
OUTPUT_BIAS = tl.constexpr(9)
MLP_NORM = tl.constexpr(10)
GATE_UP_WEIGHT = tl.constexpr(11)
GATE_UP_BIAS = tl.constexpr(12)
DOWN_WEIGHT = tl.constexpr(13)
DOWN_BIAS = tl.constexpr(14)
WINDOW = tl.constexpr(15)
NUM_FIELDS = tl.constexpr(16)

# Bits of PHASES.
EMBED = tl.constexpr(1)
QKV = tl.constexpr(2)
ATTEND = tl.constexpr(4)
MERGE = tl.constexpr(8)
OUTPUT = tl.constexpr(16)
GATE_UP = tl.constexpr(32)
DOWN = tl.constexpr(64)
FINISH = tl.constexpr(128)


@triton.jit
def _address(layer_ptr, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    pointer = tl.load(layer_ptr + FIELD, eviction_policy="evict_last").to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _embed_phase(
    input_ids_ptr,
    embedding_ptr,
    scale_ptr,
    hidden_ptr,
    words_ptr,
    epoch,
    HIDDEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program's share of the embedding, into the residual stream and for everybody."""
    first, end = share_of_pairs(HIDDEN)
    row_ptr = embedding_ptr + tl.load(input_ids_ptr) * HIDDEN
    for tile in range(first, end, BLOCK_P):
        pairs = tile + tl.arange(0, BLOCK_P)
        is_pair = pairs < end
        even = tl.load(row_ptr + pairs, mask=is_pair, other=0.0)
        odd = tl.load(row_ptr + HIDDEN // 2 + pairs, mask=is_pair, other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr).to(tl.float32)
            even = (even.to(tl.float32) * scale).to(even.dtype)
            odd = (odd.to(tl.float32) * scale).to(odd.dtype)
        publish(words_ptr, pairs, pair(even, odd), epoch, is_pair)
        tl.store(hidden_ptr + pairs, even, mask=is_pair)
        tl.store(hidden_ptr + HIDDEN // 2 + pairs, odd, mask=is_pair)


@triton.jit
def _clear(words_ptr, NUM_WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's part of a clearing that all of them share."""
    for base in range(tl.program_id(0) * BLOCK, NUM_WORDS, tl.num_programs(0) * BLOCK):
        index = base + tl.arange(0, BLOCK)
        tl.store(words_ptr + index, tl.zeros([BLOCK], tl.int64), mask=index < NUM_WORDS)


@launchable
@triton.jit(do_not_specialize=["first_layer", "end_layer", "last_epoch", "stride_table"])
def persistent_kernel(
    layers_ptr,
    epoch_ptr,
    input_ids_ptr,
    embedding_ptr,
    embedding_scale_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    block_table_ptr,
    block_rows_ptr,
    hidden_ptr,
    hidden_words_ptr,
    qkv_words_ptr,
    attention_words_ptr,
    partial_words_ptr,
    stats_words_ptr,
    middle_words_ptr,
    activation_words_ptr,
    first_layer,
    end_layer,
    last_epoch,
    stride_table,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    eps,
    head_eps,
    weight_offset,
    score_scale,
    softcap,
    NUM_LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_QKV_BIAS: tl.constexpr,
    HAS_OUTPUT_BIAS: tl.constexpr,
    HAS_MLP_BIAS: tl.constexpr,
    HAS_HEAD_NORMS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SHORT_KEYS: tl.constexpr,
    SHORT_BLOCK: tl.constexpr,
    LONG_BLOCK: tl.constexpr,
    LONG_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    QKV_PAIRS: tl.constexpr,
    QKV_SPLITS: tl.constexpr,
    QKV_TILES: tl.constexpr,
    OUTPUT_PAIRS: tl.constexpr,
    OUTPUT_SPLITS: tl.constexpr,
    OUTPUT_TILES: tl.constexpr,
    GATE_UP_PAIRS: tl.constexpr,
    GATE_UP_SPLITS: tl.constexpr,
    GATE_UP_TILES: tl.constexpr,
    DOWN_PAIRS: tl.constexpr,
    DOWN_SPLITS: tl.constexpr,
    DOWN_TILES: tl.constexpr,
    THREADS: tl.constexpr,
    PHASES: tl.constexpr,
    PREFETCHES: tl.constexpr,
):
    """The phases of PHASES, of the layers [first_layer, end_layer)."""
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    qkv_size: tl.constexpr = (num_q_heads + 2 * NUM_KV_HEADS) * HEAD_DIM
    heads_size: tl.constexpr = num_q_heads * HEAD_DIM
    half: tl.constexpr = HEAD_DIM // 2
    first_epoch = tl.load(epoch_ptr)
    sequence = 0
    if block_rows_ptr is not None:
        sequence = tl.load(block_rows_ptr)
    seq_len, position, slot = tl.load(seq_lens_ptr), tl.load(positions_ptr), tl.load(slots_ptr)
    table_ptr = block_table_ptr + sequence * stride_table

    if EMBED & PHASES:
        _embed_phase(
            input_ids_ptr,
            embedding_ptr,
            embedding_scale_ptr,
            hidden_ptr,
            hidden_words_ptr,
            first_epoch,
            HIDDEN,
            OUTPUT_PAIRS,
        )

    for layer in range(first_layer, end_layer):
        layer_ptr = layers_ptr + layer * NUM_FIELDS
        before = first_epoch + layer
        epoch = before + 1
        window = tl.load(layer_ptr + WINDOW).to(tl.int32)
        output_weight_ptr = _address(layer_ptr, OUTPUT_WEIGHT, dtype)
        gate_up_weight_ptr = _address(layer_ptr, GATE_UP_WEIGHT, dtype)
        down_weight_ptr = _address(layer_ptr, DOWN_WEIGHT, dtype)
        next_qkv_ptr = _address(
            layers_ptr + tl.minimum(layer + 1, NUM_LAYERS - 1) * NUM_FIELDS, QKV_WEIGHT, dtype
        )
        if QKV & PHASES:
            product_phase(
                _address(layer_ptr, QKV_WEIGHT, dtype),
                _address(layer_ptr, QKV_BIAS, dtype),
                _address(layer_ptr, ATTENTION_NORM, dtype),
                hidden_ptr,
                hidden_words_ptr,
                before,
                qkv_words_ptr,
                epoch,
                eps,
                weight_offset,
                NUM_INNER=HIDDEN,
                NUM_ROWS=qkv_size,
                APART=half,
                IN_APART=HIDDEN // 2,
                HAS_BIAS=HAS_QKV_BIAS,
                HAS_NORM=True,
                HAS_OFFSET=HAS_OFFSET,
                ACTIVATION="",
                ADDS=False,
                BLOCK_P=QKV_PAIRS,
                BLOCK_W=BLOCK_HIDDEN,
                SPLITS=QKV_SPLITS,
                NUM_TILES=QKV_TILES,
                DTYPE=dtype,
                THREADS=THREADS,
                soon_ptr=output_weight_ptr,
                later_ptr=gate_up_weight_ptr,
                SOON=(heads_size, HIDDEN, HIDDEN // 2, False) if PREFETCHES else None,
                LATER=(HIDDEN, INNER, INNER // 2, True) if PREFETCHES else None,
            )
        if ATTEND & PHASES:
            attend_phase(
                qkv_words_ptr,
                attention_words_ptr,
                partial_words_ptr,
                stats_words_ptr,
                epoch,
                _address(layer_ptr, Q_NORM, dtype),
                _address(layer_ptr, K_NORM, dtype),
                _address(layer_ptr, COS_SIN, tl.float32),
                _address(layer_ptr, K_CACHE, dtype),
                _address(layer_ptr, V_CACHE, dtype),
                seq_len,
                position,
                slot,
                table_ptr,
                window,
                tl.where(tl.load(layer_ptr + COS_SIN) != 0, half, 0),
                score_scale,
                softcap,
                head_eps,
                weight_offset,
                stride_cache_block,
                stride_cache_token,
                stride_cache_head,
                NUM_KV_HEADS=NUM_KV_HEADS,
                GROUP=GROUP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_SIZE=BLOCK_SIZE,
                HAS_HEAD_NORMS=HAS_HEAD_NORMS,
                HAS_OFFSET=HAS_OFFSET,
                HAS_SOFTCAP=HAS_SOFTCAP,
                SHORT_KEYS=SHORT_KEYS,
                SHORT_BLOCK=SHORT_BLOCK,
                LONG_BLOCK=LONG_BLOCK,
                LONG_SPLIT=LONG_SPLIT,
                MAX_SPLITS=MAX_SPLITS,
                BLOCK_M=BLOCK_M,
                DTYPE=dtype,
                THREADS=THREADS,
            )
        if MERGE & PHASES:
            merge_phase(
                attention_words_ptr,
                partial_words_ptr,
                stats_words_ptr,
                epoch,
                seq_len,
                window,
                NUM_Q_HEADS=num_q_heads,
                HEAD_DIM=HEAD_DIM,
                SHORT_KEYS=SHORT_KEYS,
                SHORT_BLOCK=SHORT_BLOCK,
                LONG_BLOCK=LONG_BLOCK,
                LONG_SPLIT=LONG_SPLIT,
                MAX_SPLITS=MAX_SPLITS,
                BLOCK_S=BLOCK_S,
                DTYPE=dtype,
                THREADS=THREADS,
            )
        if OUTPUT & PHASES:
            product_phase(
                output_weight_ptr,
                _address(layer_ptr, OUTPUT_BIAS, dtype),
                output_weight_ptr,
                hidden_ptr,
                attention_words_ptr,
                epoch,
                middle_words_ptr,
                epoch,
                eps,
                weight_offset,
                NUM_INNER=heads_size,
                NUM_ROWS=HIDDEN,
                APART=HIDDEN // 2,
                IN_APART=half,
                HAS_BIAS=HAS_OUTPUT_BIAS,
                HAS_NORM=False,
                HAS_OFFSET=False,
                ACTIVATION="",
                ADDS=True,
                BLOCK_P=OUTPUT_PAIRS,
                BLOCK_W=BLOCK_HEADS,
                SPLITS=OUTPUT_SPLITS,
                NUM_TILES=OUTPUT_TILES,
                DTYPE=dtype,
                THREADS=THREADS,
                soon_ptr=down_weight_ptr,
                later_ptr=down_weight_ptr,
                SOON=(INNER, HIDDEN, HIDDEN // 2, False) if PREFETCHES else None,
                LATER=None,
            )
        if GATE_UP & PHASES:
            product_phase(
                gate_up_weight_ptr,
                _address(layer_ptr, GATE_UP_BIAS, dtype),
                _address(layer_ptr, MLP_NORM, dtype),
                hidden_ptr,
                middle_words_ptr,
                epoch,
                activation_words_ptr,
                epoch,
                eps,
                weight_offset,
                NUM_INNER=HIDDEN,
                NUM_ROWS=INNER,
                APART=INNER // 2,
                IN_APART=HIDDEN // 2,
                HAS_BIAS=HAS_MLP_BIAS,
                HAS_NORM=True,
                HAS_OFFSET=HAS_OFFSET,
                ACTIVATION=ACTIVATION,
                ADDS=False,
                BLOCK_P=GATE_UP_PAIRS,
                BLOCK_W=BLOCK_HIDDEN,
                SPLITS=GATE_UP_SPLITS,
                NUM_TILES=GATE_UP_TILES,
                DTYPE=dtype,
                THREADS=THREADS,
                soon_ptr=next_qkv_ptr,
                later_ptr=next_qkv_ptr,
                SOON=(HIDDEN, qkv_size, half, False) if PREFETCHES else None,
                LATER=None,
            )
        if DOWN & PHASES:
            product_phase(
                down_weight_ptr,
                _address(layer_ptr, DOWN_BIAS, dtype),
                down_weight_ptr,
                hidden_ptr,
                activation_words_ptr,
                epoch,
                hidden_words_ptr,
                epoch,
                eps,
                weight_offset,
                NUM_INNER=INNER,
                NUM_ROWS=HIDDEN,
                APART=HIDDEN // 2,
                IN_APART=INNER // 2,
                HAS_BIAS=HAS_MLP_BIAS,
                HAS_NORM=False,
                HAS_OFFSET=False,
                ACTIVATION="",
                ADDS=True,
                BLOCK_P=DOWN_PAIRS,
                BLOCK_W=BLOCK_INNER,
                SPLITS=DOWN_SPLITS,
                NUM_TILES=DOWN_TILES,
                DTYPE=dtype,
                THREADS=THREADS,
                soon_ptr=down_weight_ptr,
                later_ptr=down_weight_ptr,
                SOON=None,
                LATER=None,
            )

    if FINISH & PHASES:
        # Everybody has read the epoch: this program has seen vectors of the last layer.
        next_epoch = first_epoch + NUM_LAYERS + 1
        if next_epoch > last_epoch - NUM_LAYERS:
            next_epoch = 1
            _clear(partial_words_ptr, num_q_heads * MAX_SPLITS * HEAD_DIM, 1024)
            _clear(stats_words_ptr, num_q_heads * MAX_SPLITS * 2, 1024)
        if tl.program_id(0) == 0:
            tl.store(epoch_ptr, next_epoch)
