"""The products of a batch on Hopper against their float64 twins; which product takes them."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable

import pytest
import torch
from kernel_cases import PADDING, TOLERANCE, make_metadata, metadata_on
from triton_cases import kernels

from engine.kernels import fused_reference, fused_tiles, reference, stream_tiles
from engine.kernels.stream_tiles import StreamTiles

needs_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
on_hopper = pytest.mark.parametrize(
    "device", [pytest.param(torch.device("cuda"), marks=needs_hopper)]
)
DTYPES = [torch.bfloat16, torch.float16]
OF_PROMPTS = StreamTiles(2, 128)


def random(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A random matrix within a larger one whose other rows and columns are NaN."""
    outer = torch.full((size[0] + 3, size[1] + 64), float("nan"), dtype=dtype, device=device)
    inner = outer[: size[0], : size[1]]
    inner.copy_(torch.randn(*size, device=device))
    return inner


def weight_of(n: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return random(n, k, dtype=dtype, device=device).div_(k**0.5)


def squares_of(x: torch.Tensor) -> torch.Tensor:
    """Parts of sums of squares, not those of x: a kernel that takes its own is wrong."""
    return x.float().pow(2).mul(0.7).view(x.shape[0], -1, 32).sum(-1).contiguous()


def close(got: torch.Tensor, want: torch.Tensor, num_inner: int) -> None:
    tolerance = dict(TOLERANCE[got.dtype])
    tolerance["atol"] = max(tolerance["atol"], 6 * (num_inner / 2) ** 0.5 * 2**-24)
    torch.testing.assert_close(got.double(), want, **tolerance)


def check_gated(
    run: Callable[[], torch.Tensor],
    x: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> None:
    torch.cuda.synchronize()  # weights are there before a product begins
    wide_bias = None if bias is None else bias.double()
    y = fused_reference.scaled_linear(x.double(), squares, weight.double(), wide_bias, eps=0.1)
    want = reference.act_mul(y, activation)
    # What rounding does to a factor is multiplied by the other factor.
    gate, up = y.abs().chunk(2, dim=-1)
    scale = (1.0 + gate) * (1.0 + up)
    got = run()
    close((got.double() / scale).to(got.dtype), want / scale, x.shape[1])
    assert torch.equal(run(), got)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", stream_tiles.ACTIVATIONS)
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("tiles", "m", "k", "n"),
    [
        (StreamTiles(1, 32), 9, 576, 1536),
        (StreamTiles(1, 64), 160, 576, 1536),
        (StreamTiles(1, 64), 250, 3072, 128),  # more rounds than the rings hold
        (StreamTiles(1, 32), 300, 64, 32 * 150),  # more programs than are resident
    ],
)
def test_gated_products_of_a_batch(
    device: torch.device,
    dtype: torch.dtype,
    activation: str,
    is_whole: bool,
    tiles: StreamTiles,
    m: int,
    k: int,
    n: int,
) -> None:
    x, weight = random(m, k, dtype=dtype, device=device), weight_of(2 * n, k, dtype, device)
    squares = squares_of(x) if is_whole else None
    bias = torch.randn(2 * n, device=device).to(dtype) if is_whole else None
    gated = kernels("stream_gated").gated_linear

    def run() -> torch.Tensor:
        return gated(x, squares, weight, bias, 0.1, activation, tiles)

    check_gated(run, x, squares, weight, bias, activation)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", stream_tiles.ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (2048, 1024, 3072),
        (129, 576, 1536),
        (128 * 17 + 1, 128, 1024),  # two groups of rows; fewer rounds than the rings hold
        (3000, 64, 1024),  # one round an item
    ],
)
def test_gated_products_of_prompts(
    device: torch.device,
    dtype: torch.dtype,
    activation: str,
    has_bias: bool,
    m: int,
    k: int,
    n: int,
) -> None:
    x, weight = random(m, k, dtype=dtype, device=device), weight_of(2 * n, k, dtype, device)
    bias = torch.randn(2 * n, device=device).to(dtype) if has_bias else None
    gate = kernels("stream_prompts").gate_prompts
    check_gated(
        lambda: gate(x, weight, bias, activation, OF_PROMPTS), x, None, weight, bias, activation
    )


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tiles", [StreamTiles(1, 16), StreamTiles(1, 32, 108, 96)])
@pytest.mark.parametrize(("m", "k"), [(9, 576), (97, 1536), (256, 3072)])
def test_adding(
    device: torch.device, dtype: torch.dtype, has_bias: bool, tiles: StreamTiles, m: int, k: int
) -> None:
    n, offset = 576, 1.0 if has_bias else 0.0
    x, weight = random(m, k, dtype=dtype, device=device), weight_of(n, k, dtype, device)
    old, bias = torch.randn(m, n, device=device).to(dtype), None
    if has_bias:
        bias = torch.randn(n, device=device).to(dtype)
    norm_weight = torch.rand(n, device=device).to(dtype)
    torch.cuda.synchronize()
    add = kernels("stream_adding").adding_linear
    hidden, again = old.clone(), old.clone()
    weighed, squares = add(x, weight, hidden, norm_weight, bias, offset, tiles)
    want = old.double()
    reference.add_linear(x.double(), weight.double(), want, None if bias is None else bias.double())
    # The product is rounded before it is added: relative to itself, not to what the sum leaves.
    scale = 1.0 + (want - old.double()).abs()
    close((hidden.double() / scale).to(dtype), want / scale, k)
    close(weighed, hidden.double() * (offset + norm_weight.double()), 1)
    torch.testing.assert_close(
        squares.double().sum(-1), hidden.double().pow(2).sum(-1), rtol=1e-6, atol=0.0
    )
    repeated = add(x, weight, again, norm_weight, bias, offset, tiles)
    assert torch.equal(again, hidden)
    assert torch.equal(repeated[0], weighed)
    assert torch.equal(repeated[1], squares)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_rotation", [True, False])
@pytest.mark.parametrize("norm_offset", [None, 0.0, 1.0])
@pytest.mark.parametrize(
    ("head_dim", "num_q_heads", "num_kv_heads"), [(64, 9, 3), (96, 4, 2), (128, 16, 8)]
)
@pytest.mark.parametrize("num_decodes", [19, 160])
def test_qkv(
    device: torch.device,
    dtype: torch.dtype,
    has_rotation: bool,
    norm_offset: float | None,
    head_dim: int,
    num_q_heads: int,
    num_kv_heads: int,
    num_decodes: int,
) -> None:
    if norm_offset is not None and head_dim == 96:
        pytest.skip("a head with a norm is one tile, whose sides are powers of two")
    k = 576
    seqs = [((17 * row + 3) % 48, 1) if row != 2 else PADDING for row in range(num_decodes)]
    tables = [[3 * row + 2, 3 * row, 3 * row + 1] if row != 2 else [] for row in range(num_decodes)]
    metadata = make_metadata(seqs, 16, tables)
    x = random(num_decodes, k, dtype=dtype, device=device)
    squares = squares_of(x)
    width = (num_q_heads + 2 * num_kv_heads) * head_dim
    weight, bias = weight_of(width, k, dtype, device), torch.randn(width, device=device).to(dtype)
    angles = torch.rand(48, head_dim // 2, device=device) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1) if has_rotation else None
    norms = [None, None]
    if norm_offset is not None:
        norms = [torch.rand(head_dim, device=device).to(dtype) for _ in "qk"]
    tiles = stream_tiles.qkv_tiles(x, weight, head_dim, norm_offset is not None)
    assert tiles is not None
    options = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "eps": 0.1,
        "norm_eps": 0.2,
        "norm_weight_offset": norm_offset or 0.0,
    }
    shape = (3 * num_decodes, 16, num_kv_heads, head_dim)
    want_caches = [torch.full(shape, 7.0, dtype=torch.float64) for _ in "kv"]
    names = ("q_norm_weight", "k_norm_weight")
    want = fused_reference.scaled_qkv(
        x.cpu().double(),
        squares.cpu(),
        weight.cpu().double(),
        bias.cpu().double(),
        metadata,
        None if cos_sin is None else cos_sin.cpu(),
        *want_caches,
        **options,
        **{n: None if w is None else w.cpu().double() for n, w in zip(names, norms, strict=True)},
    )
    # Both caches are planes of one tensor: no stride is a product of the shape.
    planes = torch.full((shape[0], 2, *shape[1:]), 7.0, dtype=dtype, device=device)
    torch.cuda.synchronize()
    q = kernels("stream_qkv").stream_qkv(
        x,
        squares,
        weight,
        bias,
        metadata_on(metadata, device),
        cos_sin,
        planes[:, 0],
        planes[:, 1],
        tiles,
        **options,
        **dict(zip(names, norms, strict=True)),
    )
    is_real = metadata.slot_mapping >= 0
    close(q.cpu()[is_real] / 4, want[is_real] / 4, k)  # values up to 4: rounded before the rotation
    for plane, want_plane in zip(planes.cpu().unbind(1), want_caches, strict=True):
        close(plane / 4, want_plane / 4, k)


@on_hopper
@pytest.mark.parametrize("num_rows", [16, 64, 160, 256])
@pytest.mark.parametrize("is_captured", [False, True])
def test_what_starts_early_waits_in_time(
    device: torch.device, num_rows: int, is_captured: bool
) -> None:
    """A chain of products as in a small model's layers: the same bits as with waits between."""
    hidden_size, inner, layers = 576, 1536, 8
    ups = [weight_of(2 * inner, hidden_size, torch.bfloat16, device) for _ in range(layers)]
    downs = [weight_of(hidden_size, inner, torch.bfloat16, device) for _ in range(layers)]
    norm_weight = torch.rand(hidden_size, device=device).bfloat16()
    start = torch.randn(num_rows, hidden_size, device=device).bfloat16()
    first_x = (start.float() * norm_weight.float()).bfloat16()
    first_squares = start.float().pow(2).sum(-1, keepdim=True)
    fused = kernels("fused_linear")
    hidden = start.clone()

    def chain(waits: bool) -> None:
        x, squares = first_x, first_squares
        for up, down in zip(ups, downs, strict=True):
            y = fused.scaled_linear(x, squares, up, eps=0.1, activation="silu")
            if waits:
                torch.cuda.synchronize()
            x, squares = fused.add_weighed_linear(y, down, hidden, norm_weight)
            if waits:
                torch.cuda.synchronize()

    torch.cuda.synchronize()
    chain(waits=True)
    want = hidden.clone()
    run = lambda: chain(waits=False)  # noqa: E731
    if is_captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(waits=False)
        run = graph.replay
    for _ in range(5):
        hidden.copy_(start)
        torch.cuda.synchronize()
        run()
        assert torch.equal(hidden, want)


@on_hopper
@pytest.mark.parametrize("are_prompts", [False, True])
def test_other_rows_never_change_a_row(device: torch.device, are_prompts: bool) -> None:
    x = random(300, 576, dtype=torch.bfloat16, device=device)
    weight = weight_of(512, 576, torch.bfloat16, device)
    torch.cuda.synchronize()

    def gated(rows: torch.Tensor) -> torch.Tensor:
        if are_prompts:
            gate = kernels("stream_prompts").gate_prompts
            return gate(rows, weight, None, "silu", OF_PROMPTS)
        gate = kernels("stream_gated").gated_linear
        return gate(rows, None, weight, None, 0.0, "silu", StreamTiles(1, 32))

    others = torch.full_like(x, float("nan"))
    others[37] = x[37]
    assert torch.equal(gated(others)[37], gated(x)[37])


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory count as lying on a Hopper GPU."""
    monkeypatch.setattr(stream_tiles, "_is_hopper", lambda device: device.type == "meta")
    monkeypatch.setattr(stream_tiles, "_has_gluon", lambda: True)


def meta(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(rows, cols, dtype=dtype, device="meta")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("num_rows", [1, 64, 65, 256])
def test_layers_of_small_models_are_taken(num_rows: int) -> None:
    x, mid = meta(num_rows, 576), meta(num_rows, 1536)
    for kind, rows, weight in (
        ("gated", x, meta(3072, 576)),
        ("adding", x, meta(576, 576)),
        ("adding", mid, meta(576, 1536)),
    ):
        tiles = stream_tiles.tiles_for(kind, rows, weight)
        assert tiles is not None
        assert weight.shape[0] % (2 * tiles.half) == 0
        # Registers and shared memory of an H100's multiprocessor.
        constants = tiles.constants(rows.shape[1])
        round_bytes = 128 * (64 * tiles.consumers + 2 * tiles.half)
        assert constants["STAGES"] * round_bytes <= 226 * 1024
        assert 128 * (tiles.consumers + 1) * constants["maxnreg"] <= 65536
    turned = stream_tiles.qkv_tiles(x, meta(960, 576), 64, has_head_norm=False)
    assert turned is not None
    assert turned.half == 16
    normed = stream_tiles.qkv_tiles(x, meta(960, 576), 64, has_head_norm=True)
    assert normed == dataclasses.replace(turned, half=32)


@pytest.mark.usefixtures("hopper")
def test_what_tma_cannot_read_or_nobody_measured_is_left() -> None:
    x, weight = meta(32, 576), meta(3072, 576)
    assert stream_tiles.tiles_for("gated", x, weight) is not None
    for other_x, other_weight in (
        (meta(257, 576), weight),  # rows
        (meta(32, 1024), meta(6144, 1024)),  # width
        (meta(32, 560), meta(3072, 560)),  # rounds of 64 columns
        (meta(32, 577)[:, :576], weight),  # rows at odd addresses
        (x, meta(3072 - 32, 576)),  # tiles
        (x.float(), weight.float()),
        (torch.empty(32, 576, dtype=torch.bfloat16), weight),  # device
    ):
        assert stream_tiles.tiles_for("gated", other_x, other_weight) is None
    assert stream_tiles.tiles_for("gated", x, weight, "gelu") is None
    assert stream_tiles.tiles_for("gated", x, weight, "gelu_tanh") is not None


@pytest.mark.usefixtures("hopper")
def test_gated_products_of_prompts_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_tiles, "_is_served", lambda device: device.type == "meta")
    for k, n in ((576, 3072), (1024, 6144), (4096, 28672)):
        weight = meta(n, k)
        assert fused_tiles.beats_library("gated", 8192, weight)
        assert not fused_tiles.beats_library("gated", 600, weight)
        assert not fused_tiles.beats_library("qkv", 8192, weight)
        assert not fused_tiles.beats_library("gated", 8192, weight, "gelu")
        assert stream_tiles.prompt_tiles(8192, weight, "silu") == OF_PROMPTS


def test_another_gluon_leaves_the_portable_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(stream_tiles, "_is_hopper", lambda device: device.type == "meta")
    monkeypatch.setitem(sys.modules, "engine.kernels.stream_gated", None)
    stream_tiles._has_gluon.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert stream_tiles.tiles_for("gated", meta(32, 576), meta(3072, 576)) is None
    finally:
        stream_tiles._has_gluon.cache_clear()
    assert [record.message.count("Hopper products") for record in caplog.records] == [1]
