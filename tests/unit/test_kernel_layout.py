"""Elements written to where `KernelLayout` says are those that packing would have put there."""

import itertools

import pytest
import torch
from torch import Tensor

from mtrl.rollout.kernel_layout import KernelLayout, find_layout, in_dims_of

pytestmark = pytest.mark.one_stack

LAYOUTS = [
    KernelLayout(rows=rows, columns=columns, swapped=swapped)
    for swapped in (False, True)
    for rows in (1, 16, 32)
    for columns in (1, 2, 4)
]


def pack(layout: KernelLayout, matrices: Tensor) -> Tensor:
    """Index by index, as a kernel's packing does."""
    packed = torch.empty_like(matrices)
    stack, num_rows, num_columns = matrices.shape
    flat = packed.view(stack, -1)
    if layout.swapped:
        matrices = matrices[:, [*range(num_rows // 2, num_rows), *range(num_rows // 2)]]
    for row, column in itertools.product(range(num_rows), range(num_columns)):
        block = (row // layout.rows) * (num_columns // layout.columns) + column // layout.columns
        within = (row % layout.rows) * layout.columns + column % layout.columns
        flat[:, block * layout.rows * layout.columns + within] = matrices[:, row, column]
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_order_of_blocks_is_found(layout: KernelLayout, dtype: torch.dtype) -> None:
    found = find_layout(lambda matrix: pack(layout, matrix), (64, 24), dtype)
    # Blocks of one row are no blocks: rows stay rows.
    assert found == (layout if layout.rows > 1 else KernelLayout(swapped=layout.swapped))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_written_boxes_are_where_packing_puts_them(layout: KernelLayout) -> None:
    matrices = torch.randn(3, 64, 24)
    packed = torch.zeros(3, 64, 24)
    for rows, columns in itertools.product(((0, 7), (7, 16), (16, 20), (20, 64)), ((0, 4), (4, 5), (5, 24))):
        for part, view in layout.pieces(packed, ((0, 3), rows, columns)):
            given = matrices[tuple(slice(*each) for each in part)]
            view.copy_(given.reshape(view.shape))
    assert torch.equal(packed, pack(layout, matrices))


def test_other_orders_and_padding_are_not_taken_for_blocks() -> None:
    turned = find_layout(lambda matrix: matrix.flip(-1), (64, 32), torch.float32)
    padded = find_layout(
        lambda matrix: torch.nn.functional.pad(matrix, (0, 0, 0, 32)), (64, 32), torch.float32
    )
    assert turned is None and padded is None


def test_dims_of_one_come_and_go() -> None:
    assert in_dims_of((6, 1, 4), ((0, 1), (2, 3), (0, 4)), (1, 6, 4)) == ((2, 3), (0, 1), (0, 4))
