"""Ops agree with numpy, lazily and in blocks; an inverse undoes its op; what would be lost is an error."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptconv import dtypes, ops
from ckptconv.document import Checkpoint, Group, Optimizer, Param, Progress, Unknown
from ckptconv.errors import CkptError
from ckptconv.ops import Add, Cast, Concat, Permute, Reorder, Reshape, Scale, Shift, Slice, layout
from ckptconv.pieces import Cut, Piece, apart
from ckptconv.tensor import (
    BufferSource,
    DerivedTensor,
    Extent,
    FilledTensor,
    StoredTensor,
    TensorRef,
    TensorSpec,
)


def hidden(lazy: TensorRef) -> TensorRef:
    """The same tensor without its strides, so that ops have to work in blocks."""
    return DerivedTensor(op=Concat(0), parts=(lazy,), spec=lazy.spec)


def splits(numel: int, draw: st.DrawFn) -> tuple[int, ...]:
    """A shape of that many elements."""
    shape = []
    while numel > 1 and len(shape) < 4:
        factors = [n for n in range(2, numel + 1) if numel % n == 0]
        shape.append(draw(st.sampled_from(factors)))
        numel //= shape[-1]
    shape += [numel] if numel != 1 else []
    return tuple(draw(st.permutations(shape + [1] * draw(st.integers(0, 1)))))


@st.composite
def chains(draw: st.DrawFn):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    if draw(st.integers(0, 9)) == 0:
        shape += (0,)
    steps, current = [], shape
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(["permute", "reorder", "reshape", "slice", "concat", "scale", "shift", "hide"])
        )
        op: object = kind
        if kind == "permute":
            op = Permute(tuple(draw(st.permutations(range(len(current))))))
            current = tuple(current[i] for i in op.order)
        elif kind == "reorder" and current:
            axis = draw(st.integers(0, len(current) - 1))
            op = Reorder(axis, tuple(draw(st.permutations(range(current[axis])))))
        elif kind == "reshape" and math.prod(current):
            op = Reshape(current, splits(math.prod(current), draw))
            current = op.after
        elif kind == "slice" and current:
            axis = draw(st.integers(0, len(current) - 1))
            start = draw(st.integers(0, current[axis]))
            op = Slice(axis, start, draw(st.integers(start, current[axis])))
            current = tuple(op.stop - op.start if a == axis else n for a, n in enumerate(current))
        elif kind == "concat" and current:
            op = Concat(draw(st.integers(0, len(current) - 1)))
            current = tuple(n * 2 if a == op.axis else n for a, n in enumerate(current))
        elif kind == "scale":
            op = Scale(2.0)
        elif kind == "shift":
            op = Shift(0.5)
        steps.append(op)
    return shape, steps


def run(array: np.ndarray, lazy: TensorRef, steps) -> tuple[np.ndarray, TensorRef]:
    for op in steps:
        match op:
            case Permute():
                array, lazy = array.transpose(op.order), lazy.apply(op)
            case Reorder():
                array, lazy = array.take(op.order, op.axis), lazy.apply(op)
            case Reshape():
                array, lazy = array.reshape(op.after), lazy.apply(op)
            case Slice():
                index = [slice(None)] * array.ndim
                index[op.axis] = slice(op.start, op.stop)
                array, lazy = array[tuple(index)], lazy.apply(op)
            case Concat():
                array, lazy = np.concatenate([array, array], op.axis), lazy.apply(op, lazy)
            case Scale():
                array, lazy = array * np.float32(op.factor), lazy.apply(op)
            case Shift():
                array, lazy = array + np.float32(op.offset), lazy.apply(op)
            case "hide" if array.ndim:
                lazy = hidden(lazy)
    return array, lazy


@given(chains(), st.sampled_from([(4, 16), (32, 64), (1 << 20, 1 << 20)]), st.sampled_from([8, 64, 1 << 22]))
@example(((1, 0), [Slice(0, 1, 1)]), (4, 16), 8)
@settings(max_examples=250, deadline=None)
def test_chains_agree_with_numpy(chain, sizes, batch) -> None:
    shape, steps = chain
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected, lazy = run(array, StoredTensor.of_array(array), steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_BATCH_NBYTES", batch)
        assert lazy.shape == expected.shape
        np.testing.assert_array_equal(lazy.read(), expected)
        pieces = [piece.tobytes() for piece in lazy.windows(*sizes)]
        assert b"".join(pieces) == np.ascontiguousarray(expected).tobytes()
        assert all(len(piece) <= sizes[0] for piece in pieces)
        start = tuple(n // 3 for n in lazy.shape)
        stop = tuple(max(n // 3, n - 1) for n in lazy.shape)
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        np.testing.assert_array_equal(lazy.block(start, stop), expected[box])


@given(st.permutations(range(4)))
@settings(max_examples=24, deadline=None)
def test_inverse_of_permute(order) -> None:
    array = np.arange(120).reshape(2, 3, 4, 5)
    lazy = StoredTensor.of_array(array)
    for start in (lazy, hidden(lazy)):
        op = Permute(tuple(order))
        np.testing.assert_array_equal(start.apply(op).apply(op.inverse()).read(), array)


@given(st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=24, deadline=None)
def test_inverse_of_reorder(axis, random) -> None:
    array = np.arange(120).reshape(2, 3, 4, 5)
    order = list(range(array.shape[axis]))
    random.shuffle(order)
    op = Reorder(axis, tuple(order))
    lazy = StoredTensor.of_array(array)
    np.testing.assert_array_equal(lazy.apply(op).apply(op.inverse()).read(), array)


def test_a_sum_is_rounded_once() -> None:
    parts = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    first, *others = (StoredTensor.of_array(part) for part in parts)
    expected = parts.astype(np.float64).sum(0).astype(np.float32)
    np.testing.assert_array_equal(first.apply(Add(), *others).read(), expected)
    nan = StoredTensor.of_array(np.full((4, 5), np.nan, np.float32))
    assert np.isnan(first.apply(Add(), nan).read()).all()


def test_a_sum_that_leaves_the_range_is_an_error() -> None:
    lazy = StoredTensor.of_array(np.array([3e38], np.float32))
    with pytest.raises(CkptError) as caught:
        lazy.apply(Add(), lazy).read()
    assert [p.code for p in caught.value.problems] == ["precision-loss"]


def test_inverses() -> None:
    array = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    lazy = StoredTensor.of_array(array)
    for op in (Reshape((4, 6), (3, 8)), Scale(0.25), Scale(-2.0), Shift(0.0)):
        np.testing.assert_array_equal(lazy.apply(op).apply(op.inverse()).read(), array)
    parts = [lazy.apply(Slice(1, 0, 2)), lazy.apply(Slice(1, 2, 6))]
    np.testing.assert_array_equal(parts[0].apply(Concat(1), parts[1]).read(), array)


def test_views_stay_views() -> None:
    lazy = StoredTensor.of_array(np.zeros((6, 4), np.float32))
    for op in (Permute((1, 0)), Reshape((6, 4), (2, 3, 4)), Slice(0, 1, 3)):
        assert isinstance(lazy.apply(op), StoredTensor)
        moved = lazy.apply(Scale(2.0)).apply(op)
        assert isinstance(moved, DerivedTensor)
        assert isinstance(moved.parts[0], StoredTensor)


@pytest.mark.parametrize(
    "source",
    [
        row.name
        for row in dtypes.ROWS
        if row.kind in ("float", "int", "uint", "bool") and "e8m0" not in row.name
    ],
)
@pytest.mark.parametrize("target", ["float64", "float32", "bfloat16", "int64", "uint8", "bool"])
def test_cast_keeps_or_refuses(source: str, target: str) -> None:
    values = np.array([0, 1]).astype(dtypes.BY_NAME[source].numpy)
    result = StoredTensor.of_array(values).apply(Cast(target)).read()
    assert result.dtype == dtypes.BY_NAME[target].numpy
    back = result.astype(np.float64)
    np.testing.assert_array_equal(back, values.astype(np.float64))


@pytest.mark.parametrize(
    ("values", "op"),
    [
        (np.array([1e39]), Cast("float32")),
        (np.array([7e4], np.float32), Cast("float16")),
        (np.array([1e3], np.float32), Cast("float8_e4m3fn")),
        (np.array([1.5]), Cast("int64")),
        (np.array([300]), Cast("uint8")),
        (np.array([-1]), Cast("uint64")),
        (np.array([2**24 + 1]), Cast("float32")),
        (np.array([3e38], np.float32), Scale(2.0)),
        (np.array([3e38], np.float32), Shift(3e38)),
    ],
)
def test_what_does_not_fit_is_an_error(values, op) -> None:
    with pytest.raises(CkptError) as caught:
        StoredTensor.of_array(values).apply(op).read()
    assert [p.code for p in caught.value.problems] == ["precision-loss"]


def test_cast_rounds_and_keeps_what_is_not_finite() -> None:
    values = np.array([1 / 3, np.inf, -np.inf, np.nan])
    result = StoredTensor.of_array(values).apply(Cast("float32")).read()
    np.testing.assert_array_equal(result, values.astype(np.float32))


STRING = TensorSpec(dtype=dtypes.BY_NAME["string"], shape=(2,), encoded_nbytes=6)


@pytest.mark.parametrize(
    ("op", "spec"),
    [
        (Permute((0, 0)), None),
        (Reshape((2, 3), (5,)), None),
        (Slice(2, 0, 1), None),
        (Slice(0, 1, 9), None),
        (Concat(3), None),
        (Reorder(2, (0,)), None),
        (Reorder(0, (0, 0)), None),
        (Reorder(0, (1, 0)), STRING),
        (Add(), STRING),
        (Add(), TensorSpec(dtype=dtypes.BY_NAME["int32"], shape=(2,))),
        (Permute((0,)), STRING),
        (Slice(0, 0, 1), STRING),
        (Concat(0), STRING),
        (Cast("uint8"), STRING),
        (Scale(2.0), STRING),
        (Shift(2.0), STRING),
        (Scale(2.0), TensorSpec(dtype=dtypes.BY_NAME["int32"], shape=(2,))),
        (Cast("float32"), TensorSpec(dtype=dtypes.BY_NAME["qint8"], shape=(2,))),
        (Cast("float32"), TensorSpec(dtype=dtypes.BY_NAME["complex64"], shape=(2,))),
    ],
)
def test_misfits(op, spec) -> None:
    with pytest.raises(CkptError) as caught:
        op.spec((spec or TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=(2, 3)),))
    assert [p.code for p in caught.value.problems] == ["shape-mismatch"]


def test_reshape_of_strings_keeps_their_bytes() -> None:
    assert Reshape((2,), (2, 1)).spec((STRING,)).encoded_nbytes == 6


@pytest.mark.parametrize(
    ("before", "after"), [((1, 1 << 22), (1 << 11, 1 << 11)), ((1 << 11, 1 << 11), (1 << 22,))]
)
def test_a_block_of_a_reshape_takes_memory_by_its_own_size(before, after) -> None:
    lazy = FilledTensor(spec=TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=before), value=1.0)
    shaped = DerivedTensor(
        op=Reshape(before, after), parts=(lazy,), spec=Reshape(before, after).spec((lazy.spec,))
    )
    stop = tuple(min(n, 1 << 9) for n in after)
    tracemalloc.start()
    block = shaped.block((0,) * len(after), stop)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert block.shape == stop
    assert peak < 2 * layout._BATCH_NBYTES + 3 * block.nbytes


INVERTIBLE, PARTS, LOSING = (
    {"Permute", "Reorder", "Reshape", "Scale", "Shift"},
    {"Slice", "Concat"},
    {"Add", "Cast", "SpectralNorm", "WeightNorm"},
)


def test_every_op_has_an_inverse_or_says_what_it_loses() -> None:
    assert set(ops.__all__) == INVERTIBLE | PARTS | LOSING
    for name in ops.__all__:
        op = getattr(ops, name)
        assert hasattr(op, "inverse") == (name in INVERTIBLE), name
        assert op.__doc__


SLOTS = {"first_moment": "float32", "second_moment": "float64", "master": "float8_e4m3fn"}
NUMBERS = [
    "bool",
    "uint8",
    "int16",
    "int32",
    "int64",
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "complex64",
]
MOVED = [row.name for row in dtypes.ROWS if row.kind in ("float", "int", "uint", "bool", "complex")]


@st.composite
def there_and_back(draw: st.DrawFn):
    """A layout op, and an array of any dtype: parameter or slot, NaNs of any payload among the bits."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))
    kind = draw(st.sampled_from(["permute", "reorder", "reshape"]))
    op: Permute | Reorder | Reshape
    if kind == "permute":
        op = Permute(tuple(draw(st.permutations(range(len(shape))))))
    elif kind == "reorder":
        axis = draw(st.integers(0, len(shape) - 1))
        op = Reorder(axis, tuple(draw(st.permutations(range(shape[axis])))))
    else:
        op = Reshape(shape, splits(math.prod(shape), draw) if math.prod(shape) else (*shape, 1))
    return shape, op


def bits(shape: tuple[int, ...], name: str, seed: int) -> StoredTensor:
    row = dtypes.BY_NAME[name]
    count = math.prod(shape) * row.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if name == "bool" else 256, count, np.uint8).tobytes()
    extent = Extent(source=BufferSource(data), offset=0, nbytes=len(data))
    return StoredTensor.dense(TensorSpec(dtype=row, shape=shape), extent)


def content(tensor: TensorRef) -> bytes:
    return b"".join(bytes(window) for window in tensor.windows())


@given(there_and_back(), st.sampled_from(MOVED), st.booleans(), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_what_is_moved_comes_back_bit_by_bit(case, name: str, blocks: bool, seed: int) -> None:
    shape, op = case
    tensor = bits(shape, name, seed)
    start = hidden(tensor) if blocks else tensor
    back = start.apply(op).apply(op.inverse())
    assert back.spec == tensor.spec
    assert content(back) == content(tensor)
    assert op.inverse().inverse() == op


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple),
    st.data(),
    st.sampled_from(MOVED),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_what_is_cut_and_joined_is_whole_again(shape: tuple[int, ...], data, name: str, seed: int) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    ends = sorted(data.draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
    tensor = bits(shape, name, seed)
    parts = [tensor.apply(Slice(axis, a, b)) for a, b in itertools.pairwise([0, *ends, shape[axis]])]
    whole = parts[0].apply(Concat(axis), *parts[1:])
    assert content(whole) == content(tensor)
    sizes = list(itertools.accumulate((part.shape[axis] for part in parts), initial=0))
    for part, (a, b) in zip(parts, itertools.pairwise(sizes), strict=True):
        assert content(whole.apply(Slice(axis, a, b))) == content(part)


@given(st.integers(-8, 8), st.integers(-999, 999), st.sampled_from(["float32", "float64"]))
@settings(max_examples=100, deadline=None)
def test_numbers_that_rounding_leaves_alone_come_back(power: int, number: int, name: str) -> None:
    tensor = StoredTensor.of_array(np.arange(-50, 50).astype(name))
    for op in (Scale(2.0**power), Shift(float(number))):
        np.testing.assert_array_equal(tensor.apply(op).apply(op.inverse()).read(), tensor.read())


@given(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_a_cast_that_says_it_is_exact_comes_back(before: str, after: str, seed: int) -> None:
    tensor = bits((16,), before, seed)
    op = Cast(after)
    if not op.is_exact(tensor.dtype) or (op.target.kind == "complex" != tensor.dtype.kind):
        return  # a complex number is not cast back into a real one
    array, back = tensor.read(), tensor.apply(op).apply(Cast(before)).read()
    # A NaN stays one; the bits that say which are the hardware's.
    same = back.view(np.uint8).reshape(16, -1) == array.view(np.uint8).reshape(16, -1)
    with np.errstate(invalid="ignore"):
        assert (same.all(1) | ((array != array) & (back != back))).all()


def test_an_integer_that_a_float_does_not_hold_is_an_error() -> None:
    """numpy calls int64 in float64 safe: 2**53 + 1 came out as 2**53, and nobody said so."""
    lazy = StoredTensor.of_array(np.array([2**53 + 1]))
    with pytest.raises(CkptError) as caught:
        lazy.apply(Cast("float64")).read()
    assert [p.code for p in caught.value.problems] == ["precision-loss"]
    assert StoredTensor.of_array(np.array([2**53])).apply(Cast("float64")).read() == [2.0**53]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_slots_are_cut_as_their_parameter_and_come_back(sizes: list[int], axis: int, seed: int) -> None:
    shape = tuple(sum(sizes) if a == axis else 3 for a in range(2))
    slots = {name: {"w": bits(shape, dtype, seed + n)} for n, (name, dtype) in enumerate(SLOTS.items())}
    slots["count"] = {"w": bits((), "float32", seed)}
    unknown = Unknown(reason="none")
    document = Checkpoint(
        progress=Progress(step=unknown),
        params={"w": Param(name="w", tensor=bits(shape, "bfloat16", seed))},
        optimizers=(
            Optimizer(
                name="o",
                algorithm="adam",
                framework="torch",
                step=unknown,
                groups=(Group(params=("w",)),),
                slots=slots,
            ),
        ),
    )
    cut = Cut(whole="w", axis=axis, pieces=tuple(Piece(name=f"w{i}", size=n) for i, n in enumerate(sizes)))
    (optimizer,) = apart(document, [cut]).optimizers
    names = tuple(piece.name for piece in cut.pieces)
    assert optimizer.params == names
    for slot, by_param in slots.items():
        parts = [optimizer.slots[slot][name] for name in names]
        if by_param["w"].shape != shape:
            assert all(part is by_param["w"] for part in parts)
            continue
        assert [part.shape[axis] for part in parts] == sizes
        assert content(parts[0].apply(Concat(axis), *parts[1:])) == content(by_param["w"])
