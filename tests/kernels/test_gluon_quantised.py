"""What `quantised_one_row` computes, in Triton's interpreter; where, is for a GPU to show."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from quantised_cases import KINDS, CodeKind, random_codes
from triton_cases import IS_INTERPRETED, NEEDS_TRITON

from engine.kernels import quantised_reference, reference
from engine.kernels.quantised_layout import NormOfRows
from engine.kernels.quantised_tiles import VectorTiles
from engine.layers.quantised_packing import pack_codes

pytestmark = [
    *NEEDS_TRITON,
    pytest.mark.skipif(not IS_INTERPRETED, reason="for the interpreter"),
]
# Tables of 4 bits are looked up by an instruction that the interpreter does not have.
CASES = [kind for kind in KINDS if kind.name not in ("nf4-64", "int8-96")]
# (N, K): what tiles and bundles of 128 columns divide, and what they do not.
SIZES = [(16, 2048), (33, 192)]


@pytest.fixture(scope="module")
def one_row(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    from gluon_interpreted import interpreted

    return interpreted("quantised_one_row", tmp_path_factory.mktemp("gluon"))


@pytest.mark.parametrize("kind", CASES, ids=str)
def test_a_product_of_one_row(one_row: ModuleType, kind: CodeKind) -> None:
    for n, k in SIZES:
        if kind.group and k % kind.group:
            continue
        weight = pack_codes(random_codes(kind, n, k))
        assert one_row.multiplies_one_row(weight)
        expanded = quantised_reference.quantised_rows(weight, None, torch.float64)
        x, bias, out = torch.randn(1, k), torch.randn(n), torch.empty(1, n)
        one_row.one_row_product(x, weight, bias, out, VectorTiles(8, 16, 2))
        want = x.double() @ expanded.T + bias
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[12]], ids=str)
def test_what_joins_a_product(one_row: ModuleType, kind: CodeKind) -> None:
    n, k = 40, 384
    weight = pack_codes(random_codes(kind, n, k))
    expanded = quantised_reference.quantised_rows(weight, None, torch.float64)
    x, bias = torch.randn(1, k), torch.randn(n)
    norm = NormOfRows(torch.randn(k), 1e-5, 1.0)
    normed = reference.rms_norm(x.double(), norm.weight.double(), norm.eps, norm.offset)
    want = normed @ expanded.T + bias
    out = torch.ones(1, n)
    one_row.one_row_product(x, weight, bias, out, norm=norm, adds=True)
    torch.testing.assert_close(out.double(), want + 1.0, rtol=1e-5, atol=1e-5)
    for activation in reference.ACTIVATIONS:
        half = torch.empty(1, n // 2)
        one_row.one_row_product(x, weight, bias, half, activation=activation, norm=norm)
        gated = reference.act_mul(want, activation)
        torch.testing.assert_close(half.double(), gated, rtol=1e-5, atol=1e-5)


def test_groups_that_begin_within_a_bundle_are_left_to_the_other_kernel(
    one_row: ModuleType,
) -> None:
    weight = pack_codes(random_codes(KINDS[16], 16, 192))
    assert KINDS[16].name == "int8-96"
    assert not one_row.multiplies_one_row(weight)
