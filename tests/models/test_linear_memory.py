"""oneDNN keeps code per row count: products must not meet many of them."""

from __future__ import annotations

import torch

from engine.layers import linear, row_sizes


def test_products_run_with_few_row_counts() -> None:
    counts = set()
    for num_rows in range(1, 2000):
        left = num_rows
        num_parts = 0
        while left > 0:
            part = row_sizes.rows_of_next_part(left)
            counts.add(part)
            left -= part
            num_parts += 1
        # Padding stays small, and the weight is not read again and again.
        assert -left <= 16  # rows that cost no more than reading the weight once more
        assert num_parts <= num_rows // 256 + 3
    assert counts == set(row_sizes.ROW_SIZES)


def test_parts_give_the_rows_of_one_product() -> None:
    if not linear.can_pack(torch.empty(0)):
        return
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 40, generator=generator)
    x = torch.randn(700, 40, generator=generator)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    whole = linear.packed_linear(x, packed, None)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-5, atol=1e-4)
    for num_rows in (1, 2, 3, 9, 17, 130, 257, 513):
        assert torch.equal(linear.packed_linear(x[:num_rows], packed, None), whole[:num_rows])
