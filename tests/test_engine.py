"""The engine writes what the layout says, checks the sources on the way, and publishes all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from ckptconv import dtypes, engine, jobs, leftovers, publish, workers
from ckptconv.engine import write
from ckptconv.errors import CkptError
from ckptconv.formats.base import Layout, Placement, TargetFile
from ckptconv.ops import Cast, Permute
from ckptconv.rereading import check_sources, verify_written
from ckptconv.tensor import Checksum, Extent, FileSource, StoredTensor, TensorSpec

ROOT = Path(__file__).parent.parent


def codes(caught: pytest.ExceptionInfo[CkptError]) -> list[tuple[str, tuple[str | int, ...]]]:
    return [(problem.code, problem.loc) for problem in caught.value.problems]


def array(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def file_tensor(
    path: Path, values: np.ndarray, kind: str | None = None, wrong: int = 0, **kw: bool
) -> StoredTensor:
    """A stored tensor in a file of its own, with a recorded checksum."""
    raw = values.tobytes() if not kw else values.byteswap().tobytes()
    path.write_bytes(b"head" + raw)
    value = {"crc32": zlib.crc32, "crc32c": google_crc32c.value}[kind](raw) ^ wrong if kind else 0
    checksum = Checksum(kind=kind, value=value) if kind else None
    extent = Extent(source=FileSource(path), offset=4, nbytes=len(raw), checksum=checksum, **kw)
    return StoredTensor.dense(TensorSpec(dtype=dtypes.of_array(values), shape=values.shape), extent)


def layout(kind: str, files: dict[str, list[Placement]], tail: bytes = b"") -> Layout:
    """Files of placements; each ends with `tail` and the checksums in the order of their keys."""

    def target(name: str, placements: list[Placement]) -> TargetFile:
        end = max((p.offset + p.tensor.spec.nbytes for p in placements), default=0)

        def finish(checksums):
            yield end, tail + b"".join(v.to_bytes(4, "little") for _, v in sorted(checksums.items()))

        return TargetFile(name=name, placements=tuple(placements), finish=finish)

    return Layout(kind=kind, files=tuple(target(name, placements) for name, placements in files.items()))


def single(values: np.ndarray | StoredTensor, tail: bytes = b"") -> Layout:
    tensor = values if isinstance(values, StoredTensor) else StoredTensor.of_array(values)
    return layout("file", {"": [Placement(key="w", offset=0, tensor=tensor)]}, tail)


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads from files, as they happen."""
    reads: list[int] = []
    read_into = FileSource.read_into

    def spy(source: FileSource, offset: int, out: memoryview) -> None:
        reads.append(len(out))
        read_into(source, offset, out)

    monkeypatch.setattr(FileSource, "read_into", spy)
    return reads


@pytest.mark.parametrize("kind", [None, "crc32", "crc32c"])
@pytest.mark.parametrize("verified", [False, True])
def test_a_long_matrix_is_turned_box_by_box(
    tmp_path: Path, kind: str | None, verified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BUDGET_NBYTES", (1 << 16) * 3 // 2 * 2)
    monkeypatch.setattr(workers, "_WINDOW_NBYTES", (1 << 12, 1 << 12))
    values = array(3, (3000, 70))
    tensor = file_tensor(tmp_path / "source", values, "crc32").apply(Permute((1, 0)))
    assert tensor.tiles(1 << 16) is not None
    reads, seen = spy_on_reads(monkeypatch), []
    result = write(
        layout("file", {"": [Placement(key="w", offset=64, tensor=tensor, checksum=kind)]}),
        tmp_path / "out",
        jobs=2,
        verify=(lambda *_: None) if verified else None,
        progress=lambda done, total: seen.append((done, total)),
    )
    turned = values.T.tobytes()
    data = (tmp_path / "out").read_bytes()
    assert data[64 : 64 + len(turned)] == turned
    assert seen[-1] == (len(turned), len(turned))
    assert len(reads) < 600  # a panel of windows would be read in 10 runs of each of the 3000 rows
    sums = {"crc32": zlib.crc32(turned), "crc32c": google_crc32c.value(turned)}
    if kind is not None:
        assert data[64 + len(turned) :] == sums[kind].to_bytes(4, "little")
    expected = {"w": Checksum(kind=kind or "crc32c", value=sums[kind or "crc32c"])}
    assert result.contents == (expected if kind or verified else {})


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system has no such call")
@pytest.mark.parametrize("able", [True, False])
def test_bytes_that_nobody_looks_at_are_copied_by_the_system(
    tmp_path: Path, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not able:

        def refuses(*_: object) -> int:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "copy_file_range", refuses)
    values = array(1, (40, 30))
    spec = TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=(10, 30))
    part = replace(file_tensor(tmp_path / "source", values), spec=spec, offset=60)
    reads = spy_on_reads(monkeypatch)
    write(layout("file", {"": [Placement(key="w", offset=8, tensor=part)]}), tmp_path / "out")
    assert (tmp_path / "out").read_bytes()[8:] == values[2:12].tobytes()
    assert bool(reads) is not able


def test_a_source_cut_short_is_noticed_by_who_has_it_copied(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(1000))
    extent = Extent(source=FileSource(tmp_path / "source"), offset=0, nbytes=4800)
    tensor = StoredTensor.dense(TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=(1200,)), extent)
    with pytest.raises(CkptError) as caught:
        write(single(tensor), tmp_path / "out")
    assert codes(caught) == [("truncated-tensor", ("source", "w"))]
    assert not (tmp_path / "out").exists()


SETS = {
    "file": {"": b"new"},
    "prefix": {"ck.data-00000-of-00002": b"new", "ck.data-00001-of-00002": b"new", "ck.index": b"new"},
    "directory": {"w.bin": b"new", "sub/x.bin": b"new", "manifest.json": b"new"},
}


def of_kind(kind: str) -> Layout:
    return layout(kind, {name: [] for name in SETS[kind]}, b"new")


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def expected_tree(kind: str) -> dict[str, bytes]:
    below = "ck/" if kind == "directory" else ""
    return {below + (name or "ck"): data for name, data in SETS[kind].items()}


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_stand_where_the_layout_says(tmp_path: Path, threads: int, monkeypatch) -> None:
    monkeypatch.setattr(workers, "_WINDOW_NBYTES", (64, 256))
    monkeypatch.setattr(workers, "_PORTION_NBYTES", 1000)
    values = [array(i, (7, 11)) for i in range(5)]
    kinds = ["crc32", "crc32c", None, "crc32", "crc32c"]
    tensors = [
        file_tensor(tmp_path / f"s{i}", v, ["crc32", "crc32c", None][i % 3]) for i, v in enumerate(values)
    ]
    placements = [
        Placement(
            key=f"k{i}", offset=64 + 512 * i, tensor=t.apply(Permute((1, 0))) if i == 4 else t, checksum=k
        )
        for i, (t, k) in enumerate(zip(tensors, kinds, strict=True))
    ]
    values[4] = np.ascontiguousarray(values[4].T)
    seen = []
    result = write(
        layout("file", {"": placements}, b"tail"),
        tmp_path / "out",
        jobs=threads,
        digests=True,
        verify=lambda *_: None,
        progress=lambda *numbers: seen.append(numbers),
    )
    data = (tmp_path / "out").read_bytes()
    for i, value in enumerate(values):
        assert data[64 + 512 * i : 64 + 512 * i + value.nbytes] == value.tobytes()
        assert result.digests[f"k{i}"] == hashlib.sha256(value).hexdigest()
    sums = [zlib.crc32(values[0]), google_crc32c.value(values[1].tobytes())]
    sums += [zlib.crc32(values[3]), google_crc32c.value(values[4].tobytes())]
    assert data.endswith(b"tail" + b"".join(v.to_bytes(4, "little") for v in sums))
    assert result.files == (("", len(data)),)
    assert result.bytes_written == len(data)
    assert result.contents["k2"] == Checksum(kind="crc32c", value=google_crc32c.value(values[2].tobytes()))
    assert seen[-1] == (5 * 308, 5 * 308)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not leftovers.leftovers(tmp_path / "out")


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("old", [False, True])
def test_every_kind_is_published_and_replaced(tmp_path: Path, kind: str, old: bool) -> None:
    if old:
        write(layout(kind, {name: [] for name in SETS[kind]}, b"old"), tmp_path / "ck")
        (tmp_path / "ck.data-00003-of-00004").write_bytes(b"of a larger set") if kind == "prefix" else None
        (tmp_path / "ck.notes").write_bytes(b"not ours")
    write(of_kind(kind), tmp_path / "ck", force=old)
    assert tree(tmp_path) == expected_tree(kind) | ({"ck.notes": b"not ours"} if old else {})


@pytest.mark.parametrize("kind", SETS)
def test_a_target_that_exists_is_refused(tmp_path: Path, kind: str) -> None:
    write(of_kind(kind), tmp_path / "ck")
    before = tree(tmp_path)
    with pytest.raises(CkptError) as caught:
        write(of_kind(kind), tmp_path / "ck")
    assert codes(caught) == [("target-exists", ("ck",))]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", SETS)
def test_a_target_that_appears_meanwhile_is_refused(tmp_path: Path, kind: str) -> None:
    name = "ck.index" if kind == "prefix" else "ck"
    with pytest.raises(CkptError) as caught:
        write(of_kind(kind), tmp_path / "ck", verify=lambda *_: (tmp_path / name).write_bytes(b"x"))
    assert codes(caught) == [("target-exists", ("ck",))]
    assert tree(tmp_path) == {name: b"x"}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_force_never_deletes_a_directory_that_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "thesis.tex").write_bytes(b"x")
    with pytest.raises(CkptError) as caught:
        write(of_kind(kind), tmp_path / "ck", force=True)
    assert codes(caught) == [("target-exists", ("ck",))]
    assert tree(tmp_path) == {"ck/thesis.tex": b"x"}


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"x")
    (tmp_path / "ck").symlink_to("precious")
    write(of_kind("file"), tmp_path / "ck", force=True)
    assert tree(tmp_path) == {"precious": b"x", "ck": b"new"}


def test_a_parent_that_is_missing_or_closed(tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        write(of_kind("file"), tmp_path / "none" / "ck")
    assert codes(caught) == [("target-unwritable", ("ck",))]
    assert not (tmp_path / "none").exists()
    closed = tmp_path / "closed"
    closed.mkdir()
    with pytest.MonkeyPatch.context() as patch:  # root may write anywhere
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(CkptError) as caught:
            write(of_kind("file"), closed / "ck")
    assert codes(caught) == [("target-unwritable", ("ck",))]


@pytest.mark.parametrize("link", [False, True])
def test_a_source_is_never_the_target(tmp_path: Path, link: bool) -> None:
    tensor = file_tensor(tmp_path / "s", array(0, (4,)))
    target = tmp_path / "s"
    if link:
        target = tmp_path / "other"
        target.hardlink_to(tmp_path / "s")
    with pytest.raises(CkptError) as caught:
        write(single(tensor), target, force=True)
    assert codes(caught) == [("usage", (target.name,))]


def test_a_directory_that_holds_a_source_is_never_replaced(tmp_path: Path) -> None:
    write(of_kind("directory"), tmp_path / "ck")
    tensor = file_tensor(tmp_path / "ck" / "sub" / "s", array(0, (4,)))
    new = layout("directory", {"manifest.json": [Placement(key="w", offset=0, tensor=tensor)]})
    with pytest.raises(CkptError) as caught:
        write(new, tmp_path / "ck", force=True)
    assert codes(caught) == [("usage", ("ck",))]


@pytest.mark.parametrize("kind", ["crc32", "crc32c"])
@pytest.mark.parametrize("way", ["inline", "permuted", "cast", "big-endian", "part"])
def test_source_checksums_are_checked_whatever_the_way(
    tmp_path: Path, kind: str, way: str, monkeypatch
) -> None:
    kw = {"big_endian": True} if way == "big-endian" else {}
    for wrong in (0, 1):
        values = array(0, (6, 8))
        tensor = file_tensor(tmp_path / f"s{wrong}", values, kind, wrong, **kw)
        shared = {"permuted": Permute((1, 0)), "cast": Cast("float64")}
        if way == "part":
            spec = TensorSpec(dtype=tensor.dtype, shape=(5, 8))
            lazy = StoredTensor.dense(spec, tensor.extent, 8)
        else:
            lazy = tensor.apply(shared[way]) if way in shared else tensor
        reads = spy_on_reads(monkeypatch)
        target = tmp_path / f"out{wrong}"
        pair = layout(
            "file", {"": [Placement(key=k, offset=o, tensor=lazy) for k, o in (("a", 0), ("b", 999))]}
        )
        if wrong:
            with pytest.raises(CkptError) as caught:
                write(pair, target)
            assert codes(caught) == [("checksum-mismatch", ("s1", "a"))]
            assert not target.exists()
        else:
            write(pair, target, verify=lambda *_: None)
            extra = 0 if way == "inline" else 1  # one pass for both
            assert sum(reads) == 2 * (160 if way == "part" else 192) + extra * 192
        monkeypatch.undo()
        assert not leftovers.leftovers(target)


def test_all_mismatches_are_reported_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "_PORTION_NBYTES", 1)
    tensors = [file_tensor(tmp_path / f"s{i}", array(i, (4,)), "crc32", wrong=i % 2) for i in range(6)]
    placements = [Placement(key=f"k{i}", offset=16 * i, tensor=t) for i, t in enumerate(tensors)]
    with pytest.raises(CkptError) as caught:
        write(layout("file", {"": placements}), tmp_path / "out")
    assert codes(caught) == [("checksum-mismatch", (f"s{i}", f"k{i}")) for i in (1, 3, 5)]


def test_a_loss_names_its_tensor(tmp_path: Path) -> None:
    tensor = StoredTensor.of_array(np.array([1e300])).apply(Cast("float32"))
    with pytest.raises(CkptError) as caught:
        write(layout("file", {"": [Placement(key="w", offset=0, tensor=tensor)]}), tmp_path / "out")
    assert codes(caught) == [("precision-loss", ("w",))]
    assert tree(tmp_path) == {}


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    tensor = file_tensor(tmp_path / "s", array(0, (4,)))
    os.utime(tmp_path / "s", ns=(5, 5))
    with pytest.raises(CkptError) as caught:
        write(single(tensor), tmp_path / "out")
    assert codes(caught)[0][0] == "source-changed"
    assert not (tmp_path / "out").exists()


def test_what_verification_refuses_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "ck").write_bytes(b"old")

    def verify(path: Path, result: engine.WriteResult) -> None:
        tensor = StoredTensor.dense(
            TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=(4,)),
            Extent(source=FileSource(path), offset=0, nbytes=16),
        )
        verify_written(result.contents, [("w", tensor)])
        with path.open("r+b") as file:
            file.write(b"\0")
        verify_written(result.contents | {"gone": result.contents["w"]}, [("w", tensor)])

    with pytest.raises(CkptError) as caught:
        write(single(array(0, (4,))), tmp_path / "ck", force=True, verify=verify)
    assert sorted(codes(caught)) == [("verify-failed", ("gone",)), ("verify-failed", ("w",))]
    assert tree(tmp_path) == {"ck": b"old"}


def test_a_recorded_checksum_that_is_wrong_fails_verification(tmp_path: Path) -> None:
    values = array(0, (4,))
    right = Checksum(kind="crc32", value=zlib.crc32(values))
    verify_written({"w": right}, [("w", file_tensor(tmp_path / "a", values, "crc32"))])
    with pytest.raises(CkptError) as caught:
        verify_written({"w": right}, [("w", file_tensor(tmp_path / "b", values, "crc32", wrong=1))])
    assert codes(caught) == [("verify-failed", ("w",))]


def test_no_space_is_known_before_anything_is_written(tmp_path: Path) -> None:
    from ckptconv.tensor import FilledTensor

    huge = FilledTensor(spec=TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=(1 << 50,)))
    with pytest.raises(CkptError) as caught:
        write(layout("file", {"": [Placement(key="w", offset=0, tensor=huge)]}), tmp_path / "out")
    assert codes(caught) == [("no-space", ("out",))]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_fails_while_it_is_written(tmp_path: Path, number: int, monkeypatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    (tmp_path / "ck").write_bytes(b"old")
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(CkptError) as caught:
        write(single(array(0, (4,))), tmp_path / "ck", force=True)
    assert codes(caught) == [("target-unwritable" if number == errno.EIO else "no-space", ("ck",))]
    assert tree(tmp_path) == {"ck": b"old"}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("at", range(8))
def test_a_failure_while_publishing_puts_the_old_target_back(
    tmp_path: Path, kind: str, at: int, monkeypatch
) -> None:
    write(layout(kind, {name: [] for name in SETS[kind]}, b"old"), tmp_path / "ck")
    before, left = tree(tmp_path), [at]

    def failing(act):
        def rename(*args: object) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.EIO, "no")
            act(*args)

        return rename

    monkeypatch.setattr(os, "rename", failing(os.rename))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    monkeypatch.setattr(publish, "_exchanged", lambda *_: False)
    renames = {"file": 1, "prefix": 7, "directory": 3}[kind]  # that of the journal, too
    if at >= renames:
        write(of_kind(kind), tmp_path / "ck", force=True)
        assert tree(tmp_path) == expected_tree(kind)
        return
    with pytest.raises(CkptError) as caught:
        write(of_kind(kind), tmp_path / "ck", force=True)
    assert codes(caught) == [("target-unwritable", ("ck",))]
    assert tree(tmp_path) == before


DEATHS = [("file", 0), *(("directory", at) for at in (0, 1, 2)), *(("prefix", at) for at in range(7))]


@pytest.mark.parametrize(("kind", "at"), DEATHS)
def test_a_death_while_publishing_never_leaves_a_mixture(tmp_path: Path, kind: str, at: int) -> None:
    write(layout(kind, {name: [] for name in SETS[kind]}, b"old"), tmp_path / "ck")
    script = f"""
import os, sys
from pathlib import Path
from ckptconv import publish
from ckptconv.engine import write
from tests.test_engine import of_kind
publish._exchanged = lambda *_: False
left = [{at}]
def dying(act):
    def rename(*args):
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), 9)
        act(*args)
    return rename
os.rename, os.replace = dying(os.rename), dying(os.replace)
write(of_kind({kind!r}), Path({str(tmp_path)!r}) / "ck", force=True)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    new = expected_tree(kind)
    now = {name: data for name, data in tree(tmp_path).items() if not name.startswith(".")}
    commit = {"file": "ck", "prefix": "ck.index", "directory": "ck/manifest.json"}[kind]
    old = dict.fromkeys(new, b"old")
    assert commit not in now or now in (old, new)
    # The next run puts the old one back, and takes away what the dead one left.
    with pytest.raises(CkptError) as caught:
        write(of_kind(kind), tmp_path / "ck")
    assert codes(caught) == [("target-exists", ("ck",))]
    assert tree(tmp_path) == old


def test_a_directory_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    if not publish._exchanged(first, second):
        pytest.skip("the system or its file system has no exchange")
    write(layout("directory", {name: [] for name in SETS["directory"]}, b"old"), tmp_path / "ck")
    monkeypatch.delattr(os, "rename")
    write(of_kind("directory"), tmp_path / "ck", force=True)
    assert tree(tmp_path) == expected_tree("directory")


def test_what_a_dead_run_left_is_taken_away_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    dead, living = (leftovers.staging_path(tmp_path / "ck", word) for word in ("dead", "living"))
    for staging in (dead, living):
        staging.mkdir()
        (staging / "lock").touch()
        (staging / "ck").write_bytes(b"half")
    new, strange = (leftovers.staging_path(tmp_path / "ck", word) for word in ("new", "strange"))
    new.mkdir()  # its run has not got to its lock yet
    link, elsewhere = leftovers.staging_path(tmp_path / "ck", "link"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    strange.write_bytes(b"no directory")
    with leftovers.locked(living) as alone:
        assert alone
        write(of_kind("file"), tmp_path / "ck")
    left = {path.name for path in (living, new, strange, link, elsewhere)}
    assert {path.name for path in tmp_path.iterdir()} == {"ck", *left}
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "journal", [b"", b"[", b"7", b'[["a"]]', b'[["../x", "ck"]]', b'[["/etc/x", "ck"]]', b'[[["x"], 3]]']
)
def test_a_journal_that_is_none_of_ours_moves_nothing(tmp_path: Path, journal: bytes) -> None:
    (tmp_path / "inner").mkdir()
    staging = leftovers.staging_path(tmp_path / "inner" / "ck", "dead")
    staging.mkdir()
    (staging / "lock").touch()
    (staging / leftovers.JOURNAL).write_bytes(journal)
    write(of_kind("file"), tmp_path / "inner" / "ck")
    assert tree(tmp_path) == {"inner/ck": b"new"}


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(of_kind("directory"), tmp_path / "ck")
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "ck", *(tmp_path / "ck").iterdir())}
    assert modes == {"ck": 0o750, "w.bin": 0o640, "manifest.json": 0o640, "sub": 0o750}


def test_another_executor_runs_the_same_jobs(tmp_path: Path) -> None:
    values = array(0, (64, 64))
    tensor = file_tensor(tmp_path / "s", values, "crc32").apply(Permute((1, 0)))
    seen = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        write(single(tensor), tmp_path / "out", executor=pool, progress=lambda *n: seen.append(n))
        assert (tmp_path / "out").read_bytes() == values.T.tobytes()
        assert seen == [(values.nbytes, values.nbytes)]
        wrong = file_tensor(tmp_path / "t", values, "crc32", wrong=1)
        with pytest.raises(CkptError) as caught:
            write(single(wrong), tmp_path / "out2", executor=pool)
    assert codes(caught) == [("checksum-mismatch", ("t", "w"))]


def test_two_runs_with_executors_do_not_share_their_files(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    staging = publish.Publication.of("file", tmp_path / "out", [""], False, resumable=True).staging
    staging.mkdir()
    with (staging / "lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CkptError) as caught:
            write(single(array(0, (4,))), tmp_path / "out", executor=pool)
        assert codes(caught) == [("target-busy", ("out",))]
        fcntl.flock(lock, fcntl.LOCK_UN)
        write(single(array(0, (4,))), tmp_path / "out", executor=pool)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_files_are_not_looked_for_behind_a_link(tmp_path: Path) -> None:
    staging = publish.Publication.of("file", tmp_path / "out", [""], False, resumable=True).staging
    (tmp_path / "elsewhere").mkdir()
    staging.symlink_to(tmp_path / "elsewhere")
    with ThreadPoolExecutor(1) as pool, pytest.raises(CkptError) as caught:
        write(single(array(0, (4,))), tmp_path / "out", executor=pool)
    assert codes(caught) == [("target-unwritable", ("out",))]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_bookkeeping_is_done_last(tmp_path: Path) -> None:
    seen = []
    plan = of_kind("prefix")

    def note(path: Path, scratch: Path) -> None:
        seen.append({name: data for name, data in tree(path.parent).items() if not name.startswith(".")})
        assert scratch.parent == path.parent

    write(Layout(kind=plan.kind, files=plan.files, bookkeeping=(note,)), tmp_path / "ck")
    assert seen == [expected_tree("prefix")]


def test_jobs_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        write(of_kind("file"), tmp_path / "ck", jobs=0)
    assert codes(caught) == [("usage", ("jobs",))]


SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from ckptconv.engine import write
from ckptconv.tensor import FileSource
from tests.test_engine import single, file_tensor
here = Path(sys.argv[1])
def slowly(done, total):
    (here / "started").touch()
    time.sleep(0.02)
tensor = file_tensor(here / "s", np.zeros(64 << 20, np.uint8))
write(single(tensor), here / "ck", force=True, progress=slowly, jobs=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_end_in_the_middle_leaves_the_old_target(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "ck").write_bytes(b"old")
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(number)
    error = child.communicate(timeout=60)[1]
    assert (tmp_path / "ck").read_bytes() == b"old"
    left = leftovers.leftovers(tmp_path / "ck")
    if number == signal.SIGINT:
        assert b"KeyboardInterrupt" in error
        assert left == ()
    else:
        assert len(left) == 1


def test_a_limit_of_the_system_is_no_space(tmp_path: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
    script = (
        limited
        + """
import sys
from pathlib import Path
import numpy as np
from ckptconv.engine import write
from ckptconv.errors import CkptError
from tests.test_engine import single
try:
    write(single(np.zeros(1 << 20, np.uint8)), Path(sys.argv[1]) / "ck")
except CkptError as error:
    sys.exit([p.code for p in error.problems] != ["no-space"])
sys.exit(2)
"""
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert tree(tmp_path) == {}


def test_a_failing_worker_stops_the_others(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "_PORTION_NBYTES", 1)
    written, lock = [], threading.Lock()

    def pwrite(fd: int, data: memoryview, offset: int) -> None:
        with lock:
            written.append(offset)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "full")
        time.sleep(0.01)

    monkeypatch.setattr(jobs, "pwrite", pwrite)
    tensors = [StoredTensor.of_array(array(i, (4,))) for i in range(200)]
    placements = [Placement(key=f"k{i}", offset=16 * i, tensor=t) for i, t in enumerate(tensors)]
    with pytest.raises(CkptError) as caught:
        write(layout("file", {"": placements}), tmp_path / "out", jobs=2)
    assert codes(caught) == [("no-space", ("out",))]
    assert len(written) < 10


def test_sources_can_be_checked_without_writing(tmp_path: Path) -> None:
    tensors = [file_tensor(tmp_path / f"s{i}", array(i, (40,)), "crc32c", wrong=i % 2) for i in range(4)]
    with pytest.raises(CkptError) as caught:
        check_sources(tensor.extent for tensor in tensors)
    assert codes(caught) == [("checksum-mismatch", ("s1",)), ("checksum-mismatch", ("s3",))]
