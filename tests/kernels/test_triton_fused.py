"""The fused products for batches of decoding rows against their float64 twins."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import PADDING, TOLERANCE, make_metadata, metadata_on
from triton_cases import (
    DTYPES,
    IS_INTERPRETED,
    NEEDS_TRITON,
    assert_rows_alike,
    kernels,
    on_gpu_only,
)

from engine.errors import ConfigError
from engine.kernels import fused_reference, reference

pytestmark = NEEDS_TRITON
# (rows, K, N): rows that tiles divide and that they do not, K and N likewise.
SIZES = (
    [(9, 200, 40), (33, 128, 96)]
    if IS_INTERPRETED
    else [(m, *kn) for m in (9, 97, 256) for kn in ((576, 960), (1536, 576), (200, 40))]
)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of this file; those for Hopper are in `test_triton_stream`."""
    monkeypatch.setattr(kernels("stream_tiles"), "_is_hopper", lambda _: False)


def poisoned(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A random matrix within a larger one whose other rows and columns are NaN.

    Rows start at multiples of 16 entries where K is one, as those of weights do.
    """
    outer = torch.full((size[0] + 3, size[1] + 16), float("nan"), dtype=dtype, device=device)
    inner = outer[: size[0], : size[1]]
    inner.copy_(torch.randn(*size, device=device))
    return inner


def weight_of(n: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return poisoned(n, k, dtype=dtype, device=device).div_(k**0.5)


def close(got: torch.Tensor, want: torch.Tensor, num_inner: int) -> None:
    """Within the dtype's tolerance; sums of K products round as in the batch-invariant test."""
    tolerance = dict(TOLERANCE[got.dtype])
    tolerance["atol"] = max(tolerance["atol"], 6 * (num_inner / 2) ** 0.5 * 2**-24)
    torch.testing.assert_close(got.double(), want, **tolerance)


def squares_in_parts(hidden: torch.Tensor) -> torch.Tensor:
    """Parts as a producer of narrow tiles leaves them; their number is no power of two."""
    padded = torch.nn.functional.pad(hidden.double(), (0, -hidden.shape[1] % 5))
    return padded.pow(2).view(hidden.shape[0], 5, -1).sum(-1).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize("activation", [None, "silu", *on_gpu_only("gelu", "gelu_tanh")])
def test_scaled_linear(
    device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, activation: str | None
) -> None:
    x = poisoned(m, k, dtype=dtype, device=device)
    squares = squares_in_parts(x) * 0.7  # not those of x: a kernel that takes its own is wrong
    weight = weight_of(2 * n if activation else n, k, dtype, device)
    bias = torch.randn(weight.shape[0], device=device).to(dtype)

    def run() -> torch.Tensor:
        return kernels("fused_linear").scaled_linear(
            x, squares, weight, bias, eps=0.1, activation=activation
        )

    wide = (x.double(), squares, weight.double(), bias.double())
    y = fused_reference.scaled_linear(*wide, eps=0.1)
    want = y if activation is None else reference.act_mul(y, activation)
    scale: float | torch.Tensor = 1.0
    if activation is not None:
        # What rounding does to a factor is multiplied by the other factor.
        gate, up = y.abs().chunk(2, dim=-1)
        scale = (1.0 + gate) * (1.0 + up)
    got = run()
    close((got.double() / scale).to(dtype), want / scale, k)
    assert torch.equal(run(), got)


def test_scaled_linear_knows_its_activations(device: torch.device) -> None:
    x = torch.randn(2, 16, device=device)
    with pytest.raises(ConfigError, match="'relu' must be one of"):
        kernels("fused_linear").scaled_linear(x, x[:, :1], x, eps=1e-5, activation="relu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_add_weighed_linear(
    device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, weight_offset: float
) -> None:
    x, weight = poisoned(m, k, dtype=dtype, device=device), weight_of(n, k, dtype, device)
    old, bias = poisoned(m, n, dtype=dtype, device=device), torch.randn(n, device=device).to(dtype)
    norm_weight = torch.rand(n, device=device).to(dtype)
    beyond = torch.full((m, n + 16), 7.0, dtype=dtype, device=device)
    add = kernels("fused_linear").add_weighed_linear
    hidden = beyond[:, :n].copy_(old)
    weighed, squares = add(x, weight, hidden, norm_weight, bias, weight_offset=weight_offset)
    want = old.double()
    reference.add_linear(x.double(), weight.double(), want, bias.double())
    # The product is rounded before it is added: relative to itself, not to what the sum leaves.
    scale = 1.0 + (want - old.double()).abs()
    close((hidden.double() / scale).to(dtype), want / scale, k)
    assert (beyond[:, n:] == 7.0).all()
    factor = weight_offset + norm_weight.double()
    close(weighed, hidden.double() * factor, 1)
    torch.testing.assert_close(
        squares.double().sum(-1), hidden.double().pow(2).sum(-1), rtol=1e-6, atol=0.0
    )
    again = beyond.clone()[:, :n].copy_(old)
    repeated = add(x, weight, again, norm_weight, bias, weight_offset=weight_offset)
    assert torch.equal(again, hidden)
    assert torch.equal(repeated[0], weighed)
    assert torch.equal(repeated[1], squares)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_rotation", [True, False])
@pytest.mark.parametrize("norm_offset", [None, 0.0, 1.0])
@pytest.mark.parametrize(
    ("head_dim", "num_q_heads", "num_kv_heads"),
    [(64, 3, 1), *on_gpu_only((128, 16, 8))],
)
@pytest.mark.parametrize("num_decodes", [19, *on_gpu_only(160)])
def test_scaled_qkv(
    device: torch.device,
    dtype: torch.dtype,
    has_rotation: bool,
    norm_offset: float | None,
    head_dim: int,
    num_q_heads: int,
    num_kv_heads: int,
    num_decodes: int,
) -> None:
    k = 200
    seqs = [((17 * row + 3) % 48, 1) if row != 2 else PADDING for row in range(num_decodes)]
    tables = [[3 * row + 2, 3 * row, 3 * row + 1] if row != 2 else [] for row in range(num_decodes)]
    metadata = make_metadata(seqs, 16, tables)
    x = poisoned(num_decodes, k, dtype=dtype, device=device)
    squares = squares_in_parts(x)
    width = (num_q_heads + 2 * num_kv_heads) * head_dim
    weight, bias = weight_of(width, k, dtype, device), torch.randn(width, device=device).to(dtype)
    angles = torch.rand(48, head_dim // 2, device=device) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1) if has_rotation else None
    norms = [None, None]
    if norm_offset is not None:
        norms = [torch.rand(head_dim, device=device).to(dtype) for _ in "qk"]
    options = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "eps": 0.1,
        "norm_eps": 0.2,
        "norm_weight_offset": norm_offset or 0.0,
    }
    num_blocks = 3 * num_decodes
    shape = (num_blocks, 16, num_kv_heads, head_dim)
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
    planes = torch.full((num_blocks, 2, *shape[1:]), 7.0, dtype=dtype, device=device)
    q = kernels("fused_qkv").scaled_qkv(
        x,
        squares,
        weight,
        bias,
        metadata_on(metadata, device),
        cos_sin,
        planes[:, 0],
        planes[:, 1],
        **options,
        **dict(zip(names, norms, strict=True)),
    )
    is_real = metadata.slot_mapping >= 0
    close(q.cpu()[is_real] / 4, want[is_real] / 4, k)  # values up to 4: rounded before the rotation
    for plane, want_plane in zip(planes.cpu().unbind(1), want_caches, strict=True):
        close(plane / 4, want_plane / 4, k)


TILES = [
    {"block_m": 16, "block_n": 32, "block_k": 32, "swapped": True},
    {"block_m": 32, "block_n": 16, "block_k": 64, "num_stages": 2},
    *on_gpu_only(
        {"block_m": 16, "block_n": 64, "block_k": 64, "swapped": True},
        {"block_m": 64, "block_n": 128, "block_k": 64, "num_warps": 8},
        {"block_m": 64, "block_n": 64, "block_k": 64, "use_pdl": True, "prefetch_lines": 16},
        {"block_m": 32, "block_n": 128, "block_k": 64, "swapped": True, "use_pdl": True},
    ),
]


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("num_rows", [40, *on_gpu_only(160)])
def test_any_tiles_give_the_same_layer(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tiles: dict[str, int], num_rows: int
) -> None:
    """A chain of products in float16, as in a layer, repeated: what starts early waits in time."""
    hidden_size, inner, repeats = (64, 96, 1) if IS_INTERPRETED else (576, 1536, 6)
    fused = kernels("fused_linear")
    chosen = kernels("fused_tiles").FusedTiles(**tiles)
    monkeypatch.setattr(fused, "tiles_for", lambda *_: chosen)
    up = weight_of(2 * inner, hidden_size, torch.float16, device)
    down = weight_of(hidden_size, inner, torch.float16, device)
    norm_weight = torch.rand(hidden_size, device=device).half()
    hidden = torch.randn(num_rows, hidden_size, device=device).half()
    want = hidden.clone()
    x = (hidden.float() * norm_weight.float()).half()
    squares = hidden.float().pow(2).sum(-1, keepdim=True)
    for _ in range(repeats):
        y = fused.scaled_linear(x, squares, up, eps=0.1, activation="silu")
        x, squares = fused.add_weighed_linear(y, down, hidden, norm_weight)
    wide_x = (want.float() * norm_weight.float()).half()
    wide_squares = want.float().pow(2).sum(-1, keepdim=True)
    for _ in range(repeats):
        y = fused_reference.scaled_linear(wide_x, wide_squares, up, eps=0.1, activation="silu")
        wide_x, wide_squares = fused_reference.add_weighed_linear(y, down, want, norm_weight)
    # Each layer adds the roundings of values of order 1 to the stream.
    tolerance = repeats * TOLERANCE[torch.float16]["atol"]
    torch.testing.assert_close(hidden, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_never_change_a_row(device: torch.device, dtype: torch.dtype) -> None:
    k, n = (70, 20) if IS_INTERPRETED else (1536, 576)
    x, weight = poisoned(40, k, dtype=dtype, device=device), weight_of(n, k, dtype, device)
    linear = kernels("fused_linear").scaled_linear
    squares = squares_in_parts(x)
    want = linear(x, squares, weight, eps=0.1)
    others = poisoned(40, k, dtype=dtype, device=device)
    others.fill_(float("nan"))[37] = x[37]
    others_squares = torch.full_like(squares, float("nan"))
    others_squares[37] = squares[37]
    assert_rows_alike(linear(others, others_squares, weight, eps=0.1)[37], want[37])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 6.0])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_embed_weighed(
    device: torch.device, dtype: torch.dtype, scale: float | None, weight_offset: float
) -> None:
    weight = poisoned(7, 100, dtype=dtype, device=device)
    ids = torch.tensor([6, 0, 3, 6], device=device)
    factor = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)
    norm_weight = torch.rand(100, device=device).to(dtype)
    hidden, weighed, squares = kernels("embed_rows").embed_weighed(
        ids, weight, norm_weight, factor, weight_offset=weight_offset
    )
    want = fused_reference.embed_weighed(
        ids, weight, norm_weight, factor, weight_offset=weight_offset
    )
    assert torch.equal(hidden, want[0])
    assert torch.equal(weighed, want[1])
    torch.testing.assert_close(
        squares.double(), want[0].double().pow(2).sum(-1, keepdim=True), rtol=1e-6, atol=0.0
    )
