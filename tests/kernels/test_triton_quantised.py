"""The Triton kernels over integer codes against float64 products of the expanded weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import TOLERANCE
from quantised_cases import KINDS, CodeKind, random_codes
from triton_cases import (
    DTYPES,
    IS_INTERPRETED,
    NEEDS_TRITON,
    assert_rows_alike,
    kernels,
    on_gpu_only,
)

from engine.kernels import quantised_reference, reference
from engine.kernels.quantised_layout import CodePlanes, NormOfRows
from engine.kernels.quantised_tiles import ProductTiles, VectorTiles
from engine.layers.quantised_packing import pack_codes

pytestmark = NEEDS_TRITON
ROWS = [1, 2, 7, 16, 17, 64, 200]
# (N, K): what the tiles divide; and what neither they nor bundles of 128 columns do.
SIZES = [(48, 384), (33, 192), *on_gpu_only((1000, 4096), (4096, 2048))]
CASES = [(kind, n, k) for kind in KINDS for n, k in SIZES if not kind.group or k % kind.group == 0]
if IS_INTERPRETED:  # slow: a shape each, and half precision for one of each way to unpack
    CASES = [
        max(cases, key=lambda case: -case[2])
        for cases in ([case for case in CASES if case[0] is kind] for kind in KINDS)
    ]
HALF_KINDS = ("q4_1", "mxfp4", "q6_k", "int8-row")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


def strided(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device):
    """Random [M, K] within a larger matrix of NaN."""
    outer = torch.full((num_rows + 2, num_columns + 8), float("nan"), dtype=dtype, device=device)
    inner = outer[:num_rows, :num_columns]
    inner.copy_(torch.randn(num_rows, num_columns))
    return inner


def assert_close(
    got: torch.Tensor, want: torch.Tensor, x: torch.Tensor, expanded: torch.Tensor
) -> None:
    """Within what rounding weights once to x's dtype, y once, and sums in float32 cost.

    The errors of K rounded weights are independent, at most half an epsilon of each and evenly
    spread, so y's is normal around 0 with a deviation of that over sqrt 3 of `|x w|`, the root of
    the sum of squares. Six deviations are met by chance once in 500 million numbers. (An ideal
    product, exact but for this rounding, misses 1.2 % of y and of 1 in one number of a million.)
    """
    half = torch.finfo(x.dtype).eps / 2 if x.dtype.itemsize == 2 else 0.0
    terms = (x.double().square() @ expanded.double().square().T).sqrt()
    sums = 8 * (x.shape[1] / 2) ** 0.5 * 2.0**-24
    limit = 6 * half / 3**0.5 * terms + (half + 1e-5) * want.abs() + sums + 1e-5
    error = (got.double() - want).abs()
    assert bool((error <= limit).all()), f"{float((error / limit).max()):.2f} of what is allowed"


def product(x: torch.Tensor, expanded: torch.Tensor) -> torch.Tensor:
    return x.double() @ expanded.double().T


def check_joined(
    op: Any, x: torch.Tensor, weight: CodePlanes, bias: torch.Tensor, expanded: torch.Tensor
) -> None:
    """The product with what may stand before and after it."""
    got = op(x, weight, bias)
    want = product(x, expanded) + bias.double()
    slack = {key: 8 * value for key, value in TOLERANCE[x.dtype].items()}
    if weight.shape[0] % 2 == 0:
        # In two kernels the product is rounded in between, which the gate's slope passes on.
        gated = op(x, weight, bias, activation="silu")
        torch.testing.assert_close(gated.double(), reference.act_mul(want, "silu"), **slack)
    if weight.columns is None:
        norm = NormOfRows(torch.randn(x.shape[1], device=x.device).to(x.dtype), 1e-5, 1.0)
        normed = op(x, weight, bias, norm=norm)
        x_normed = reference.rms_norm(x.double(), norm.weight.double(), norm.eps, norm.offset)
        want = product(x_normed, expanded) + bias.double()
        torch.testing.assert_close(normed.double(), want, **slack)
    added = torch.ones_like(got)
    op(x, weight, bias, added, adds=True)
    torch.testing.assert_close(added, got + 1.0, **TOLERANCE[x.dtype])


@pytest.mark.parametrize(("kind", "n", "k"), CASES, ids=str)
def test_quantised_rows(device: torch.device, kind: CodeKind, n: int, k: int) -> None:
    codes = random_codes(kind, n, k)
    weight = pack_codes(codes, device)
    op = kernels("quantised_linear").quantised_rows
    in_order = codes.expand().to(device)
    if codes.columns is not None:
        in_order = in_order[:, codes.columns.to(device)]
    got = op(weight, None, torch.float32)
    twin = quantised_reference.quantised_rows(weight, None, torch.float32)
    # The scales' rounding to float16; a minimum's is that of a value up to 2^bits scales.
    largest = in_order.abs().max()
    torch.testing.assert_close(got, in_order, rtol=0, atol=float(largest) * 2.0**-10)
    torch.testing.assert_close(got, twin, rtol=0, atol=float(largest) * 2.0**-20)
    rows = torch.tensor([3, 0, n - 1, 3], device=device)
    assert torch.equal(op(weight, rows, torch.float32), got[rows])
    assert torch.equal(op(weight, rows, torch.float16), got[rows].half())


@pytest.mark.parametrize(
    ("dtype", "kind", "n", "k"),
    [
        (dtype, *case)
        for dtype in DTYPES
        for case in CASES
        if not IS_INTERPRETED or dtype == torch.float32 or case[0].name in HALF_KINDS
    ],
    ids=str,
)
def test_quantised_linear(
    device: torch.device, dtype: torch.dtype, kind: CodeKind, n: int, k: int
) -> None:
    op = kernels("quantised_linear").quantised_linear
    codes = random_codes(kind, n, k)
    weight = pack_codes(codes, device)
    expanded = quantised_reference.quantised_rows(weight, None, torch.float32)
    if codes.columns is not None:
        back = torch.empty_like(expanded)
        back[:, codes.columns.to(device)] = expanded
        expanded = back
    for m in [1, 17] if IS_INTERPRETED else [*ROWS, 600]:
        x = strided(m, k, dtype, device)
        bias = torch.randn(n, device=device).to(dtype)
        got = op(x, weight, bias)
        assert_close(got, product(x, expanded) + bias.double(), x, expanded)
        assert torch.equal(op(x, weight, bias), got)
        if not IS_INTERPRETED or kind is KINDS[1]:
            check_joined(op, x, weight, bias, expanded)
        wide = torch.full((m, n + 8), 7.0, dtype=dtype, device=device)
        op(x, weight, None, wide[:, :n])
        assert_close(wide[:, :n], product(x, expanded), x, expanded)
        assert (wide[:, n:] == 7.0).all()
    assert not weight.arrivals.any()


@pytest.mark.parametrize("m", on_gpu_only(7, 64) or [7])
@pytest.mark.parametrize(
    "tiles",
    [
        ProductTiles(16, 64, split=3),
        ProductTiles(32, 32, split=1),
        ProductTiles(64, 128, split=2, num_warps=8),
    ],
)
def test_tiles_and_parts_of_columns(device: torch.device, tiles: ProductTiles, m: int) -> None:
    module = kernels("quantised_product")
    n, k = 160, 640
    weight = pack_codes(random_codes(KINDS[1], n, k), device)
    want = quantised_reference.quantised_rows(weight, None, torch.float32)
    x = torch.randn(m, k, device=device).half()
    out = torch.empty(m, n, device=device)
    module.matrix_product(x, weight, None, out, tiles)
    torch.testing.assert_close(out.double(), product(x, want), **TOLERANCE[torch.float16])
    assert not weight.arrivals.any()


@pytest.mark.parametrize("tiles", [VectorTiles(4, 2, 1), VectorTiles(16, 8), VectorTiles(8, 32, 8)])
def test_tiles_of_one_row(device: torch.device, tiles: VectorTiles) -> None:
    module = kernels("quantised_vector")
    n, k = 70, 1152
    weight = pack_codes(random_codes(KINDS[5], n, k), device)
    want = quantised_reference.quantised_rows(weight, None, torch.float32)
    x = torch.randn(1, k, device=device)
    out = torch.empty(1, n, device=device)
    module.vector_product(x, weight, None, out, tiles)
    assert_close(out, product(x, want), x, want)


@pytest.mark.parametrize("m", on_gpu_only(1, 40, 300) or [1])
@pytest.mark.parametrize(
    "tiles",
    [
        ProductTiles(16, 64, split=3, num_stages=8),
        ProductTiles(64, 128, split=2, num_stages=2, num_warps=8),
        ProductTiles(64, 256, num_stages=3, num_warps=8),
        ProductTiles(256, 128, num_stages=2, num_warps=8),
    ],
)
def test_tiles_on_hopper(device: torch.device, tiles: ProductTiles, m: int) -> None:
    module = kernels("quantised_hopper")
    n, k = 330, 1216  # nine and a half bundles
    x = strided(m, k, torch.bfloat16, device)
    for kind in (KINDS[1], KINDS[12], KINDS[17]):
        weight = pack_codes(random_codes(kind, n, k), device)
        if not module.multiplies_on_hopper(x, weight):
            pytest.skip("needs a Hopper GPU")
        expanded = quantised_reference.quantised_rows(weight, None, torch.float32)
        out = torch.full((m, n + 6), 7.0, dtype=torch.bfloat16, device=device)
        module.hopper_product(x, weight, None, out[:, :n], tiles)
        assert_close(out[:, :n], product(x, expanded), x, expanded)
        assert (out[:, n:] == 7.0).all()
        again = torch.empty_like(out)
        module.hopper_product(x, weight, None, again[:, :n], tiles)
        assert torch.equal(again[:, :n], out[:, :n])
        assert not weight.arrivals.any()


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[14]], ids=str)
def test_rows_do_not_depend_on_their_number(device: torch.device, kind: CodeKind) -> None:
    op = kernels("quantised_linear").quantised_linear
    dtype = torch.float16 if IS_INTERPRETED else torch.bfloat16
    weight = pack_codes(random_codes(kind, 96, 256), device, rounds_input=True)
    x = torch.randn(70, 256, device=device).to(dtype)
    whole = op(x, weight, batch_invariant=True)
    for m in (1, 2, 33):
        assert_rows_alike(op(x[:m], weight, batch_invariant=True), whole[:m])


# The interpreter loses the carry where e4m3 rounds up to a power of two.
@pytest.mark.parametrize("kind", [KINDS[14], *on_gpu_only(KINDS[17])], ids=str)
def test_rows_as_bytes(device: torch.device, kind: CodeKind) -> None:
    """x rounded to 8 bits of a row's largest, then exactly the product of what was rounded."""
    module = kernels("quantised_bytes")
    n, k, m = 48, 320, 40
    weight = pack_codes(random_codes(kind, n, k), device, rounds_input=True)
    assert weight.multiplies_bytes
    x = strided(m, k, torch.float16, device)
    x[3] = 0
    dtype = torch.float8_e4m3fn if weight.exponent_bits else torch.int8
    codes, scales = module.quantise_rows(x, 384, dtype)
    order = kernels("quantised_layout").byte_order(3, device)
    is_column = order < k
    restored = torch.empty(m, 384, device=device)
    restored[:, order] = codes.float() * scales[:, None]
    assert not codes.float()[:, ~is_column].any()
    largest = x.float().abs().amax(1, keepdim=True)
    size = x.float().abs()
    step = largest / 127 if dtype == torch.int8 else torch.maximum(size / 8, largest / 448)
    assert ((restored[:, :k] - x.float()).abs() <= step * 0.51).all()
    assert not restored[3].any()
    if not IS_INTERPRETED:  # torch's own products
        got = torch.empty(m, n, dtype=torch.bfloat16, device=device)
        module.bytes_product(x.bfloat16(), weight, None, got)
        want = quantised_reference.quantised_rows(weight, None, torch.float32)
        exact = product(restored[:, :k], want)
        torch.testing.assert_close(got.double(), exact, **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kind", [KINDS[index] for index in (7, 0, 12)], ids=str)
@pytest.mark.parametrize(
    ("activation", "scales_input", "has_bias"),
    [("clamped_swiglu", False, True), ("silu", True, False), ("gelu_tanh", False, False)],
)
@pytest.mark.parametrize("num_tokens", on_gpu_only(1, 60, 400) or [5])
def test_quantised_experts(
    device: torch.device,
    num_tokens: int,
    activation: str,
    scales_input: bool,
    has_bias: bool,
    kind: CodeKind,
) -> None:
    op = kernels("quantised_experts").quantised_experts
    num_experts, width, hidden_size, num_chosen = 3, 96, 160, 2
    dtype = torch.float16 if IS_INTERPRETED else torch.bfloat16
    gate_up, down = (
        pack_codes(random_codes(kind, num_experts * rows, columns), device)
        for rows, columns in ((2 * width, hidden_size), (hidden_size, width))
    )
    x = strided(num_tokens, hidden_size, dtype, device)
    biases = [
        torch.randn(num_experts, rows, device=device).to(dtype) if has_bias else None
        for rows in (2 * width, hidden_size)
    ]
    # Nobody chooses expert 1.
    experts = torch.randint(0, 2, (num_tokens, num_chosen), device=device, dtype=torch.int32) * 2
    weights = torch.rand(num_tokens, num_chosen, device=device)
    options = {
        "activation": activation,
        "scales_input": scales_input,
        "swiglu_limit": 2.0,
        "swiglu_alpha": 1.7,
    }
    got = op(x, gate_up, down, *biases, weights, experts, **options)
    want = quantised_reference.quantised_experts(
        x.double(),
        gate_up,
        down,
        *(None if bias is None else bias.double() for bias in biases),
        weights,
        experts,
        **options,
    )
    tolerance = {name: 3 * value for name, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(got.double(), want, **tolerance)
    assert torch.equal(op(x, gate_up, down, *biases, weights, experts, **options), got)
