"""What every registered format promises, whoever wrote it: one suite over the registry."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import ckptconv.formats
from ckptconv import dtypes, engine
from ckptconv.errors import CkptError
from ckptconv.formats.base import Format, Layout
from ckptconv.formats.table import FORMATS, ROWS
from ckptconv.ops import Permute, Slice
from ckptconv.publish import below
from ckptconv.rawtree import DictNode, Node, RawTree, dict_of, walk
from ckptconv.rereading import check_sources
from ckptconv.tensor import Extent, FileSource, StoredTensor, TensorRef, TensorSpec, as_bytes

for _module in pkgutil.iter_modules(ckptconv.formats.__path__):
    importlib.import_module(f"ckptconv.formats.{_module.name}")

Items = dict[str, TensorRef]
NO_HDF5 = frozenset({"complex32"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the suite has to know of one format."""

    holds: Callable[[dtypes.DType], bool]
    """Whether a dtype of fixed length has a place in it."""
    suffix: str = ""
    section: str | None = None
    """Key of the dictionary of tensors, where the tree has more than that."""
    beside: tuple[tuple[str, Node], ...] = ()
    """What else such a tree has to have."""
    note: bool = True
    """Whether it has a place for the embedded note."""
    ties: bool = True
    """Whether it can say that two names share their memory."""
    zips: int = 1
    """How many there are of which opening searches the end for a directory."""
    separator: str = "."
    """What joins the parts of a path: a name with slashes is a path in HDF5."""


def _in_hdf5(row: dtypes.DType) -> bool:
    return row.kind in ("float", "int", "uint", "bool", "complex") and row.name not in NO_HDF5


CASES = {
    "pytorch": Case(holds=lambda row: row.torch is not None and row.kind != "quantized", suffix=".pt"),
    "safetensors": Case(holds=lambda row: row.safetensors is not None, suffix=".safetensors"),
    "neutral": Case(
        holds=lambda row: row.safetensors is not None,
        section="extras",
        beside=(("manifest", '{"schema": "ckptconv/checkpoint", "schema_version": "1.0.0", "files": []}'),),
        note=False,  # the manifest says all that a note would
    ),
    "weights-h5": Case(holds=_in_hdf5, suffix=".weights.h5", ties=False, separator="/"),
    "h5": Case(
        holds=_in_hdf5,
        suffix=".h5",
        beside=(("model_config", dict_of({})),),
        ties=False,
        separator="/",
    ),
    "keras": Case(
        holds=_in_hdf5,
        suffix=".keras",
        section="weights",
        beside=(("metadata", dict_of({"keras_version": "3.15.1"})), ("config", dict_of({}))),
        ties=False,
        separator="/",
    ),
    "dcp": Case(holds=lambda row: row.torch is not None and row.kind != "quantized", zips=9),
    "tensorflow": Case(holds=lambda row: row.tensorflow is not None, ties=False),
}
NAMES = sorted(FORMATS)
FIXED = [row for row in dtypes.ROWS if row.itemsize]


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> StoredTensor:
    """A tensor of random bits: every NaN payload is as likely as every number."""
    row = dtypes.BY_NAME[name]
    spec = TensorSpec(dtype=row, shape=shape)
    raw = np.random.default_rng(seed).integers(0, 256, spec.nbytes, np.uint8)
    if row.kind == "bool":
        raw &= 1
    elif row.name in ("int4", "uint4", "int2", "uint2", "float4_e2m1fn"):
        raw &= 3
    return StoredTensor.dense(spec, StoredTensor.of_array(raw).extent)


def mixed() -> Items:
    """Shapes that are forgotten easily."""
    base = random_tensor("float32", (6, 10))
    return {
        "dense": base,
        "scalar": random_tensor("int64", (), 1),
        "empty": random_tensor("float32", (0, 3), 2),
        "transposed": random_tensor("float32", (4, 7), 3).apply(Permute((1, 0))),
        "columns": random_tensor("float32", (5, 8), 4).apply(Slice(1, 2, 7)),
        "one.two/three": random_tensor("float16", (3,), 5),
        "flags": random_tensor("bool", (2, 2), 6),
        "large": random_tensor("uint8", (1 << 14,), 7),
    }


def layout_of(format_: Format, items: Items, path: Path, note: str | None = None) -> Layout:
    return format_.layout(tree_of(format_, list(items.items()), note), path)


def tree_of(format_: Format, pairs: list[tuple[str, TensorRef]], note: str | None = None) -> RawTree:
    case = CASES[format_.name]
    items: tuple[tuple[Node, Node], ...] = tuple(pairs)
    if case.section is not None:
        items = ((case.section, DictNode(items=items)),)
    root = DictNode(items=(*case.beside, *items))
    return RawTree(format=format_.name, root=root, note=note)


def write(format_: Format, items: Items, directory: Path, note: str | None = None) -> Path:
    path = directory / f"ck{CASES[format_.name].suffix}"
    engine.write(layout_of(format_, items, path, note), path)
    return path


def tensors(raw: RawTree) -> dict[str, TensorRef]:
    return {
        CASES[raw.format].separator.join(map(str, path)): leaf
        for path, leaf in walk(dict_in(raw))
        if isinstance(leaf, TensorRef)
    }


def dict_in(raw: RawTree) -> DictNode:
    root = raw.root
    section = CASES[raw.format].section
    if section is not None:
        assert isinstance(root, DictNode)
        root = root.get(section)
    assert isinstance(root, DictNode)
    return root


def content(tensor: TensorRef) -> tuple[str, tuple[int, ...], bytes]:
    return tensor.dtype.name, tensor.shape, as_bytes(tensor.read()).tobytes()


def everything(format_: Format, path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read all there is, checksums too."""
    found = tensors(format_.read(path))
    check_sources({e.id: e for t in found.values() for e in t.extents}.values())
    return {key: content(tensor) for key, tensor in found.items()}


def files_of(format_: Format, path: Path) -> list[Path]:
    layout = layout_of(format_, mixed(), path)
    return [below(layout.kind, path, file.name) for file in layout.files]


@pytest.fixture(params=NAMES)
def format_(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def test_every_registered_format_has_a_case() -> None:
    assert set(NAMES) == set(CASES)


def test_it_says_what_it_is(format_: Format) -> None:
    assert format_.name == format_.name.lower()
    assert 10 < len(format_.summary) < 100
    assert all(suffix.startswith(".") for suffix in ROWS[format_.name].suffixes)


@pytest.mark.parametrize("row", FIXED, ids=lambda row: row.name)
def test_every_dtype_is_kept_bit_for_bit_or_refused(
    format_: Format, row: dtypes.DType, tmp_path: Path
) -> None:
    items = {"a": random_tensor(row.name, (3, 5)), "b": random_tensor(row.name, (), 1)}
    if not CASES[format_.name].holds(row):
        with pytest.raises(CkptError) as caught:
            write(format_, items, tmp_path)
        assert {problem.code for problem in caught.value.problems} == {"unknown-dtype"}
        assert list(tmp_path.iterdir()) == []
        return
    assert everything(format_, write(format_, items, tmp_path)) == {k: content(t) for k, t in items.items()}


def test_every_shape_is_kept_and_the_input_is_not_changed(format_: Format, tmp_path: Path) -> None:
    items = mixed()
    before = {key: content(tensor) for key, tensor in items.items()}
    assert everything(format_, write(format_, items, tmp_path)) == before
    assert {key: content(tensor) for key, tensor in items.items()} == before


def test_names_keep_their_order_or_are_sorted(format_: Format, tmp_path: Path) -> None:
    items = {name: random_tensor("float32", (2,), i) for i, name in enumerate("zebra")}
    names = list(tensors(format_.read(write(format_, items, tmp_path))))
    assert names in (list("zebra"), sorted("zebra"))


def test_tied_tensors_stay_tied(format_: Format, tmp_path: Path) -> None:
    one = random_tensor("float32", (4, 4))
    found = tensors(format_.read(write(format_, {"a": one, "b": one}, tmp_path)))
    assert content(found["a"]) == content(found["b"]) == content(one)
    assert (found["a"].storage_id == found["b"].storage_id) is CASES[format_.name].ties


def test_views_of_one_storage(format_: Format, tmp_path: Path) -> None:
    whole = random_tensor("float32", (6, 4))
    items = {"head": whole.apply(Slice(0, 0, 2)), "tail": whole.apply(Slice(0, 1, 6)), "whole": whole}
    assert everything(format_, write(format_, items, tmp_path)) == {k: content(t) for k, t in items.items()}


def test_an_empty_tree(format_: Format, tmp_path: Path) -> None:
    assert everything(format_, write(format_, {}, tmp_path)) == {}


def test_the_note_comes_back(format_: Format, tmp_path: Path) -> None:
    note = '{"text": "ünïcode, \\u0000"}' if CASES[format_.name].note else None
    path = write(format_, mixed(), tmp_path, note)
    raw = format_.read(path)
    assert raw.note == note
    assert set(tensors(raw)) == set(mixed())


def test_shards_where_it_says_that_it_has_them(format_: Format, tmp_path: Path) -> None:
    items = {f"t{i}": random_tensor("float32", (16,), i) for i in range(6)}
    tree = tree_of(format_, list(items.items()))
    path = tmp_path / f"ck{CASES[format_.name].suffix}"
    single = format_.layout(tree, path)
    if not format_.shards:
        assert len([file for file in single.files if file.placements]) == 1
        return
    layout = format_.layout(replace(tree, attributes={"shard_nbytes": 128}), path)
    assert [len(file.placements) for file in layout.files if file.placements] == [2, 2, 2]
    engine.write(layout, path)
    assert everything(format_, path) == {key: content(tensor) for key, tensor in items.items()}


def test_the_same_tree_gives_the_same_bytes(format_: Format, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = write(format_, mixed(), tmp_path / name)
        contents.append([file.read_bytes() for file in files_of(format_, path)])
    assert contents[0] == contents[1]


def test_reading_and_writing_again_gives_the_same_bytes(format_: Format, tmp_path: Path) -> None:
    """From the first reading on: a format that sorts names may lay the first one out in another order."""
    path, contents = write(format_, mixed(), tmp_path), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        again = tmp_path / name / path.name
        engine.write(format_.layout(format_.read(path), again), again)
        path = again
        contents.append([file.read_bytes() for file in files_of(format_, path)])
    assert contents[0] == contents[1]


def test_sniffing_knows_its_own_and_no_other(format_: Format, tmp_path: Path) -> None:
    path = write(format_, mixed(), tmp_path)
    assert [name for name in NAMES if FORMATS[name].sniff(path)] == [format_.name]
    noise = tmp_path / "noise"
    noise.write_bytes(np.random.default_rng(0).integers(0, 256, 4096, np.uint8).tobytes())
    for other in (noise, tmp_path / "none", Path(__file__)):
        assert not format_.sniff(other)


def test_opening_reads_no_tensor_byte(
    format_: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the end of the file, where a zip's directory is searched for, and what lies behind a header of
    HDF5, which the library reads in pieces of 512 bytes."""
    path = write(format_, mixed() | {"huge": random_tensor("uint8", (1 << 20,))}, tmp_path)
    extents = [e for t in tensors(format_.read(path)).values() for e in t.extents if e.nbytes]
    assert all(isinstance(extent.source, FileSource) for extent in extents)
    reads: list[tuple[str, int, int]] = []
    read_into = FileSource.read_into

    def spy(source: FileSource, offset: int, out: memoryview) -> None:
        reads.append((source.path, offset, offset + len(out)))
        read_into(source, offset, out)

    monkeypatch.setattr(FileSource, "read_into", spy)
    format_.read(path)
    assert reads or format_.name in ("safetensors", "neutral")
    touched = 0
    for extent in extents:
        assert isinstance(extent.source, FileSource)
        for name, low, high in reads:
            if name == extent.source.path:
                touched += max(0, min(high, extent.offset + extent.nbytes) - max(low, extent.offset))
    assert touched <= CASES[format_.name].zips * ((1 << 16) + 22) + 8 * 512


def test_tensor_bytes_do_not_matter_for_opening(format_: Format, tmp_path: Path) -> None:
    path = write(format_, mixed(), tmp_path)
    before = {key: tensor.spec for key, tensor in tensors(format_.read(path)).items()}
    for extent in extents_of(format_, path):
        overwrite(extent, 0, b"\xff" * extent.nbytes)
    assert {key: tensor.spec for key, tensor in tensors(format_.read(path)).items()} == before


def test_a_flipped_bit_in_a_tensor_is_found_where_the_format_has_checksums(
    format_: Format, tmp_path: Path
) -> None:
    path = write(format_, mixed(), tmp_path)
    for extent in extents_of(format_, path):
        overwrite(extent, extent.nbytes // 2, None)
        if format_.checksums:
            with pytest.raises(CkptError) as caught:
                everything(format_, path)
            assert [problem.code for problem in caught.value.problems] == ["checksum-mismatch"]
        overwrite(extent, extent.nbytes // 2, None)
    everything(format_, path)


def extents_of(format_: Format, path: Path) -> list[Extent]:
    return [e for t in tensors(format_.read(path)).values() for e in t.extents if e.nbytes]


def overwrite(extent: Extent, offset: int, data: bytes | None) -> None:
    """Write into a stored tensor; None flips one bit."""
    assert isinstance(extent.source, FileSource)
    with open(extent.source.path, "r+b") as file:
        file.seek(extent.offset + offset)
        data = data or bytes([file.read(1)[0] ^ 4])
        file.seek(extent.offset + offset)
        file.write(data)


def test_truncation_anywhere_is_an_error_with_a_code(format_: Format, tmp_path: Path) -> None:
    path = write(format_, mixed(), tmp_path)
    for file in files_of(format_, path):
        whole = file.read_bytes()
        cuts = {0, 1, 7, 8, 9, 64, len(whole) - 1, *range(0, len(whole), max(len(whole) // 61, 1))}
        for cut in sorted(cut for cut in cuts if cut < len(whole.rstrip(b"\n"))):
            file.write_bytes(whole[:cut])
            with pytest.raises(CkptError) as caught:
                everything(format_, path)
            assert all(problem.loc and problem.hint for problem in caught.value.problems)
        file.write_bytes(whole)
        everything(format_, path)


def test_a_missing_file_is_an_error_with_a_code(format_: Format, tmp_path: Path) -> None:
    path = write(format_, mixed(), tmp_path)
    for file in files_of(format_, path):
        aside = file.rename(tmp_path / "aside")
        with pytest.raises(CkptError) as caught:
            everything(format_, path)
        assert all(problem.loc and problem.hint for problem in caught.value.problems)
        aside.rename(file)


def test_damage_is_an_error_with_a_code_or_changes_nothing_but_values(
    format_: Format, tmp_path: Path
) -> None:
    """Random bytes outside the tensors: whatever happens, it is a CkptError or a tree."""
    path = write(format_, mixed(), tmp_path, "{}")
    inside = {(e.source.path, e.offset + i) for e in extents_of(format_, path) for i in range(e.nbytes)}
    random = np.random.default_rng(0)
    for file in files_of(format_, path):
        whole = file.read_bytes()
        places = [i for i in range(len(whole)) if (str(file), i) not in inside]
        for _ in range(300 if places else 0):
            damaged = bytearray(whole)
            for place in random.choice(places, int(random.integers(1, 4))):
                damaged[place] = int(random.integers(0, 256))
            file.write_bytes(damaged)
            with contextlib.suppress(CkptError):
                everything(format_, path)
        file.write_bytes(whole)


def test_a_name_that_stands_twice_is_refused_or_kept(format_: Format, tmp_path: Path) -> None:
    one, two = random_tensor("float32", (2,), 1), random_tensor("float32", (2,), 2)
    tree = tree_of(format_, [("a", one), ("a", two)])
    path = tmp_path / f"ck{CASES[format_.name].suffix}"
    try:
        engine.write(format_.layout(tree, path), path)
    except CkptError as error:
        assert [problem.code for problem in error.problems] == ["duplicate-key"]  # noqa: PT017
    else:
        found = [tensor for _, tensor in dict_in(format_.read(path)).items if isinstance(tensor, TensorRef)]
        assert [content(tensor) for tensor in found] == [content(one), content(two)]
