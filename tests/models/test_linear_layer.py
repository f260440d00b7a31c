"""`Linear` on the CPU: equal to a float64 product, and no row depends on its neighbours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.layers.linear import Linear, TiedLinear

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
# Relative to |x| @ |w|: the rounding of float32 sums, or of the one bfloat16 result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


def filled(in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool) -> Linear:
    linear = Linear(in_features, {"a": out_features}, bias=bias, device=CPU, dtype=dtype)
    generator = torch.Generator().manual_seed(in_features)
    for _, view in linear.named_weights():
        view.normal_(generator=generator)
    return linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_product_is_right(dtype: torch.dtype, bias: bool, rows: int) -> None:
    linear = filled(70, 51, dtype, bias=bias)
    weight = linear.weight.double()
    x = torch.randn(rows, 70).to(dtype)
    expected = x.double() @ weight.T + (linear.bias.double() if linear.bias is not None else 0.0)
    bound = x.double().abs() @ weight.abs().T + 1.0
    linear.finish_loading()
    y = linear(x)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() / bound).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# K above 1024 is where oneDNN's product of a single row sums in another order.
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 96), (1536, 576), (2048, 2048)])
def test_a_row_does_not_notice_its_neighbours(
    dtype: torch.dtype, in_features: int, out_features: int
) -> None:
    linear = filled(in_features, out_features, dtype, bias=False)
    linear.finish_loading()
    x = torch.randn(130, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = linear(x)
    for rows in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 129):
        assert torch.equal(linear(x[:rows]), reference[:rows]), rows
        assert torch.equal(linear(x[-rows:]), reference[-rows:]), rows
    for row in range(40):
        assert torch.equal(linear(x[row : row + 1]), reference[row : row + 1]), row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(in_features=st.integers(1, 700), out_features=st.integers(1, 300), rows=st.integers(1, 70))
def test_odd_shapes_are_invariant_too(
    dtype: torch.dtype, in_features: int, out_features: int, rows: int
) -> None:
    linear = filled(in_features, out_features, dtype, bias=True)
    linear.finish_loading()
    x = torch.randn(71, in_features).to(dtype)
    assert torch.equal(linear(x[:rows]), linear(x)[:rows])


def test_tied_projection_leaves_the_embedding_as_it_is() -> None:
    weight = torch.randn(40, 24)
    kept = weight.clone()
    linear = TiedLinear(weight)
    linear.finish_loading()
    x = torch.randn(3, 24)
    torch.testing.assert_close(linear(x), x @ kept.T)
    assert torch.equal(weight, kept)
    assert list(linear.named_weights()) == []
