"""Packed weights that are expanded for every product: right, and blind to neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.layers import packed_weight
from engine.layers.cpu_quantised import as_codes
from engine.layers.packed_weight import PackedWeight, PartRoom
from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight
from engine.layers.quantised_linear import JoinedProduct, SortedColumns
from engine.layers.quantised_weights import ExpansionRoom, FourBitWeight, has_four_bit_product

N, K = 96, 256


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weight_of(kind: str, num_rows: int = N, num_columns: int = K) -> QuantisedCodes:
    generator = torch.Generator().manual_seed(len(kind) + num_rows)
    if kind in ("float8", "int8"):
        values = torch.randn(num_rows, num_columns, generator=generator)
        if kind == "float8":
            eight = values.to(torch.float8_e4m3fn)
        else:
            eight = (values * 30).round().to(torch.int8)
        scales = torch.rand(-(-num_rows // 40), -(-num_columns // 48), generator=generator) + 0.5
        return as_codes(QuantisedEight(eight, (40, 48), scales))
    bits = int(kind[0])
    group = 16 if bits in (2, 3, 6) else 64
    codes = torch.randint(0, 1 << bits, (num_rows, num_columns), generator=generator)
    scales = torch.rand(num_rows, num_columns // group, generator=generator) * 0.1 + 0.01
    minima = scales * -float(1 << (bits - 1))
    if kind.endswith("asymmetric"):
        minima = minima + 0.1 * torch.randn(scales.shape, generator=generator)
    table = torch.randn(1 << bits, generator=generator) if kind.endswith("table") else None
    return QuantisedCodes(
        bits, group, codes.to(torch.uint8), scales, None if table is not None else minima, table
    )


KINDS = [
    "2 bits", "2 bits asymmetric", "3 bits", "4 bits", "4 bits asymmetric", "4 bits of a table",
    "5 bits asymmetric", "6 bits", "8 bits asymmetric", "float8", "int8",
]  # fmt: skip


def packed(weight: QuantisedCodes, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight(weight.shape, [weight], dtype, dtype, PartRoom())


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_float32_are_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weight, "_PART_NUMBERS", 10 * K)  # parts of 10 rows
    weight = weight_of(kind)
    x = torch.randn(21, K, generator=torch.Generator().manual_seed(1))
    y = packed(weight, torch.float32)(x, 0)
    expected = x.double() @ weight.expand().double().T
    bound = x.double().abs() @ weight.expand().double().abs().T
    assert y.dtype == torch.float32
    assert ((y - expected).abs() / bound).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_bfloat16_round_the_weight_once(kind: str) -> None:
    weight = weight_of(kind)
    x = torch.randn(21, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = packed(weight, torch.bfloat16)(x, 0)
    expected = x.double() @ weight.expand().double().T
    bound = x.double().abs() @ weight.expand().double().abs().T
    # Scale, what is added to it, their product and the sum: half a unit each.
    assert ((y.double() - expected).abs() / bound).max() < 4 * 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["4 bits", "float8"])
def test_a_row_does_not_notice_its_neighbours(kind: str, dtype: torch.dtype, threads: int) -> None:
    product = packed(weight_of(kind, 192, 320), dtype)
    x = torch.randn(280, 320, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = product(x, 0)
    torch.set_num_threads(3 - threads)
    assert torch.equal(product(x, 0), expected)
    for rows in (1, 2, 3, 15, 16, 17, 33, 64, 65, 130, 257, 279):
        assert torch.equal(product(x[:rows], rows), expected[:rows]), rows
        assert torch.equal(product(x[-rows:].clone(), 0), expected[-rows:]), rows


def test_memory_is_that_of_the_codes() -> None:
    for kind, bits in (("2 bits", 2), ("3 bits", 4), ("4 bits", 4), ("6 bits", 8), ("float8", 8)):
        weight = weight_of(kind)
        product = packed(weight, torch.bfloat16)
        held = product._packed.nbytes + product._scales.nbytes
        assert held == PackedWeight.num_bytes(weight.bits, weight.shape, weight.group, False)
        assert product._packed.nbytes == N * K * bits // 8


def test_one_room_serves_all_sizes() -> None:
    room = PartRoom()
    weights = [weight_of("4 bits", size, 128) for size in (32, 96, 64)]
    shared = [PackedWeight(w.shape, [w], torch.float32, torch.float32, room) for w in weights]
    x = torch.randn(3, 128)
    for weight, product in [*zip(weights, shared, strict=True)] * 2:
        torch.testing.assert_close(product(x, 0), x @ weight.expand().T)


def test_joined_and_sorted_products() -> None:
    weights = [weight_of("4 bits"), weight_of("6 bits", 32)]
    columns = torch.randperm(K, generator=torch.Generator().manual_seed(4))
    products = [packed(weight, torch.float32) for weight in weights]
    joined = JoinedProduct([products[0], SortedColumns(products[1], columns)])
    assert joined.shape == (N + 32, K)
    x = torch.randn(5, K)
    in_order = torch.empty(32, K)
    in_order[:, columns] = weights[1].expand()
    expected = torch.cat((x @ weights[0].expand().T, x @ in_order.T), -1)
    torch.testing.assert_close(joined(x, 0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_four_bit_product(), reason="no int4 product in AVX-512's layout")
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, 512, 1024])
def test_four_bits_take_any_multiple_of_32_columns(group: int) -> None:
    num_rows, num_columns = 128, max(1024, group)
    num_columns -= num_columns % group
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (num_rows, num_columns), generator=generator).to(torch.uint8)
    scales = torch.rand(num_rows, num_columns // group, generator=generator) * 0.1 + 0.01
    minima = scales * -7.0
    value = QuantisedCodes(4, group, codes, scales, minima).expand().double()
    product = FourBitWeight(codes, scales, minima, ExpansionRoom())
    x = torch.randn(3, num_columns, generator=generator).bfloat16()
    bound = x.double().abs() @ (value.abs() + 8 * scales.double().repeat_interleave(group, 1)).T
    for y in (product.of_decoding(x), product.of_prompts(x)):
        error = (y.double() - x.double() @ value.T).abs()
        assert (error / bound).max() < 3 * 2.0**-9
    held = product._packed.nbytes + product._scales_and_zeros.nbytes
    assert held == FourBitWeight.num_bytes((num_rows, num_columns), group)
