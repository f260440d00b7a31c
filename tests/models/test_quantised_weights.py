"""Products with quantised weights: right, and no row depends on its neighbours or on threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight
from engine.layers.quantised_linear import QuantisedLinear, StepRows
from engine.layers.quantised_weights import (
    EightBitWeight,
    ExpansionRoom,
    FourBitWeight,
    has_eight_bit_product,
    has_four_bit_product,
)

pytestmark = pytest.mark.skipif(
    not (has_four_bit_product() and has_eight_bit_product()),
    reason="this CPU or torch has no int4 product in AVX-512's layout, or no VNNI",
)

SHAPES = [(64, 32), (64, 64), (960, 576), (576, 1536)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def four_bit_parts(num_rows: int, num_columns: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows)
    codes = torch.randint(0, 16, (num_rows, num_columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(num_rows, num_columns // 32, generator=generator) * 0.01 + 0.001
    minima = -8 * scales + 0.02 * torch.randn(scales.shape, generator=generator)
    return codes, scales, minima


def four_bit_value(codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    blocks = codes.view(*scales.shape, 32).double()
    return (blocks * scales.double()[..., None] + minima.double()[..., None]).flatten(1)


def eight_bit_parts(num_rows: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_columns)
    codes = torch.randint(-127, 128, (num_rows, num_columns), generator=generator)
    scales = torch.rand(num_rows, num_columns // 32, generator=generator) * 1e-3 + 1e-4
    return codes.to(torch.int8), scales


def eight_bit_weight(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> EightBitWeight:
    parts = zip(codes.split(41), scales.split(41), strict=True)
    chunks = [
        QuantisedCodes(8, 32, (part ^ -128).view(torch.uint8), factors, factors * -128.0)
        for part, factors in parts
    ]
    return EightBitWeight(*codes.shape, chunks, dtype)


def inputs(num_rows: int, num_columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows + num_columns)
    return torch.randn(num_rows, num_columns, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phase", ["of_decoding", "of_prompts"])
def test_four_bit_product_is_right(shape: tuple[int, int], phase: str) -> None:
    parts = four_bit_parts(*shape)
    value = four_bit_value(*parts)
    x = inputs(5, shape[1])
    y = getattr(FourBitWeight(*parts, ExpansionRoom()), phase)(x)
    assert y.dtype == torch.bfloat16
    # Scale, zero and, for prompts, the weight are rounded to bfloat16, and so is the sum.
    bound = x.double().abs() @ (value.abs() + parts[1].double().repeat_interleave(32, 1) * 8).T
    error = (y.double() - x.double() @ value.T).abs()
    assert (error / bound).max() < 3 * 2.0**-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phase", ["of_decoding", "of_prompts"])
def test_a_row_of_four_bits_does_not_notice_its_neighbours(
    shape: tuple[int, int], phase: str, threads: int
) -> None:
    product = getattr(FourBitWeight(*four_bit_parts(*shape), ExpansionRoom()), phase)
    x = inputs(150, shape[1])
    expected = product(x)
    torch.set_num_threads(3 - threads)
    assert torch.equal(product(x), expected)
    torch.set_num_threads(threads)
    fewest = 1 if phase == "of_decoding" else 2
    for rows in (fewest, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 149):
        assert torch.equal(product(x[:rows]), expected[:rows]), rows
        assert torch.equal(product(x[-rows:].clone()), expected[-rows:]), rows


def test_the_room_serves_weights_of_all_sizes() -> None:
    room = ExpansionRoom()
    weights = [FourBitWeight(*four_bit_parts(*shape), room) for shape in SHAPES]
    own = [FourBitWeight(*four_bit_parts(*shape), ExpansionRoom()) for shape in SHAPES]
    pairs = list(zip(SHAPES, weights, own, strict=True))
    for shape, shared, alone in [*pairs, *reversed(pairs)]:
        x = inputs(3, shape[1])
        assert torch.equal(shared.of_prompts(x), alone.of_prompts(x))


@pytest.mark.parametrize("shape", [*SHAPES, (50, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bit_product_is_right(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scales = eight_bit_parts(*shape)
    value = four_bit_value(codes, scales, torch.zeros_like(scales))
    weight = eight_bit_weight(codes, scales, dtype)
    x = inputs(5, shape[1])
    y = weight(x)
    assert y.dtype == dtype
    # Half a step of the weight's new codes, and a step of x's 16 bits.
    x_step = x.double().abs().amax(-1, keepdim=True) / 32512
    bound = x.double().abs().sum(-1, keepdim=True) * weight.row_scales.double() * 0.51
    bound = bound + x_step * value.abs().sum(-1) + 1e-6
    if dtype == torch.bfloat16:
        bound = bound + (x.double() @ value.T).abs() * 2.0**-8
    assert ((y.double() - x.double() @ value.T).abs() / bound).max() < 1.0


def test_sixteen_bits_of_x_survive() -> None:
    """With weights that need no rounding, the product is as good as float32's but for x's step."""
    codes = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
    codes[:, 0] = 127
    weight = eight_bit_weight(codes, torch.full((64, 2), 0.5), torch.float32)
    magnitudes = torch.tensor([1e-20, 1e-3, 1.0, 50.0, 1e4, 0.0, 1.0, 1.0, 1.0])
    x = torch.randn(9, 64) * magnitudes[:, None]
    x[7, 3] = 1000.0
    expected = x.double() @ codes.double().T * 0.5
    step = x.double().abs().amax(-1, keepdim=True) / 32512
    assert ((weight(x).double() - expected).abs() <= step * 64 * 64).all()
    assert (weight(x)[5] == 0).all()


def test_a_row_of_eight_bits_does_not_notice_its_neighbours(threads: int) -> None:
    weight = eight_bit_weight(*eight_bit_parts(576, 1536), torch.float32)
    x = inputs(300, 1536)
    x[250] *= 1000.0
    expected = weight(x)
    torch.set_num_threads(3 - threads)
    assert torch.equal(weight(x), expected)
    for rows in (1, 2, 3, 5, 8, 9, 31, 33, 64, 65, 257):
        assert torch.equal(weight(x[:rows]), expected[:rows]), rows
        assert torch.equal(weight(x[-rows:].clone()), expected[-rows:]), rows


def test_large_outputs_are_made_in_parts() -> None:
    """The sums of a part stay within 16 MiB, here 512 rows of them at two bytes' sums each."""
    weight = eight_bit_weight(*eight_bit_parts(60_000, 32), torch.float32)
    x = inputs(70, 32)
    assert torch.equal(weight(x), torch.cat([weight(row[None]) for row in x]))


def test_a_mixed_step_gives_each_row_the_product_of_its_phase() -> None:
    rows = StepRows()
    weight = FourBitWeight(*four_bit_parts(128, 64), ExpansionRoom())
    bias = torch.randn(128).to(torch.bfloat16)
    linear = QuantisedLinear(weight, bias, rows)
    x = inputs(7, 64)
    rows.num_decodes = 3
    expected = torch.cat((weight.of_decoding(x[:3]), weight.of_prompts(x[3:]))) + bias
    assert torch.equal(linear(x), expected)
    rows.num_decodes = 7
    assert torch.equal(linear(x), weight.of_decoding(x) + bias)
    rows.num_decodes = 0
    assert torch.equal(linear(x), weight.of_prompts(x) + bias)
    assert torch.equal(QuantisedLinear(weight, bias, None)(x), weight.of_decoding(x) + bias)


@pytest.mark.parametrize("kind", ["eights of rows", "eights of one scale", "codes of rows"])
def test_bytes_with_one_scale_a_row_stay_as_they_are(kind: str) -> None:
    """Not rounded again: their largest code need not be 127."""
    codes, _ = eight_bit_parts(64, 64)
    codes = codes // 2
    scales = torch.rand(64, 1, generator=torch.Generator().manual_seed(9)) + 0.1
    chunk: QuantisedCodes | QuantisedEight
    if kind == "eights of rows":
        chunk = QuantisedEight(codes, (1, 64), scales)
    elif kind == "eights of one scale":
        scales = scales[:1]
        chunk = QuantisedEight(codes, (64, 64), scales)
    else:
        unsigned = (codes ^ -128).view(torch.uint8)
        chunk = QuantisedCodes(8, 64, unsigned, scales, scales * -128.0)
    weight = EightBitWeight(64, 64, [chunk], torch.float32)
    assert torch.equal(weight.row_scales, scales[:, 0].expand(64))
    # One-hot rows are exact, so the product shows the weight.
    shown = weight(torch.eye(64), 0)
    torch.testing.assert_close(shown, (codes * scales).T.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("values", ["float8", "table"])
def test_other_numbers_are_rounded_to_bytes_of_a_row(values: str) -> None:
    generator = torch.Generator().manual_seed(8)
    if values == "float8":
        numbers = torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn)
        chunk: QuantisedCodes | QuantisedEight = QuantisedEight(
            numbers, (32, 16), torch.rand(2, 4, generator=generator) + 0.5
        )
    else:
        codes = torch.randint(0, 16, (64, 64), generator=generator).to(torch.uint8)
        table = torch.randn(16, generator=generator)
        chunk = QuantisedCodes(4, 16, codes, torch.rand(64, 4, generator=generator), None, table)
    expected = chunk.expand()
    shown = EightBitWeight(64, 64, [chunk], torch.float32)(torch.eye(64), 0).T
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((shown - expected).abs() <= 0.5001 * step).all()
