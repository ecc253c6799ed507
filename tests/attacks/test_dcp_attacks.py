"""Folders of torch.distributed.checkpoint that are damaged or lie, each with the code that it must give."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import ckptconv
from ckptconv.detect import read_raw
from ckptconv.dtypes import BY_NAME
from ckptconv.errors import CkptError
from ckptconv.formats.dcp_metadata import (
    Chunk,
    Entry,
    Metadata,
    Place,
    TensorEntry,
    metadata_pickle,
    read_metadata,
)
from ckptconv.formats.dcp_paths import CONTAINERS, NOTE
from ckptconv.formats.pickle_reader import MAX_DEPTH
from ckptconv.rawtree import Node, Opaque, children, walk
from tests.support.hostile import commands

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dcp"
FSDP = FIXTURES / "fsdp-2-ranks" / "run"
SHARDS = FIXTURES / "hf-2-ranks" / "run"
WEIGHT = "model.fc1.weight"
FIRST, SECOND = "__0_0.distcp", "__1_0.distcp"

Found = list[tuple[str, tuple[str | int, ...]]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FSDP, tmp_path / "run"))


def found(folder: Path) -> Found:
    with pytest.raises(CkptError) as caught:
        read_raw(folder)
    return [(problem.code, problem.loc) for problem in caught.value.problems]


def metadata(folder: Path) -> Metadata:
    return read_metadata((folder / ".metadata").read_bytes(), ".metadata")


def rewrite(folder: Path, **changed: object) -> None:
    """`.metadata` with other entries or paths."""
    told = replace(metadata(folder), **changed)  # type: ignore[arg-type]
    (folder / ".metadata").write_bytes(metadata_pickle(told))


def with_entry(folder: Path, key: str, entry: Entry) -> None:
    told = metadata(folder)
    rewrite(
        folder, entries={**told.entries, key: entry}, paths={**told.paths, key: told.paths.get(key, (key,))}
    )


def weight(folder: Path) -> TensorEntry:
    entry = metadata(folder).entries[WEIGHT]
    assert isinstance(entry, TensorEntry)
    return entry


def placed(folder: Path, place: Place) -> None:
    """The first chunk of the weight lies elsewhere."""
    entry = weight(folder)
    first, *rest = entry.chunks
    with_entry(folder, WEIGHT, replace(entry, chunks=(first._replace(place=place), *rest)))


def chunked(folder: Path, change: Callable[[Chunk, Chunk], tuple[Chunk, ...]]) -> None:
    entry = weight(folder)
    with_entry(folder, WEIGHT, replace(entry, chunks=change(*entry.chunks)))


def test_the_copy_is_sound(run: Path) -> None:
    rewrite(run)
    assert {path for path, _ in walk(read_raw(run).root)} == {path for path, _ in walk(read_raw(FSDP).root)}


def test_a_data_file_that_is_not_there(run: Path) -> None:
    (run / SECOND).unlink()
    problems = found(run)
    assert ("missing-file", (SECOND, WEIGHT)) in problems
    assert {code for code, _ in problems} == {"missing-file"}


OWN = FIXTURES / "own-2-ranks" / "run"


def test_a_rank_that_saved_for_itself_and_is_not_there(tmp_path: Path) -> None:
    """One in the middle is named, the last one leaves holes."""
    run = shutil.copytree(OWN, tmp_path / "run")
    (run / "__1.metadata").rename(run / "__2.metadata")
    assert found(run) == [("missing-file", ("__1.metadata",))]
    (run / "__2.metadata").unlink()
    problems = found(run)
    assert {code for code, _ in problems} == {"corrupt-file"}
    assert ("corrupt-file", (WEIGHT,)) in [(code, loc[:1]) for code, loc in problems]


def test_ranks_of_two_runs(tmp_path: Path) -> None:
    run = shutil.copytree(OWN, tmp_path / "run")
    told = read_metadata((run / "__1.metadata").read_bytes(), "__1.metadata")
    entry, other = told.entries[WEIGHT], told.entries["epoch"]
    assert isinstance(entry, TensorEntry)
    for changed in (replace(entry, shape=(5, 4)), replace(entry, dtype=BY_NAME["float64"]), other):
        entries = {**told.entries, WEIGHT: changed}
        (run / "__1.metadata").write_bytes(metadata_pickle(replace(told, entries=entries)))
        assert found(run) == [("corrupt-file", ("__1.metadata", WEIGHT))]


def test_a_data_file_cut_anywhere(run: Path) -> None:
    data = (run / SECOND).read_bytes()
    for nbytes in range(0, len(data), 4999):
        (run / SECOND).write_bytes(data[:nbytes])
        assert {code for code, _ in found(run)} == {"truncated-file"}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Place(FIRST, 10**12, 1577), ("truncated-file", (FIRST, WEIGHT))),
        (Place(FIRST, 0, 10**15), ("truncated-file", (FIRST, WEIGHT))),
        (Place(FIRST, 1 << 63, 10), ("corrupt-file", (".metadata", WEIGHT))),
        (Place(FIRST, 0, -1), ("corrupt-file", (".metadata", WEIGHT))),
        (Place("../run/" + FIRST, 0, 1577), ("unsafe-path", (WEIGHT, "../run/" + FIRST))),
        (Place("/etc/passwd", 0, 1577), ("unsafe-path", (WEIGHT, "/etc/passwd"))),
        (Place("a/../../b", 0, 1577), ("unsafe-path", (WEIGHT, "a/../../b"))),
        (Place("", 0, 1577), ("unsafe-path", (WEIGHT, ""))),
        (Place(".", 0, 1577), ("unsafe-path", (WEIGHT, "."))),
        (Place("nowhere", 0, 1577), ("missing-file", ("nowhere", WEIGHT))),
        (Place(FIRST, 7, 1577), ("unknown-format", (f"{FIRST}!{WEIGHT}",))),
        (Place(FIRST, 0, 0), ("unknown-format", (f"{FIRST}!{WEIGHT}",))),
        (Place(FIRST, 0, 1500), ("truncated-file", (f"{FIRST}!{WEIGHT}",))),
    ],
)
def test_a_place_where_the_chunk_is_not(
    place: Place, expected: tuple[str, tuple[str, ...]], run: Path
) -> None:
    placed(run, place)
    assert found(run) == [expected]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda a, b: (a,), "corrupt-file"),
        (lambda a, b: (a, a), "corrupt-file"),
        (lambda a, b: (a, b._replace(start=(2, 0))), "unsupported-feature"),
    ],
    ids=["hole", "twice", "overlap"],
)
def test_chunks_that_do_not_cover_the_tensor_once(
    change: Callable[[Chunk, Chunk], tuple[Chunk, ...]], code: str, run: Path
) -> None:
    chunked(run, change)
    assert found(run) == [(code, (WEIGHT,))]


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a, b._replace(start=(4, 0))),
        lambda a, b: (a, b._replace(shape=(2, 1 << 40))),
        lambda a, b: (a, b._replace(start=(3,))),
        lambda a, b: (),
    ],
    ids=["beyond", "huge", "axes", "none"],
)
def test_chunks_that_are_none_of_the_tensor(
    change: Callable[[Chunk, Chunk], tuple[Chunk, ...]], run: Path
) -> None:
    chunked(run, change)
    assert found(run) == [("corrupt-file", (".metadata", WEIGHT))]


def test_items_that_are_not_what_the_metadata_says(run: Path) -> None:
    told = metadata(run)
    bias = told.entries["model.fc1.bias"]
    assert isinstance(bias, TensorEntry)
    placed(run, bias.chunks[0].place)
    assert found(run) == [("corrupt-file", (FIRST, WEIGHT))]
    with_entry(run, WEIGHT, replace(weight(run), dtype=BY_NAME["int32"]))
    problems = found(run)
    assert {code for code, _ in problems} == {"corrupt-file"}
    text = told.entries["text"]
    assert isinstance(text, Place)
    with_entry(run, WEIGHT, replace(weight(FSDP), chunks=(Chunk((0, 0), (5, 3), text),)))
    assert found(run) == [("unsupported-feature", (SECOND, WEIGHT))]


@pytest.mark.parametrize(
    ("paths", "code"),
    [
        ({"epoch": ("text", "below")}, "corrupt-file"),
        ({"epoch": ("model",)}, "corrupt-file"),
        ({"epoch": ("text",)}, "corrupt-file"),
        ({"epoch": ("nested", "list", 10**15)}, "corrupt-file"),
        ({"epoch": ("nested", "list", "name")}, "corrupt-file"),
        ({"epoch": ("x",) * (MAX_DEPTH + 1)}, "limit-exceeded"),
    ],
    ids=["below a value", "a container", "twice", "far away", "a name in a list", "deep"],
)
def test_paths_that_make_no_tree(paths: dict[str, tuple[str | int, ...]], code: str, run: Path) -> None:
    rewrite(run, paths={**metadata(run).paths, **paths})
    assert [found_code for found_code, _ in found(run)] == [code]


def test_entries_and_paths_that_do_not_go_together(run: Path) -> None:
    told = metadata(run)
    rewrite(run, paths={key: path for key, path in told.paths.items() if key != "text"})
    assert found(run) == [("corrupt-file", (".metadata", "text"))]


@pytest.mark.parametrize("key", [CONTAINERS, NOTE])
def test_our_own_entries_that_hold_something_else(key: str, run: Path) -> None:
    entry = metadata(run).entries["epoch"]
    with_entry(run, key, entry)
    ((code, _),) = found(run)
    assert code == "corrupt-file"


@pytest.mark.parametrize("way", sorted(commands("true")))
def test_nothing_in_the_metadata_is_run(way: str, run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    opcodes, _ = commands(f"touch {mark}")[way]
    (run / ".metadata").write_bytes(b"\x80\x04" + opcodes + b".")
    assert found(run) == [("corrupt-file", (".metadata", "Metadata"))]
    assert not mark.exists()


@pytest.mark.parametrize("way", sorted(commands("true")))
def test_nothing_in_a_value_is_run(way: str, run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    opcodes, name = commands(f"touch {mark}")[way]
    place = metadata(run).entries["text"]
    assert isinstance(place, Place)
    data = (run / SECOND).read_bytes()
    item = zipped(b"\x80\x02" + opcodes + b".")
    (run / SECOND).write_bytes(data + item)
    with_entry(run, "text", Place(SECOND, len(data), len(item)))
    described = {node.name for node in everything(read_raw(run).root) if isinstance(node, Opaque)}
    assert name in described
    assert not mark.exists()


def everything(node: Node) -> list[Node]:
    return [node, *(inner for _, part in children(node) for inner in everything(part))]


def zipped(pickled: bytes) -> bytes:
    """A `torch.save` file with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def test_metadata_cut_anywhere(run: Path) -> None:
    data = (run / ".metadata").read_bytes()
    for nbytes in range(0, len(data), 211):
        (run / ".metadata").write_bytes(data[:nbytes])
        assert {code for code, _ in found(run)} <= {"truncated-file", "malformed-pickle"}


def test_flipped_bytes_give_an_error_or_the_same_kind_of_tree(run: Path) -> None:
    chance = random.Random(4)
    for name in (".metadata", SECOND):
        data = (run / name).read_bytes()
        for _ in range(25):
            damaged = bytearray(data)
            for _ in range(3):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            (run / name).write_bytes(damaged)
            with contextlib.suppress(CkptError):  # and nothing else
                ckptconv.open(run)
        (run / name).write_bytes(data)


def test_a_flipped_bit_of_a_tensor_is_found(run: Path) -> None:
    (part,) = [leaf for path, leaf in walk(read_raw(run).root) if path == ("model", "fc2.weight")]
    (extent,) = part.extents  # type: ignore[union-attr]
    data = bytearray((run / extent.source.name).read_bytes())
    data[extent.offset + 2] ^= 1
    (run / extent.source.name).write_bytes(data)
    assert [problem.code for problem in ckptconv.validate(run)] == ["checksum-mismatch"]


# Shards of the HuggingFace writer


def shards(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(SHARDS / name, tmp_path / name))


def shard(folder: Path, rank: int) -> Path:
    return next(folder.rglob(f"shard-0000{rank}-*"))


def reheaded(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """The shard with other sharding information."""
    data = path.read_bytes()
    (nbytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + nbytes])
    info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    changed = change(info)
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info if changed is None else changed)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + nbytes :])


def test_the_first_shard_is_missing(tmp_path: Path) -> None:
    folder = shards(tmp_path, "shards")
    shard(folder, 1).unlink()
    assert ("corrupt-file", ("fc1.weight",)) in found(folder)


def test_the_last_shard_is_missing_beside_the_whole(tmp_path: Path) -> None:
    folder = shards(tmp_path, "both")
    shard(folder, 2).unlink()
    assert [code for code, _ in found(folder)] == ["corrupt-file"]


@pytest.mark.parametrize("offsets", [[-1, 0], [0], [1 << 63, 0], "0", None, [0.0, 0.0], [True, 0]], ids=repr)
def test_offsets_that_are_none(offsets: object, tmp_path: Path) -> None:
    folder = shards(tmp_path, "shards")
    path = shard(folder, 2)
    reheaded(path, lambda info: info["fc1.weight"].update(saved_offsets=offsets))
    assert found(folder) == [("corrupt-file", (path.name, "fc1.weight"))]


def test_a_tensor_far_away_is_no_large_tensor(tmp_path: Path) -> None:
    folder = shards(tmp_path, "shards")
    reheaded(shard(folder, 2), lambda info: info["fc1.weight"].update(saved_offsets=[1 << 50, 0]))
    assert found(folder) == [("corrupt-file", ("fc1.weight",))]


@pytest.mark.parametrize("info", [[], "none", 7], ids=repr)
def test_sharding_information_that_is_none(info: object, tmp_path: Path) -> None:
    folder = shards(tmp_path, "shards")
    path = shard(folder, 1)
    reheaded(path, lambda _: info)
    ((code, loc),) = found(folder)
    assert (code, loc[0]) == ("corrupt-file", path.name)
