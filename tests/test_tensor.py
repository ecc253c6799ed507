"""Lazy tensors agree with numpy, whatever the strides, the byte order and the size of the windows."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv import dtypes, extent, strided, tensor
from ckptconv.errors import CkptError
from ckptconv.ops import Cast, Permute
from ckptconv.strided import box_slices
from ckptconv.tensor import (
    BufferSource,
    Extent,
    FileSource,
    FilledTensor,
    MissingTensor,
    StoredTensor,
    TensorSpec,
    as_bytes,
    blocks,
)

NUMERIC = [row for row in dtypes.ROWS if row.itemsize]


def stored(
    raw: bytes, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, **kw: bool
):
    extent = Extent(source=BufferSource(raw), offset=0, nbytes=len(raw), **kw)
    return StoredTensor(
        spec=TensorSpec(dtype=dtypes.BY_NAME[dtype], shape=shape),
        extent=extent,
        offset=offset,
        strides=strides,
    )


def streamed(lazy: tensor.TensorRef, nbytes: int, panel_nbytes: int) -> bytes:
    pieces = [piece.tobytes() for piece in lazy.windows(nbytes, panel_nbytes)]
    assert all(len(piece) <= max(nbytes, 16) for piece in pieces)
    return b"".join(pieces)


@st.composite
def strided_cases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    rank = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(0, 5)) for _ in range(rank))
    strides = tuple(draw(st.sampled_from([0, 1, 2, 3, 5, 7, 30])) for _ in range(rank))
    return shape, strides, draw(st.integers(0, 3))


@given(
    strided_cases(),
    st.booleans(),
    st.sampled_from(["float32", "int64", "bfloat16", "uint8", "complex64", "complex32"]),
    st.sampled_from([(1, 1), (24, 64), (1 << 20, 1 << 20)]),
    st.sampled_from([(0, 16), (8, 64), (8 << 10, 1 << 20)]),
)
@settings(max_examples=150, deadline=None)
def test_any_strides_agree_with_numpy(case, big_endian, dtype, sizes, limits) -> None:
    shape, strides, offset = case
    row = dtypes.BY_NAME[dtype]
    numel = offset + 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    raw = np.random.default_rng(0).integers(0, 256, numel * row.itemsize, np.uint8)
    little = raw
    if big_endian:
        little = raw.reshape(-1, row.swap)[:, ::-1].reshape(-1).copy()
    whole = np.ndarray(
        shape,
        f"V{row.itemsize}",
        little.data,
        offset * row.itemsize,
        tuple(s * row.itemsize for s in strides),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extent, "_GAP_NBYTES", limits[0])
        patch.setattr(extent, "_SCRATCH_NBYTES", limits[1])
        lazy = stored(raw.tobytes(), dtype, shape, strides, offset, big_endian=big_endian)
        assert lazy.read().shape == shape
        assert lazy.read().dtype == row.numpy
        assert as_bytes(lazy.read()).tobytes() == whole.tobytes()
        assert streamed(lazy, *sizes) == whole.tobytes()
        start = tuple(n // 3 for n in shape)
        stop = tuple(max(n // 3, n - 1) for n in shape)
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        assert as_bytes(lazy.block(start, stop)).tobytes() == whole[box].tobytes()


@pytest.mark.parametrize("row", NUMERIC, ids=lambda row: row.name)
def test_every_dtype_keeps_every_bit(row: dtypes.DType) -> None:
    raw = np.random.default_rng(1).integers(0, 256, 12 * row.itemsize, np.uint8).tobytes()
    lazy = stored(raw, row.name, (3, 4), (1, 3))
    turned = np.frombuffer(raw, f"V{row.itemsize}").reshape(4, 3).T
    assert as_bytes(lazy.read()).tobytes() == turned.tobytes()
    assert streamed(lazy, 16, 32) == turned.tobytes()


@given(st.lists(st.integers(0, 9), max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_copy_what_an_assignment_copies(shape, data) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(
        [shape[a] for a in np.argsort(order)]
    )
    view = array.transpose(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "_TILE_NUMEL", 16)
        patch.setattr(strided, "_TILE_WIDTH", 3)
        out = strided.dense(view)
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, view)


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from([1, 4, 8]), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_blocks_cover_in_order_within_the_limit(shape, itemsize, nbytes) -> None:
    index = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    parts = []
    for start, stop in blocks(shape, itemsize, nbytes):
        part = index[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        assert part.size * itemsize <= max(nbytes, itemsize)
        parts.append(part.reshape(-1))
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, int), *parts]), index.reshape(-1))


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
@settings(max_examples=60, deadline=None)
def test_flat_boxes_are_a_range_of_the_flattened_tensor(shape, data) -> None:
    index = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    low = data.draw(st.integers(0, index.size))
    high = data.draw(st.integers(low, index.size))
    boxes = list(strided.flat_boxes(shape, low, high))
    assert len(boxes) <= 2 * len(shape) + 1
    parts = [index[strided.box_slices(start, stop)].reshape(-1) for start, stop in boxes]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, int), *parts]), np.arange(low, high))


def test_strings_are_streamed_as_they_lie() -> None:
    raw = b"\x03\x01abcd"
    spec = TensorSpec(dtype=dtypes.BY_NAME["string"], shape=(2,), encoded_nbytes=len(raw))
    lazy = StoredTensor.dense(spec, Extent(source=BufferSource(raw), offset=0, nbytes=len(raw)))
    assert lazy.read().tobytes() == raw
    assert streamed(lazy, 4, 4) == raw


def test_filled_and_missing() -> None:
    spec = TensorSpec(dtype=dtypes.BY_NAME["bfloat16"], shape=(2, 3))
    assert FilledTensor(spec=spec, value=1.5).read().astype(float).tolist() == [[1.5] * 3] * 2
    with pytest.raises(CkptError) as caught:
        MissingTensor(spec=spec, name="w").read()
    assert [(p.code, p.loc) for p in caught.value.problems] == [("reference-broken", ("w",))]


def test_reading_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"12345678")
    for source in (FileSource(path), BufferSource(b"12345678", "short")):
        lazy = StoredTensor.dense(
            TensorSpec(dtype=dtypes.BY_NAME["int32"], shape=(3,)), Extent(source=source, offset=0, nbytes=12)
        )
        with pytest.raises(CkptError) as caught:
            lazy.read()
        assert [(p.code, p.loc) for p in caught.value.problems] == [("truncated-tensor", ("short",))]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        FileSource(tmp_path / "none")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("missing-file", ("none",))]


@pytest.mark.parametrize("change", ["grown", "touched"])
def test_a_source_that_changes_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345678")
    source = FileSource(path)
    source.check_unchanged()
    packed = pickle.dumps(source)
    if change == "grown":
        path.write_bytes(b"123456789")
    else:
        os.utime(path, ns=(1, 1))
    for act in (source.check_unchanged, lambda: pickle.loads(packed)):
        with pytest.raises(CkptError) as caught:
            act()
        assert [(p.code, p.loc) for p in caught.value.problems] == [("source-changed", ("f",))]


def test_sources_can_be_sent_to_another_process(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(np.arange(6, dtype="<f4").tobytes())
    spec = TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=(2, 3))
    for source in (FileSource(path), BufferSource(path.read_bytes())):
        lazy = StoredTensor.dense(spec, Extent(source=source, offset=0, nbytes=24))
        again = pickle.loads(pickle.dumps(lazy))
        np.testing.assert_array_equal(again.read(), lazy.read())


@pytest.mark.parametrize("shape", [(1, 1 << 22), (1 << 22, 1), (2048, 2048)])
def test_memory_does_not_depend_on_the_size(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(4 * shape[0] * shape[1]))
    extent = Extent(source=FileSource(path), offset=0, nbytes=path.stat().st_size)
    lazy = StoredTensor(
        spec=TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=shape), extent=extent, strides=(1, shape[0])
    )
    tracemalloc.start()
    total = sum(len(window) for window in lazy.windows(1 << 18, 1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == path.stat().st_size
    assert peak < 4 << 20


@given(st.integers(0, 90), st.integers(0, 90), st.sampled_from([64, 256, 1024]), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_boxes_cover_a_matrix_once_and_none_is_larger_than_asked(rows, columns, panel, cast, gaps) -> None:
    pitch = rows + 3 * gaps
    raw = np.arange(columns * pitch, dtype="<f4").tobytes()
    lazy = stored(raw, "float32", (rows, columns), (1, pitch))
    if cast:
        lazy = lazy.apply(Cast("float64"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor, "_SHORT_NBYTES", 32)
        boxes = lazy.tiles(panel)
    if boxes is None:
        return
    whole, out = lazy.read(), np.full((rows, columns), -1.0, lazy.dtype.numpy)
    for start, stop in boxes:
        block = lazy.block(start, stop)
        assert (out[box_slices(start, stop)] == -1).all()
        assert block.nbytes <= max(panel // 2, 8)
        out[box_slices(start, stop)] = block
    np.testing.assert_array_equal(out, whole)


def test_only_a_matrix_that_would_be_read_in_short_runs_is_cut_into_boxes() -> None:
    raw = bytes(4 << 20)
    tall = stored(raw, "float32", (64, 1 << 14), (1, 64))
    wide = stored(raw, "float32", (1 << 14, 64), (1, 1 << 14))
    as_it_lies = stored(raw, "float32", (64, 1 << 14), (1 << 14, 1))
    assert tall.tiles(1 << 18) is not None
    assert [t.tiles(1 << 18) for t in (wide, as_it_lies)] == [None, None]
    assert tall.tiles(4 << 20) is None


def test_a_tensor_as_it_lies_has_the_same_elements_and_is_dense_again() -> None:
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    turned = StoredTensor.of_array(array).apply(Permute((2, 0, 1)))
    assert isinstance(turned, StoredTensor)
    lying = turned.as_it_lies()
    assert not turned.is_dense
    assert lying.is_dense
    np.testing.assert_array_equal(lying.read(), array)
