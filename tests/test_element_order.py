"""`element_order` against NumPy: equal orders are equal arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.catalog.axes import element_order
from ckptconv.ops import Permute, Reshape
from ckptconv.tensor import Op

SHAPES = [(2, 2, 3), (12,), (4, 3), (1, 3, 4), (2, 1, 6), (3, 2, 2, 1), (6, 2)]


@st.composite
def programs(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Op, ...]:
    ops: list[Op] = []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            order = tuple(draw(st.permutations(range(len(shape)))))
            ops.append(Permute(order))
            shape = tuple(shape[axis] for axis in order)
        else:
            after = draw(st.sampled_from(SHAPES))
            ops.append(Reshape(shape, after))
            shape = after
    return tuple(ops)


def applied(ops: tuple[Op, ...], shape: tuple[int, ...]) -> list[int]:
    array = np.arange(math.prod(shape)).reshape(shape)
    for op in ops:
        array = array.transpose(op.order) if isinstance(op, Permute) else array.reshape(op.after)
    return array.ravel().tolist()


@given(st.data(), st.sampled_from(SHAPES))
@settings(max_examples=200, deadline=None)
def test_equal_orders_are_equal_arrays(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, two = data.draw(programs(shape)), data.draw(programs(shape))
    if element_order(one, shape) == element_order(two, shape):
        assert applied(one, shape) == applied(two, shape)


@pytest.mark.parametrize(
    ("one", "two", "shape", "equal"),
    [
        ((Permute((2, 3, 1, 0)),), (Permute((2, 3, 0, 1)),), (6, 1, 3, 3), True),
        ((Permute((2, 3, 1, 0)),), (Permute((2, 3, 0, 1)),), (6, 2, 3, 3), False),
        ((Permute((1, 0)),), (), (5, 1), True),
        ((Permute((1, 0)),), (), (5, 5), False),
        ((Reshape((12,), (3, 4)), Permute((1, 0))), (Reshape((12,), (4, 3)), Permute((1, 0))), (12,), False),
        ((Reshape((4, 3), (12,)), Reshape((12,), (4, 3))), (), (4, 3), True),
        ((Reshape((12,), (2, 6)), Permute((1, 0)), Reshape((6, 2), (12,))), (), (12,), False),
    ],
)
def test_singletons_move_for_nothing(
    one: tuple[Op, ...], two: tuple[Op, ...], shape: tuple[int, ...], *, equal: bool
) -> None:
    assert (element_order(one, shape) == element_order(two, shape)) is equal
    assert (applied(one, shape) == applied(two, shape)) is equal
