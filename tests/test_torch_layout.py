"""Where the elements of a torch tensor lie: orders that can be kept, and those that cannot."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.catalog.axes import layout_ops
from ckptconv.formats.torch_layout import in_memory_order, laid, strides_of
from ckptconv.ops import Permute
from ckptconv.strided import dense_strides
from ckptconv.tensor import StoredTensor


def strides_in(order: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose axes lie in this order, outermost first."""
    steps = dense_strides(tuple(shape[axis] for axis in order))
    return tuple(steps[order.index(axis)] for axis in range(len(shape)))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4).flatmap(
        lambda shape: st.tuples(st.just(tuple(shape)), st.permutations(range(len(shape))))
    )
)
def test_any_order_of_axes_is_kept(case: tuple[tuple[int, ...], list[int]]) -> None:
    shape, order = case
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    strides = strides_in(tuple(order), shape)
    tensor = laid(StoredTensor.of_array(values), None if strides == dense_strides(shape) else strides)
    np.testing.assert_array_equal(tensor.read(), values)
    placed = in_memory_order(tensor)
    if placed is None:
        assert strides == dense_strides(shape)
        return
    memory = placed[0].read().reshape(-1)
    seen = np.lib.stride_tricks.as_strided(memory, shape, tuple(4 * step for step in placed[1]))
    np.testing.assert_array_equal(seen, values)
    assert placed[1] == strides


def test_a_transposed_view_becomes_dense_where_the_target_was_dense() -> None:
    view = StoredTensor.of_array(np.arange(6, dtype=np.int16).reshape(2, 3)).apply(Permute((1, 0)))
    assert strides_of(view) == (1, 3)
    made = in_memory_order(laid(view, None))
    assert made is not None
    assert made[1] == (2, 1)
    assert made[0].read().reshape(-1).tolist() == [0, 3, 1, 4, 2, 5]


def test_gaps_and_repeats_are_not_made() -> None:
    tensor = StoredTensor.of_array(np.arange(6, dtype=np.int16).reshape(2, 3))
    for strides in ((6, 2), (0, 1), (1, 1), (3,), (3, 1, 1)):
        placed = in_memory_order(laid(tensor, strides))
        assert placed is None or placed[1] == (3, 1)


def test_axes_of_size_1_are_no_permutation() -> None:
    assert layout_ops(("out", "in"), (1, 1), ("in", "out"), (1, 1)) == ()
    (reshape,) = layout_ops(("out", "in"), (1, 5), ("in", "out"), (5, 1)) or ()
    assert reshape.to_json()["op"] == "reshape"
    permute, *_ = layout_ops(("out", "in"), (2, 5), ("in", "out"), (5, 2)) or ()
    assert permute == Permute((1, 0))
