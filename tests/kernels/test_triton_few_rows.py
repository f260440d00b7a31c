"""The Triton kernels for few rows against their float64 twins; see `test_triton_kernels.py`."""

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
from engine.kernels import reference

pytestmark = NEEDS_TRITON
# (rows, K, N): one row and several, K that the tiles divide and K that they do not, N likewise.
SIZES = (
    [(1, 600, 40), (3, 512, 33), (17, 70, 48)]
    if IS_INTERPRETED
    else [(m, *kn) for m in (1, 2, 8, 9, 16, 17, 64) for kn in ((576, 960), (4096, 1000), (70, 48))]
)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


def poisoned(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A random matrix within a larger one whose other rows and columns are NaN."""
    outer = torch.full((size[0] + 3, size[1] + 8), float("nan"), dtype=dtype, device=device)
    inner = outer[: size[0], : size[1]]
    inner.copy_(torch.randn(*size, device=device))
    return inner


def weight_of(n: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    weight = poisoned(n, k, dtype=dtype, device=device)
    return weight.div_(k**0.5)


def close(got: torch.Tensor, want: torch.Tensor, num_inner: int) -> None:
    """Within the dtype's tolerance; sums of K products round as in the batch-invariant test."""
    tolerance = dict(TOLERANCE[got.dtype])
    tolerance["atol"] = max(tolerance["atol"], 6 * (num_inner / 2) ** 0.5 * 2**-24)
    torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_few_row_linear(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> None:
    linear = kernels("few_row_linear").few_row_linear
    x, weight = poisoned(m, k, dtype=dtype, device=device), weight_of(n, k, dtype, device)
    bias = torch.randn(n, device=device).to(dtype)
    got = linear(x, weight, bias)
    close(got, reference.few_row_linear(x.double(), weight.double(), bias.double()), k)
    assert torch.equal(linear(x, weight, bias), got)
    wide = torch.full((m, n + 8), 7.0, dtype=dtype, device=device)
    assert linear(x, weight, bias, wide[:, :n]).data_ptr() == wide.data_ptr()
    close(wide[:, :n], got.double(), k)
    assert (wide[:, n:] == 7.0).all()
    assert not torch.equal(linear(x, weight), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize(
    ("activation", "weight_offset"),
    [(None, 0.0), (None, 1.0), ("silu", 0.0), ("gelu", 1.0), ("gelu_tanh", 0.0)],
)
def test_normed_linear(
    device: torch.device,
    dtype: torch.dtype,
    m: int,
    k: int,
    n: int,
    activation: str | None,
    weight_offset: float,
) -> None:
    hidden = poisoned(m, k, dtype=dtype, device=device)
    norm_weight = torch.rand(k, device=device).to(dtype)
    weight = weight_of(2 * n if activation else n, k, dtype, device)
    bias = torch.randn(weight.shape[0], device=device).to(dtype)
    # Parts as a producer of narrow tiles leaves them; their number is no power of two.
    padded = torch.nn.functional.pad(hidden.double(), (0, -k % 5))
    squares = padded.pow(2).view(m, 5, -1).sum(-1).float()

    def run() -> torch.Tensor:
        return kernels("few_row_linear").normed_linear(
            hidden,
            squares,
            norm_weight,
            weight,
            bias,
            eps=0.1,
            weight_offset=weight_offset,
            activation=activation,
        )

    wide = [t.double() for t in (hidden, norm_weight, weight, bias)]
    y = reference.normed_linear(
        wide[0],
        wide[0].pow(2).sum(-1, keepdim=True),
        *wide[1:],
        eps=0.1,
        weight_offset=weight_offset,
    )
    want = y if activation is None else reference.act_mul(y, activation)
    scale = 2.0  # norm weights up to 2 scale the values, and so their rounding
    if activation is not None:
        # What rounding does to a factor is multiplied by the other factor.
        gate, up = y.abs().chunk(2, dim=-1)
        scale = 2.0 * (1.0 + gate) * (1.0 + up)
    got = run()
    close((got.double() / scale).to(dtype), want / scale, k)
    assert torch.equal(run(), got)


def test_normed_linear_knows_its_activations(device: torch.device) -> None:
    x = torch.randn(2, 16, device=device)
    with pytest.raises(ConfigError, match="'relu' must be one of"):
        kernels("few_row_linear").normed_linear(x, x[:, :1], x[0], x, eps=1e-5, activation="relu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_rotation", [True, False])
@pytest.mark.parametrize(
    ("head_dim", "num_q_heads", "num_kv_heads"),
    [(64, 3, 1), *on_gpu_only((96, 4, 4), (128, 32, 8))],
)
@pytest.mark.parametrize("num_decodes", [1, 5, *on_gpu_only(16, 40)])
def test_normed_qkv(
    device: torch.device,
    dtype: torch.dtype,
    has_rotation: bool,
    head_dim: int,
    num_q_heads: int,
    num_kv_heads: int,
    num_decodes: int,
) -> None:
    k = 200
    seqs = [((17 * row + 3) % 48, 1) if row != 2 else PADDING for row in range(num_decodes)]
    tables = [[3 * row + 2, 3 * row, 3 * row + 1] if row != 2 else [] for row in range(num_decodes)]
    metadata = make_metadata(seqs, 16, tables)
    hidden = poisoned(num_decodes, k, dtype=dtype, device=device)
    squares = hidden.double().pow(2).sum(-1, keepdim=True).float()
    norm_weight = torch.rand(k, device=device).to(dtype)
    width = (num_q_heads + 2 * num_kv_heads) * head_dim
    weight, bias = weight_of(width, k, dtype, device), torch.randn(width, device=device).to(dtype)
    angles = torch.rand(48, head_dim // 2, device=device) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1) if has_rotation else None
    sizes = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    num_blocks = 3 * num_decodes
    shape = (num_blocks, 16, num_kv_heads, head_dim)
    want_caches = [torch.full(shape, 7.0, dtype=torch.float64) for _ in "kv"]
    want = reference.normed_qkv(
        hidden.cpu().double(),
        squares.cpu(),
        norm_weight.cpu().double(),
        weight.cpu().double(),
        bias.cpu().double(),
        metadata,
        None if cos_sin is None else cos_sin.cpu(),
        *want_caches,
        **sizes,
        eps=0.1,
    )
    # Both caches are planes of one tensor: no stride is a product of the shape.
    planes = torch.full((num_blocks, 2, *shape[1:]), 7.0, dtype=dtype, device=device)
    q = kernels("few_row_qkv").normed_qkv(
        hidden,
        squares,
        norm_weight,
        weight,
        bias,
        metadata_on(metadata, device),
        cos_sin,
        planes[:, 0],
        planes[:, 1],
        **sizes,
        eps=0.1,
    )
    is_real = metadata.slot_mapping >= 0
    close(q.cpu()[is_real] / 4, want[is_real] / 4, k)  # values up to 4: rounded before the rotation
    for plane, want_plane in zip(planes.cpu().unbind(1), want_caches, strict=True):
        close(plane / 4, want_plane / 4, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_add_linear(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> None:
    x, weight = poisoned(m, k, dtype=dtype, device=device), weight_of(n, k, dtype, device)
    old, bias = poisoned(m, n, dtype=dtype, device=device), torch.randn(n, device=device).to(dtype)
    beyond = torch.full((m, n + 8), 7.0, dtype=dtype, device=device)
    hidden = beyond[:, :n].copy_(old)
    squares = kernels("few_row_linear").add_linear(x, weight, hidden, bias)
    want = old.double()
    reference.add_linear(x.double(), weight.double(), want, bias.double())
    # The product is rounded before it is added: relative to itself, not to what the sum leaves.
    scale = 1.0 + (want - old.double()).abs()
    close((hidden.double() / scale).to(dtype), want / scale, k)
    assert (beyond[:, n:] == 7.0).all()
    torch.testing.assert_close(
        squares.double().sum(-1), hidden.double().pow(2).sum(-1), rtol=1e-6, atol=0.0
    )
    again = beyond.clone()[:, :n].copy_(old)
    assert torch.equal(kernels("few_row_linear").add_linear(x, weight, again, bias), squares)
    assert torch.equal(again, hidden)


@pytest.mark.parametrize(
    "tiles",
    [
        {"block_m": 16, "block_n": 32, "block_k": 64},
        {"block_m": 1, "block_n": 8, "block_k": 64, "num_stages": 1},
        *on_gpu_only(
            {"block_m": 32, "block_n": 64, "block_k": 64},
        ),
    ],
)
def test_tiles_that_only_the_sweep_takes(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tiles: dict[str, int]
) -> None:
    module = kernels("few_row_linear")
    chosen = module.FewRowTiles(**tiles)
    monkeypatch.setattr(module, "tiles_for", lambda *_: chosen)
    x = torch.randn(5, 200, device=device).half()
    weight = weight_of(100, 200, torch.float16, device)
    hidden = torch.zeros(5, 100, device=device).half()
    squares = module.add_linear(x, weight, hidden)
    close(hidden, reference.few_row_linear(x.double(), weight.double()), 200)
    torch.testing.assert_close(
        squares.double().sum(-1), hidden.double().pow(2).sum(-1), rtol=1e-6, atol=0.0
    )
    got = module.few_row_linear(hidden, weight[:, :100])
    close(got, reference.few_row_linear(hidden.double(), weight[:, :100].double()), 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_never_change_a_row(device: torch.device, dtype: torch.dtype) -> None:
    k, n = (70, 20) if IS_INTERPRETED else (4096, 1000)
    x, weight = poisoned(16, k, dtype=dtype, device=device), weight_of(n, k, dtype, device)
    linear = kernels("few_row_linear").few_row_linear
    want = linear(x, weight)
    others = poisoned(16, k, dtype=dtype, device=device)
    others.fill_(float("nan"))[5] = x[5]
    assert_rows_alike(linear(others, weight)[5], want[5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 6.0])
def test_embed_rows(device: torch.device, dtype: torch.dtype, scale: float | None) -> None:
    weight = poisoned(7, 100, dtype=dtype, device=device)
    ids = torch.tensor([6, 0, 3, 6], device=device)
    factor = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)
    hidden, squares = kernels("embed_rows").embed_rows(ids, weight, factor)
    want, _ = reference.embed_rows(ids, weight, factor)
    assert torch.equal(hidden, want)
    torch.testing.assert_close(
        squares.double(), want.double().pow(2).sum(-1, keepdim=True), rtol=1e-6, atol=0.0
    )
