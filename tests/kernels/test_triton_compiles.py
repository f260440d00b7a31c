"""The kernels compile for Hopper, and into what their tuning notes count on.

Triton compiles for a GPU that is not there. What runs is proven elsewhere; this watches what a
change of the source or of triton could lose silently: tensor core instructions and the depth of
the load pipeline.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from engine.kernels import (
    attention_tiles,
    decode_attention,
    decode_plan,
    decode_tiles,
    few_row_linear,
    few_row_qkv,
    few_row_tiles,
    fused_linear,
    fused_qkv,
    fused_tiles,
    moe_experts,
    moe_plan,
    moe_route,
    persistent_decode,
    persistent_step,
    prefill_attention,
    prefill_hopper,
    prefill_plan,
    rope_write_kv,
    shared_prefix,
    stream_adding,
    stream_gated,
    stream_prompts,
    stream_qkv,
    stream_tiles,
)

HEAD_DIM, GROUP, NUM_KV_HEADS, BLOCK_SIZE = 128, 4, 8, 64
COMMON = {
    "NUM_KV_HEADS": NUM_KV_HEADS,
    "GROUP": GROUP,
    "HEAD_DIM": HEAD_DIM,
    "BLOCK_SIZE": BLOCK_SIZE,
    "WINDOW": 0,
    "CHUNK": 0,
    "HAS_SOFTCAP": False,
    "KEY_ALIGNMENT": attention_tiles.KEY_ALIGNMENT,
    "BLOCK_D": HEAD_DIM,
}


BF16S = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "x_ptr", "weight_ptr", "embedding_ptr", "hidden_ptr")
BF16S += (
    "sinks_ptr",
    "gate_up_ptr",
    "down_ptr",
    "gate_up_bias_ptr",
    "down_bias_ptr",
    "active_ptr",
    "y_ptr",
)
INT64S = ("block_rows_ptr", "positions_ptr", "slots_ptr", "layers_ptr", "input_ids_ptr")
FP32S = (
    "partial_ptr",
    "stats_ptr",
    "k_scales_ptr",
    "v_scales_ptr",
    "cos_sin_ptr",
    "logits_ptr",
    "choice_bias_ptr",
    "weights_ptr",
)
FLOATS = ("score_scale", "softcap", "norm_eps", "norm_weight_offset", "eps", "weight_offset")
FLOATS += ("head_eps", "swiglu_limit", "swiglu_alpha", "scale")
ALIGNED = ("num_inner", "num_columns", "num_cols", "width")


PLAIN_CACHE = {"k_scales_ptr": None, "v_scales_ptr": None}


def compile_for_hopper(
    kernel: Any, constants: dict[str, Any], *, cache: str = "bf16", **options: int
) -> Any:
    """What Triton makes of a bf16 attention kernel, with caches of any type."""
    kernel = kernel.jit
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif cache != "bf16" and name in ("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"):
            is_pair = kernel is decode_attention._split_kernel.jit and name == "v_ptr"
            signature[name] = "*i16" if is_pair else f"*{cache}"
        elif name in BF16S or "norm_weight_ptr" in name:
            signature[name] = "*bf16"
        elif name.endswith("_desc"):
            rows = constants["HALF"] if name == "w_desc" else 64
            signature[name] = f"tensordesc<bf16[{rows}, 64],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
        elif name in FP32S or "squares_ptr" in name:
            signature[name] = "*fp32"
        elif name in INT64S or name.endswith("words_ptr"):
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = "*i32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    # What the launcher finds out by itself: pointers, strides and K are multiples of 16.
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in constants
        and (name.endswith("_ptr") or name.startswith("stride_") or name in ALIGNED)
    ]
    make_source = GluonASTSource if {"k_desc", "x_desc"} & {*names} else ASTSource
    source = make_source(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})


def tile_buffers(gpu_ir: str, *shape: int, dtype: str = "bf16") -> list[int]:
    """Buffers of each tile of a shape in shared memory."""
    pattern = rf"memdesc<(\d+)x{'x'.join(map(str, shape))}x{dtype}[^>]*mutable> loc"
    return [
        int(found)
        for line in gpu_ir.splitlines()
        if "local_alloc" in line
        for found in re.findall(pattern, line)
    ]


def compile_decode(
    cache: str, *, has_prefixes: bool = False
) -> tuple[Any, decode_tiles.DecodeTiles]:
    stored = {"bf16": torch.bfloat16, "i8": torch.int8, "fp8e4nv": torch.float8_e4m3fn}[cache]
    tiles = decode_tiles.decode_tiles(torch.bfloat16, HEAD_DIM, stored, GROUP)
    constants = {
        **COMMON,
        **(PLAIN_CACHE if cache == "bf16" else {}),
        "sinks_ptr": None,
        "HAS_LOW": False,
        "IS_ASSEMBLED": True,
        "HEADS": NUM_KV_HEADS,
        "STRIDE_CACHE_TOKEN": NUM_KV_HEADS * HEAD_DIM,
        "STARTS_EARLY": True,
        "HAS_PREFIXES": has_prefixes,
        "ITEM": decode_plan.ITEM,
        "COLUMN": decode_plan.COLUMN,
        "BLOCK_M": 16,
        "BLOCK_N": tiles.block_n,
        "BLOCK_G": GROUP,
        "BLOCK_G_D": HEAD_DIM,
        "BLOCK_S": 8,
        "BLOCK_ITEMS": 32,
    }
    for unused in ("KEY_ALIGNMENT", "NUM_KV_HEADS", "WINDOW", "CHUNK"):
        del constants[unused]
    compiled = compile_for_hopper(
        decode_attention._split_kernel,
        constants,
        cache=cache,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return compiled, tiles


@pytest.mark.parametrize("has_prefixes", [False, True])
def test_decode_loads_tiles_ahead(has_prefixes: bool) -> None:
    compiled, tiles = compile_decode("bf16", has_prefixes=has_prefixes)
    ptx, gpu_ir = compiled.asm["ptx"], compiled.asm["ttgir"]
    assert "mma.sync" in ptx
    # Queries and keys are read after the kernel that stores them, the plan before its end. Private
    # keys are read beside the kernel of shared prefixes, whose sums the merge waits for.
    order = re.findall(r"griddepcontrol\.wait|cp\.async\.cg|atom\.|ld\.global", ptx)
    runs = [name for name, _ in itertools.groupby(order)]
    if has_prefixes:
        assert runs.count("griddepcontrol.wait") == 1
        assert runs.index("cp.async.cg") < runs.index("griddepcontrol.wait") < runs.index("atom.")
    else:
        assert runs[:2] == ["griddepcontrol.wait", "ld.global"]
        assert runs.index("griddepcontrol.wait", 1) < runs.index("cp.async.cg")
        assert runs.count("griddepcontrol.wait") == 2
    buffers = tile_buffers(gpu_ir, tiles.block_n, HEAD_DIM)
    assert buffers
    assert min(buffers) >= tiles.num_stages - 1


QKV = {"BLOCK_SIZE": 64, "NUM_Q_HEADS": 9, "NUM_KV_HEADS": 3, "STARTS_NEXT": True}
NORMED_HEADS = {
    **dict.fromkeys(("q_norm_weight_ptr", "k_norm_weight_ptr")),
    **dict.fromkeys(("HAS_Q_NORM", "HAS_K_NORM", "HAS_NORM_OFFSET"), False),
    "LIMIT": 0.0,
    **PLAIN_CACHE,
}


@pytest.mark.parametrize("kernel", ["rope_write_kv", "normed_qkv", "scaled_qkv", "scaled_qkv, PDL"])
def test_attention_may_start_while_its_keys_are_stored(kernel: str) -> None:
    x, weight = (torch.empty(n, 576, device="meta").bfloat16() for n in (8, 960))
    if kernel == "rope_write_kv":
        constants = {**QKV, **NORMED_HEADS, "HEAD_DIM": 64, "HALF_ROT": 32}
        constants |= {"BLOCK_H": 8, "BLOCK_D": 64}
        compiled = compile_for_hopper(rope_write_kv._rope_write_kv_kernel, constants, num_warps=2)
    elif kernel == "normed_qkv":
        tiles = few_row_tiles.tiles_for("qkv", x, weight)
        constants = {**QKV, "HALF": 32, "bias_ptr": None, "BLOCK_SQUARES": 16, "EVEN_K": False}
        constants |= {"HAS_BIAS": False, "HAS_OFFSET": False, "HAS_ROTATION": True}
        constants |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
        constants |= {"BLOCK_K": tiles.block_k, "NUM_STAGES": tiles.num_stages}
        compiled = compile_for_hopper(few_row_qkv._normed_qkv_kernel, constants, num_warps=4)
    else:
        constants = fused_tiles.tiles_for("qkv", x, weight).constants(576)
        for option in ("enable_fp_fusion", "launch_pdl", "num_warps"):
            del constants[option]
        constants |= {**QKV, **NORMED_HEADS, "HALF": 32, "HAS_ROTATION": True, "bias_ptr": None}
        constants |= {"HAS_BIAS": False, "HAS_SCALE": True, "BLOCK_SQUARES": 16}
        constants["USE_PDL"] = kernel.endswith("PDL")
        compiled = compile_for_hopper(fused_qkv._scaled_qkv_kernel, constants, num_warps=4)
    assert compiled.asm["ptx"].count("griddepcontrol.launch_dependents") == 1


@pytest.mark.parametrize("cache", ["i8", "fp8e4nv"])
def test_decode_over_eight_bits_fetches_no_single_bytes(cache: str) -> None:
    compiled, tiles = compile_decode(cache)
    ptx, gpu_ir, sass = (compiled.asm[kind] for kind in ("ptx", "ttgir", "sass"))
    assert "cp.async.cg" in ptx
    keys = tile_buffers(
        gpu_ir, tiles.block_n, HEAD_DIM, dtype={"i8": "i8", "fp8e4nv": "f8E4M3FN"}[cache]
    )
    scales = tile_buffers(gpu_ir, tiles.block_n, dtype="f32")
    assert len(keys) == 1
    assert len(scales) == 2
    assert min(keys + scales) >= tiles.num_stages - 1
    # Values wait in registers: loads before the loop, and in it for a tile to come.
    assert len(re.findall(r"tt\.load .*x!tt\.ptr<i16>", gpu_ir)) == tiles.num_stages
    # They come through the matrix loads that turn 16-bit numbers round.
    assert "LDSM.16.MT88" in sass
    assert not re.search(r"LDS\.[US]8|F2F\.BF16|I2F", sass)
    assert len(re.findall(r"\b(LDL|STL)\b", sass)) < 8


@pytest.mark.parametrize("cache", ["bf16", "i8", "fp8e4nv"])
def test_shared_prefixes_multiply_by_warp_groups(cache: str) -> None:
    tiles = shared_prefix.prefix_tiles(torch.bfloat16, HEAD_DIM)
    constants = {
        **{
            name: value
            for name, value in COMMON.items()
            if name not in ("WINDOW", "CHUNK", "KEY_ALIGNMENT")
        },
        **(PLAIN_CACHE if cache == "bf16" else {}),
        "STARTS_NEXT": True,
        "ITEM": decode_plan.ITEM,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }
    asm = compile_for_hopper(
        shared_prefix._prefix_kernel,
        constants,
        cache=cache,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    ).asm
    ptx, gpu_ir = asm["ptx"], asm["ttgir"]
    assert "wgmma.mma_async" in ptx
    assert "griddepcontrol.launch_dependents" in ptx
    stored = {"bf16": "bf16", "i8": "i8", "fp8e4nv": "f8E4M3FN"}[cache]
    buffers = tile_buffers(gpu_ir, tiles.block_n, HEAD_DIM, dtype=stored)
    assert buffers
    assert min(buffers) >= tiles.num_stages - (cache != "bf16")


@pytest.mark.parametrize(
    ("is_persistent", "cache", "extra"),
    [
        (False, "bf16", {}),
        (True, "bf16", {}),
        (True, "bf16", {"CHUNK": 8192}),
        (False, "i8", {}),
        (True, "fp8e4nv", {}),
    ],
)
def test_prefill_multiplies_by_warp_groups(
    is_persistent: bool, cache: str, extra: dict[str, Any]
) -> None:
    tiles = prefill_attention.prefill_tiles(torch.bfloat16, HEAD_DIM)
    constants = {
        **COMMON,
        **(PLAIN_CACHE if cache == "bf16" else {}),
        "sinks_ptr": None,
        "IS_PERSISTENT": is_persistent,
        "HEADER": prefill_plan.HEADER,
        "ITEM": prefill_plan.ITEM,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        **extra,
    }
    if extra:  # and sinks
        del constants["sinks_ptr"]
    asm = compile_for_hopper(
        prefill_attention._prefill_kernel,
        constants,
        cache=cache,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    ).asm
    ptx, gpu_ir = asm["ptx"], asm["ttgir"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx
    stored = {"bf16": "bf16", "i8": "i8", "fp8e4nv": "f8E4M3FN"}[cache]
    buffers = tile_buffers(gpu_ir, tiles.block_n, HEAD_DIM, dtype=stored)
    assert buffers
    assert min(buffers) >= tiles.num_stages - (cache != "bf16")


@pytest.mark.parametrize(
    ("head_dim", "group", "num_kv_heads", "num_tokens", "has_sinks"),
    [
        (128, 4, 8, 100, False),
        (64, 3, 3, 100, False),
        (64, 3, 3, 8192, False),
        (64, 8, 8, 8192, True),
    ],
)
def test_prefill_on_hopper_overlaps_softmax_and_products(
    head_dim: int, group: int, num_kv_heads: int, num_tokens: int, has_sinks: bool
) -> None:
    tiles = prefill_hopper.hopper_tiles(head_dim, num_tokens)
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": BLOCK_SIZE,
        "HAS_SINKS": has_sinks,
        "HEADS_FIRST": num_tokens != 100,
        "CONSUMERS": tiles.consumers,
        "CONSUMER_REGISTERS": tiles.consumer_registers,
        "LOADER_REGISTERS": prefill_hopper.LOADER_REGISTERS,
        "ROWS": prefill_hopper.ROWS,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.stages,
    }
    asm = compile_for_hopper(
        prefill_hopper._prefill_hopper_kernel,
        constants,
        num_warps=4,
        maxnreg=tiles.max_registers,
    ).asm
    assert "cp.async.bulk.tensor" in asm["ptx"]
    # In the machine code of a loop: two products issued, the older one's wait (1 in flight), the
    # exponentials, the wait for the other. ptxas may move the last in front of the exponentials.
    found = re.findall(r"DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2|HGMMA", asm["sass"])
    runs = [(name, len(list(run))) for name, run in itertools.groupby(found)]
    waits = [index for index, (name, _) in enumerate(runs) if name.endswith("0x1")]
    assert len(waits) == 2 * tiles.consumers, "two loops of each consumer, masked and not"
    num_exponentials = prefill_hopper.ROWS * tiles.block_n // 128
    for index in waits:
        assert runs[index + 1][0] == "MUFU.EX2"
        assert runs[index + 1][1] >= num_exponentials
        assert runs[index + 2][0].endswith("0x0")


@pytest.mark.parametrize("kind", ["plain", "normed", "gated", "adding"])
@pytest.mark.parametrize("num_rows", [1, 16])
def test_few_rows_keep_their_stages_in_flight(kind: str, num_rows: int) -> None:
    num_inner = 4096
    x, weight = (torch.empty(n, num_inner, device="meta").bfloat16() for n in (num_rows, 4096))
    tiles = few_row_tiles.tiles_for(kind, x, weight)
    has_norm = kind in ("normed", "gated")
    missing = ["bias_ptr"]
    missing += [] if has_norm else ["norm_weight_ptr", "squares_ptr"]
    missing += [] if kind == "adding" else ["new_squares_ptr"]
    constants = {
        **dict.fromkeys(missing),
        "HAS_BIAS": False,
        "HAS_NORM": has_norm,
        "HAS_OFFSET": False,
        "ACTIVATION": "silu" if kind == "gated" else "",
        "ADDS": kind == "adding",
        "BLOCK_SQUARES": 256,
        "EVEN_K": True,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "NUM_STAGES": tiles.num_stages,
    }
    kernel = few_row_linear._few_row_kernel
    asm = compile_for_hopper(kernel, constants, num_warps=tiles.num_warps, num_stages=3).asm
    ptx, gpu_ir = asm["ptx"], asm["ttgir"]
    assert ("mma" in ptx) == (num_rows > 1)
    if tiles.num_stages > 1:
        assert "cp.async.cg" in ptx
        buffers = tile_buffers(gpu_ir, tiles.block_n, tiles.block_k)
        assert len(buffers) >= (2 if kind == "gated" else 1)
        assert min(buffers) >= tiles.num_stages - 1


SHAPES = {
    "llama-135m": (30, 576, 1536, 9, 3, 64),
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 128),
    "llama-8b": (32, 4096, 14336, 32, 8, 128),
}


def loads_before_waits(sass: str) -> int:
    """Vectors that are waited for right after 16-byte loads were issued.

    Only the norm's weight may be laid out in between, over shared memory.
    """
    order = re.findall(r"LDG\.E\.128|LDG\.E\.64\.STRONG|BAR\.SYNC", sass)
    runs = [(found, len(list(run))) for found, run in itertools.groupby(order)]
    steps = [found for found, length in runs if found != "BAR.SYNC" or length > 4]
    return sum(pair == ("LDG.E.128", "LDG.E.64.STRONG") for pair in itertools.pairwise(steps))


@pytest.mark.parametrize("name", SHAPES)
def test_programs_wait_with_their_weights_on_the_way(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    num_layers, hidden_size, intermediate_size, num_q_heads, num_kv_heads, head_dim = SHAPES[name]
    shape = persistent_step.PersistentShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        activation="silu",
        norm_eps=1e-5,
        norm_offset=0.0,
        softmax_scale=head_dim**-0.5,
        logit_softcap=0.0,
        has_qkv_bias=False,
        has_output_bias=False,
        has_mlp_bias=False,
        has_head_norms=name == "qwen3-0.6b",
    )
    monkeypatch.setattr(persistent_step, "num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(persistent_step, "_has_bulk_prefetch", lambda _: True)
    cache = torch.empty(1, BLOCK_SIZE, num_kv_heads, head_dim)
    step = persistent_step.PersistentStep(
        shape, [([*[None] * 6, cache, cache], 0)], torch.empty(1, hidden_size), None
    )

    def compile_phases(phases: int) -> Any:
        return compile_for_hopper(
            persistent_decode.persistent_kernel,
            {
                **step.constants(has_threads=True),
                "PHASES": phases,
                "embedding_scale_ptr": None,
            },
            num_warps=step.tiles.num_warps,
            num_stages=1,
            launch_cooperative_grid=True,
        )

    compiled = compile_phases(255)
    assert compiled.metadata.launch_cooperative_grid
    # One wait for qkv's, attention's, output's, gate_up's and down's input, and four in the
    # merge: the compiler may be tempted to wait again for each use of the same words.
    assert compiled.asm["ttgir"].count("AGAIN:") == 10
    # Two runs of rows per product, four of gated ones: qkv, output, gate_up and down.
    num_prefetches = compiled.asm["ptx"].count("cp.async.bulk.prefetch.L2")
    assert num_prefetches == (10 if name == "llama-135m" else 0)
    sass = compiled.asm["sass"]
    assert loads_before_waits(sass) >= 3  # of the first 4096 instructions, which is all there is
    names = ("QKV", "OUTPUT", "GATE_UP", "DOWN")
    products = sum(getattr(persistent_decode, product).value for product in names)
    assert loads_before_waits(compile_phases(products).asm["sass"]) == 4
    num_spills = len(re.findall(r"\b(LDL|STL)\b", sass))
    assert num_spills < 100


@pytest.mark.parametrize("kind", ["gated", "qkv", "adding"])
@pytest.mark.parametrize(("num_rows", "num_inner"), [(64, 576), (160, 576), (160, 3072)])
def test_fused_products_keep_their_stages_in_flight(
    kind: str, num_rows: int, num_inner: int
) -> None:
    x, weight = (torch.empty(n, num_inner, device="meta").bfloat16() for n in (num_rows, 960))
    tiles = fused_tiles.tiles_for(kind, x, weight)
    constants = tiles.constants(num_inner)
    del constants["enable_fp_fusion"]
    options = {name: constants.pop(name) for name in ("num_warps", "launch_pdl")}
    constants |= {"bias_ptr": None, "HAS_BIAS": False, "USE_PDL": True}
    if kind != "adding":
        constants |= {"HAS_SCALE": True, "BLOCK_SQUARES": 16}
    kernel = fused_linear._adding_kernel
    if kind == "gated":
        kernel = fused_linear._scaled_kernel
        constants["ACTIVATION"] = "silu"
    elif kind == "qkv":
        kernel = fused_qkv._scaled_qkv_kernel
        constants |= {**QKV, **NORMED_HEADS, "HALF": 32, "HAS_ROTATION": True}
    asm = compile_for_hopper(kernel, constants, **options).asm
    ptx, gpu_ir = asm["ptx"], asm["ttgir"]
    assert "griddepcontrol.wait" in ptx
    assert ("wgmma.mma_async" in ptx) == (tiles.block_m >= 64 or tiles.swapped)
    assert "cp.async.cg" in ptx
    for rows in {tiles.block_m, tiles.block_n}:
        buffers = tile_buffers(gpu_ir, rows, tiles.block_k)
        assert buffers
        assert min(buffers) >= tiles.num_stages - 1


def inner_loops(sass: str) -> list[str]:
    """Instructions of the loops that have no other loop within them."""
    lines = sass.splitlines()
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if re.match(r"LBB\d+:", line)}
    spans = []
    for at, line in enumerate(lines):
        found = re.search(r"BRA (LBB\d+)", line)
        if found and labels[found[1]] < at:
            spans.append((labels[found[1]], at))
    return [
        "\n".join(lines[start : end + 1])
        for start, end in spans
        if not any(start <= first and last < end for first, last in spans)
    ]


@pytest.mark.parametrize("kind", ["gated", "qkv", "adding"])
@pytest.mark.parametrize(("num_rows", "num_inner"), [(64, 576), (160, 576), (160, 1536)])
def test_products_on_hopper_load_weights_before_they_wait(
    monkeypatch: pytest.MonkeyPatch, kind: str, num_rows: int, num_inner: int
) -> None:
    if num_inner > 576 and kind != "adding":
        pytest.skip("x has the hidden size")
    monkeypatch.setattr(stream_tiles, "_is_hopper", lambda _: True)
    height = {"gated": 3072, "qkv": 960, "adding": 576}[kind]
    x, weight = (
        torch.empty(n, num_inner, device="meta", dtype=torch.bfloat16) for n in (num_rows, height)
    )
    tiles = stream_tiles.tiles_for(kind, x, weight)
    assert tiles is not None
    constants = {**tiles.constants(num_inner), "HAS_BIAS": False}
    del constants["enable_fp_fusion"]
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg", "launch_pdl")}
    kernel = stream_adding._adding_kernel
    if kind == "gated":
        kernel = stream_gated._gated_kernel
        constants |= {"HAS_SCALE": True, "ACTIVATION": "silu", "BLOCK_SQUARES": 64}
    elif kind == "qkv":
        kernel = stream_qkv._stream_qkv_kernel
        constants |= {"NUM_Q_HEADS": 9, "NUM_KV_HEADS": 3, "HEAD_DIM": 64, "BLOCK_SIZE": 64}
        constants |= {"HAS_SCALE": True, "HAS_ROTATION": True, "BLOCK_SQUARES": 64}
        constants |= dict.fromkeys(("HAS_Q_NORM", "HAS_K_NORM", "HAS_NORM_OFFSET"), False)
    compiled = compile_for_hopper(kernel, constants, **options)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    # The loader's copies: two of the weight, the wait, the rows of x, then a round of each.
    found = re.findall(r"cp\.async\.bulk\.tensor|griddepcontrol\.wait", compiled.asm["ptx"])
    order = "".join("w" if name.endswith("wait") else "c" for name in found)
    assert "ccwcccc" in order
    assert order.count("w") >= 2, "the consumer waits as well"
    sass = compiled.asm["sass"]
    loaders = [loop for loop in inner_loops(sass) if "UTMALDG" in loop]
    assert len(loaders) >= 3, "weights, rows of x, and both"
    assert not any("I2F" in loop for loop in loaders), "a division in every round"
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert compiled.metadata.shared <= 227 * 1024


def test_gated_products_of_prompts_store_by_the_16_bytes() -> None:
    tiles = stream_tiles._PROMPTS
    constants = {**tiles.constants(4096), "HAS_BIAS": False, "ACTIVATION": "silu"}
    constants |= {"CONSUMER_REGISTERS": tiles.consumer_registers, "GROUP": stream_prompts.GROUP}
    del constants["enable_fp_fusion"]
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg", "launch_pdl")}
    compiled = compile_for_hopper(stream_prompts._prompt_kernel, constants, **options)
    sass = compiled.asm["sass"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    # 64 x 128 numbers of two bytes by 128 threads, for each of two consumers.
    assert len(re.findall(r"STG\.E\.128", sass)) == 2 * 8
    assert len(re.findall(r"STG", sass)) == 2 * 8
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("kind", ["gate_up", "down"])
@pytest.mark.parametrize(("num_places", "product"), [(128, "mma.sync"), (8192 * 8, "wgmma")])
def test_experts_keep_their_stages_in_flight(kind: str, num_places: int, product: str) -> None:
    tiles = moe_experts.expert_tiles(num_places, 128, torch.bfloat16)
    constants: dict[str, Any] = {
        "EVEN_K": True,
        "TILE_ENTRY": moe_plan.TILE_ENTRY,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
    }
    if kind == "gate_up":
        constants |= {"weights_ptr": None, "NUM_CHOSEN": 8, "ACTIVATION": "silu"}
    kernel = {"gate_up": moe_experts._gate_up_kernel, "down": moe_experts._down_kernel}[kind]
    asm = compile_for_hopper(
        kernel, constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages
    ).asm
    assert product in asm["ptx"]
    assert "cp.async.cg" in asm["ptx"]
    # The weight's tile as the product takes it: transposed.
    buffers = tile_buffers(asm["ttgir"], tiles.block_k, tiles.block_n)
    assert len(buffers) >= (2 if kind == "gate_up" else 1)
    assert min(buffers) >= tiles.num_stages - 1
    # Shared memory of an H100's program.
    stage = tiles.block_k * (tiles.block_m + (2 if kind == "gate_up" else 1) * tiles.block_n) * 2
    assert stage * tiles.num_stages <= 227 * 1024


def test_routing_compiles() -> None:
    constants = {
        "NUM_EXPERTS": 240,
        "NUM_CHOSEN": 8,
        "IS_SOFTMAX": False,
        "NORMALISES": True,
        "NUM_GROUPS": 8,
        "NUM_CHOSEN_GROUPS": 4,
        "GROUP_TOP2": True,
        "BLOCK_E": 256,
        "BLOCK_K": 8,
    }
    assert compile_for_hopper(moe_route._route_kernel, constants, num_warps=1).asm["ptx"]
    for kernel, extra in (
        (moe_plan._count_kernel, {}),
        (
            moe_plan._place_kernel,
            {"NUM_EXPERTS": 240, "ROWS": 16, "TILE_ENTRY": moe_plan.TILE_ENTRY, "BLOCK_E": 256},
        ),
    ):
        assert compile_for_hopper(kernel, {**extra, "BLOCK": 4096}, num_warps=4).asm["ptx"]


def test_another_gluon_leaves_the_portable_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert prefill_attention.hopper_kernel() is prefill_hopper
    prefill_attention.hopper_kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "engine.kernels.prefill_hopper", None)
    try:
        assert prefill_attention.hopper_kernel() is None
        assert prefill_attention.hopper_kernel() is None
    finally:
        prefill_attention.hopper_kernel.cache_clear()
    assert [record.message.count("Hopper prefill kernel") for record in caplog.records] == [1]
