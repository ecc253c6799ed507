"""The neutral directory: everything comes back exactly, and nothing that does not belong is taken."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings

import ckptconv
from ckptconv import dtypes, schema
from ckptconv.bitcast import AsBytes, FromBytes
from ckptconv.conversion import convert
from ckptconv.conversion import save as write
from ckptconv.dialects.neutral import DIALECT, slot_key
from ckptconv.document import Checkpoint, Group, Known, Optimizer, Param, Progress, Unknown
from ckptconv.errors import CkptError
from ckptconv.formats.neutral import FORMAT, MANIFEST, SECTIONS, check_directory
from ckptconv.formats.safetensors import FORMAT as SAFETENSORS
from ckptconv.ops import Permute
from ckptconv.tensor import BufferSource, Extent, MissingTensor, StoredTensor
from tests.support.documents import array_tensor, documents, full_document, same_bytes
from tests.support.write_layout import write_layout


def save(checkpoint: Checkpoint, path: Path, **attributes) -> Path:
    raw = replace(DIALECT.lower(checkpoint), attributes=attributes)
    write_layout(FORMAT.layout(raw, path), path)
    return path


def load(path: Path) -> Checkpoint:
    return DIALECT.lift(FORMAT.read(path))


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    """Equal to the last bit and in the same order."""
    left, right = dict(a.tensors()), dict(b.tensors())
    assert list(left) == list(right)
    assert all(same_bytes(tensor, right[address]) for address, tensor in left.items())
    assert schema.from_json(schema.to_json(a)) == schema.from_json(schema.to_json(b))
    assert a.residue == b.residue
    assert list(a.params) == list(b.params)


def found(error: CkptError):
    return [(problem.code, problem.loc) for problem in error.problems]


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def test_everything_comes_back(tmp_path):
    checkpoint = full_document()
    path = save(checkpoint, tmp_path / "run")
    assert names(path) == [
        "extras.safetensors",
        MANIFEST,
        "optimizer.safetensors",
        "state.msgpack",
        "weights.safetensors",
    ]
    assert FORMAT.sniff(path)
    assert not SAFETENSORS.sniff(path)
    assert check_directory(path) == []
    back = load(path)
    assert_equal(back, checkpoint)
    assert back.params["head.kernel"].tensor is back.params["dense/kernel"].tensor
    again = save(back, tmp_path / "again")
    for name in names(path):
        assert (again / name).read_bytes() == (path / name).read_bytes()


def test_lower_undoes_lift(tmp_path):
    raw = FORMAT.read(save(full_document(), tmp_path / "run"))
    assert DIALECT.lower(DIALECT.lift(raw)).root == raw.root


def test_lift_undoes_lower_without_a_file():
    checkpoint = full_document()
    assert_equal(DIALECT.lift(DIALECT.lower(checkpoint)), checkpoint)


def test_the_manifest_is_valid_and_last(tmp_path):
    checkpoint = full_document()
    layout = FORMAT.layout(DIALECT.lower(checkpoint), tmp_path / "run")
    assert layout.kind == "directory"
    assert layout.files[-1].name == MANIFEST
    path = save(checkpoint, tmp_path / "run")
    manifest = json.loads((path / MANIFEST).read_text())
    assert schema.validate_manifest(manifest) == []
    sizes = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    assert sizes == {name: (path / name).stat().st_size for name in names(path) if name != MANIFEST}


def test_the_weights_are_plain_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    checkpoint = full_document()
    path = save(replace(checkpoint, params=dict(list(checkpoint.params.items())[:1])), tmp_path / "run")
    # The other parameters are gone, so are the optimizers' references: only the file is looked at.
    loaded = library.load_file(path / "weights.safetensors")
    kernel = checkpoint.params["dense/kernel"].tensor.read()
    assert loaded["dense/kernel"].tobytes() == kernel.tobytes()


@pytest.mark.parametrize("row", [row for row in dtypes.ROWS if row.itemsize], ids=lambda row: row.name)
def test_every_dtype(row, tmp_path):
    shapes = {"v": (3,), "s": (), "e": (0, 2), "m": (2, 2)}
    params = {n: Param(name=n, tensor=array_tensor(shape, row.name)) for n, shape in shapes.items()}
    turned = array_tensor((2, 3), row.name).apply(Permute((1, 0)))
    params["t"] = Param(name="t", tensor=turned)
    checkpoint = Checkpoint(progress=Progress(step=Unknown(reason="none")), params=params)
    assert_equal(load(save(checkpoint, tmp_path / "run")), checkpoint)


@pytest.mark.parametrize("name", ["complex128", "complex32", "qint32", "int4", "float8_e4m3b11fnuz"])
def test_bytes_of_a_big_endian_file(name):
    row = dtypes.BY_NAME[name]
    little = array_tensor((2, 3), name)
    data = b"".join(w.tobytes() for w in little.windows())
    step = row.swap
    swapped = b"".join(data[i : i + step][::-1] for i in range(0, len(data), step))
    extent = Extent(source=BufferSource(swapped), offset=0, nbytes=len(swapped), big_endian=True)
    big = StoredTensor.dense(little.spec, extent)
    stored = big.apply(AsBytes())
    assert b"".join(w.tobytes() for w in stored.windows()) == data
    assert b"".join(w.tobytes() for w in stored.windows(5)) == data
    back = stored.apply(FromBytes(name, (2, 3)))
    assert same_bytes(back, big)
    assert stored.block((0, 1, 0), (2, 3, 1)).tobytes() == stored.read()[0:2, 1:3, 0:1].tobytes()


def two_optimizers() -> Checkpoint:
    params = {n: Param(name=n, tensor=array_tensor((2,))) for n in ("a", "b/c", "c")}

    def optimizer(name: str, *own: str) -> Optimizer:
        return Optimizer(
            name=name,
            algorithm="sgd",
            framework="torch",
            step=Known(value=3, source=name),
            groups=(Group(params=own),),
            slots={
                "m": {n: array_tensor((2,)) for n in own},
                "m/x~": {n: array_tensor((2,)) for n in own},
            },
        )

    # Written one after the other with slashes, both would have the key "a/b/c/m".
    optimizers = (optimizer("a", "b/c"), optimizer("a/b", "c"), optimizer("a~1b", "a"))
    return Checkpoint(progress=Progress(step=Unknown(reason="several")), params=params, optimizers=optimizers)


def test_several_optimizers_share_a_file_without_a_clash(tmp_path):
    checkpoint = two_optimizers()
    path = save(checkpoint, tmp_path / "run")
    assert_equal(load(path), checkpoint)
    assert slot_key("a", "m", "b/c", several=True) == "a/b/c/m"
    assert slot_key("a/b", "m", "c", several=True) == "a~1b/c/m"
    assert slot_key("a", "m", "b/c", several=False) == "b/c/m"


def test_shards(tmp_path):
    checkpoint = full_document()
    path = save(checkpoint, tmp_path / "run", shard_nbytes=30)
    assert "weights-00001-of-00003.safetensors" in names(path)
    assert check_directory(path) == []
    assert_equal(load(path), checkpoint)


@settings(max_examples=40, deadline=None)
@given(documents())
def test_any_document_comes_back(tmp_path_factory, checkpoint):
    def filled(tensor):
        if tensor.spec.encoded_nbytes is None:
            return array_tensor(tensor.shape, tensor.dtype.name)
        data = bytes(tensor.spec.encoded_nbytes)
        return StoredTensor.dense(tensor.spec, Extent(source=BufferSource(data), offset=0, nbytes=len(data)))

    params = {}
    for name, param in checkpoint.params.items():
        first = params.get(param.tied_to)
        twin = first is not None and first.tensor.spec == param.tensor.spec
        params[name] = replace(param, tensor=first.tensor if twin else filled(param.tensor))
    optimizers = tuple(
        replace(o, slots={s: {n: filled(t) for n, t in d.items()} for s, d in o.slots.items()})
        for o in checkpoint.optimizers
    )
    checkpoint = replace(checkpoint, params=params, optimizers=optimizers)
    path = save(checkpoint, tmp_path_factory.mktemp("any") / "run")
    assert check_directory(path) == []
    assert_equal(load(path), checkpoint)


@pytest.mark.parametrize("target", ["neutral", "safetensors"])
def test_a_tensor_without_elements_passes_the_check(tmp_path, target):
    """It lies where the next one begins."""
    tensors = {"a": array_tensor((0, 3)), "b": array_tensor((2,))}
    params = {name: Param(name=name, tensor=tensor) for name, tensor in tensors.items()}
    checkpoint = Checkpoint(progress=Progress(step=Unknown(reason="none")), params=params)
    report = write(checkpoint, tmp_path / "run", to=target)
    assert report.verified
    assert [p.tensor.shape for p in ckptconv.open(tmp_path / "run").params.values()] == [(0, 3), (2,)]


def test_an_empty_document(tmp_path):
    checkpoint = Checkpoint(progress=Progress(step=Unknown(reason="none")))
    path = save(checkpoint, tmp_path / "run")
    assert names(path) == [MANIFEST]
    assert_equal(load(path), checkpoint)


def test_a_skeleton_has_nothing_to_write(tmp_path):
    checkpoint = full_document()
    skeleton = schema.from_json(schema.to_json(checkpoint))
    assert isinstance(skeleton.params["bias"].tensor, MissingTensor)
    with pytest.raises(CkptError) as caught:
        save(skeleton, tmp_path / "run")
    assert caught.value.problems[0].code == "reference-broken"


# -- what does not belong ------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    return save(full_document(), tmp_path / "run")


def edit(path: Path, change) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_an_edited_step_reaches_the_optimizer(run):
    def change(manifest):
        manifest["optimizers"][0]["step"] = {"status": "same", "of": "progress.step", "source": "o"}
        manifest["progress"]["step"]["value"] = 20

    edit(run, change)
    assert check_directory(run) == []
    back = load(run)
    assert back.optimizers[0].step == Known(value=20, source="o")
    assert back.optimizers[0].param_steps == {"dense/kernel": 20, "bias": 4}


def shorten(name):
    def damage(path):
        (path / name).write_bytes((path / name).read_bytes()[:-1])

    return damage


def lengthen(path):
    with (path / "weights.safetensors").open("ab") as file:
        file.write(b"x")


def flip(path):
    data = bytearray((path / "state.msgpack").read_bytes())
    data[5] ^= 1
    (path / "state.msgpack").write_bytes(data)


def edited(*location, value=None, drop=False):
    def damage(path):
        def change(manifest):
            node = manifest
            for step in location[:-1]:
                node = node[step]
            if drop:
                del node[location[-1]]
            else:
                node[location[-1]] = value

        edit(path, change)

    return damage


FIRST = ("files", 0, "path")
DAMAGED = {
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "missing-file", (MANIFEST,)),
    "manifest empty": (lambda p: (p / MANIFEST).write_bytes(b""), "corrupt-file", (MANIFEST,)),
    "manifest is a list": (lambda p: (p / MANIFEST).write_bytes(b"[]"), "schema-invalid", ("files",)),
    "key twice": (
        lambda p: (p / MANIFEST).write_text(
            (p / MANIFEST).read_text().replace('"kind"', '"files": [], "kind"')
        ),
        "duplicate-key",
        (MANIFEST,),
    ),
    "newer version": (edited("schema_version", value="2.0.0"), "schema-version", ("schema_version",)),
    "no weights": (lambda p: (p / "weights.safetensors").unlink(), "missing-file", ("files", 0, "path")),
    "weights cut": (shorten("weights.safetensors"), "truncated-file", ("files", 0, "bytes")),
    "weights longer": (lengthen, "corrupt-file", ("files", 0, "bytes")),
    "state cut": (shorten("state.msgpack"), "truncated-file", ("files", 3, "bytes")),
    "another file": (lambda p: (p / "notes.txt").write_text("x"), "corrupt-file", ("notes.txt",)),
    "another directory": (lambda p: (p / "old").mkdir(), "corrupt-file", ("old",)),
    "file outside": (
        edited("files", 0, "path", value="../x.safetensors"),
        "unsafe-path",
        ("files", 0, "path"),
    ),
    "absolute file": (edited("files", 0, "path", value="/etc/passwd"), "unsafe-path", FIRST),
    "negative size": (edited("files", 0, "bytes", value=-1), "corrupt-file", ("files", 0, "bytes")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_directories(case, run):
    damage, code, loc = DAMAGED[case]
    damage(run)
    with pytest.raises(CkptError) as caught:
        FORMAT.read(run)
    assert (code, loc) in found(caught.value)
    problems = [(problem.code, problem.loc) for problem in check_directory(run)]
    assert (code, loc) in problems


def test_the_manifest_cut_anywhere(run):
    data = (run / MANIFEST).read_bytes().rstrip()
    for end in range(0, len(data), 97):
        (run / MANIFEST).write_bytes(data[:end])
        with pytest.raises(CkptError) as caught:
            FORMAT.read(run)
        assert found(caught.value) == [("corrupt-file", (MANIFEST,))]


DISAGREEING = {
    "param that is not stored": (
        edited("params", 1, "name", value="bias2"),
        "reference-broken",
        None,
    ),
    "another shape": (edited("params", 3, "shape", value=[0, 5]), "reference-broken", ("weights", "empty")),
    "another dtype": (edited("params", 1, "dtype", value="float16"), "reference-broken", ("weights", "bias")),
    "extra that is not told": (edited("extras", 1, drop=True), "reference-broken", ("extras", "avg")),
    "slot that is not told": (
        edited("optimizers", 0, "slots", 2, drop=True),
        "reference-broken",
        ("optimizer", "optimizer/bias/master"),
    ),
    "unknown field": (edited("progress", "iteration", value=1), "schema-invalid", ("progress",)),
    "residue elsewhere": (
        edited("residue", "inline", value=""),
        "schema-invalid",
        ("residue", "inline"),
    ),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_manifest_and_tensors_disagree(case, run):
    damage, code, loc = DISAGREEING[case]
    damage(run)
    with pytest.raises(CkptError) as caught:
        load(run)
    assert code in [problem.code for problem in caught.value.problems]
    assert loc is None or (code, loc) in found(caught.value)


def test_a_digest_is_checked(run):
    flip(run)
    problems = [(problem.code, problem.loc) for problem in check_directory(run)]
    assert problems == [("digest-mismatch", ("files", 3, "digest"))]


TENSOR_FILES = [f"{section}.safetensors" for section in SECTIONS]


def test_every_file_has_a_digest_and_every_tensor_a_checksum(run):
    manifest = json.loads((run / MANIFEST).read_text())
    for entry in manifest["files"]:
        data = (run / entry["path"]).read_bytes()
        if entry["path"] == "state.msgpack":
            assert entry["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
            continue
        assert entry["digest"] == f"crc32c:{google_crc32c.value(data):08x}"
        header = json.loads(data[8 : (base := 8 + int.from_bytes(data[:8], "little"))])
        ranges = sorted(item["data_offsets"] for key, item in header.items() if key != "__metadata__")
        crcs = [google_crc32c.value(data[base + begin : base + end]) for begin, end in ranges]
        assert entry["tensor_crc32c"] == "".join(f"{crc:08x}" for crc in crcs)


def test_shards_have_digests(tmp_path):
    path = save(full_document(), tmp_path / "run", shard_nbytes=30)
    for entry in json.loads((path / MANIFEST).read_text())["files"][:-1]:
        assert entry["digest"] == f"crc32c:{google_crc32c.value((path / entry['path']).read_bytes()):08x}"


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_flipped_bit_anywhere_is_found(name, run, tmp_path):
    """By validation and by the conversion that reads it; the header's when it is opened."""
    whole = (run / name).read_bytes()
    base = 8 + int.from_bytes(whole[:8], "little")
    index = SECTIONS.index(name.partition(".")[0])
    for position in {0, 9, base // 2, base - 1, *range(base, len(whole), max(1, (len(whole) - base) // 9))}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (run / name).write_bytes(damaged)
        problems = check_directory(run)
        assert [(p.code, p.loc) for p in problems] == [("digest-mismatch", ("files", index, "digest"))]
        assert problems[0].message.count("crc32c:") == 2
        with pytest.raises(CkptError) as caught:
            convert(run, tmp_path / "again", to="neutral")
        if position >= base:
            (problem,) = caught.value.problems
            assert problem.code == "checksum-mismatch"
            assert problem.loc[0] == name
        assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_a_header_of_other_names_does_not_have_the_digest(run):
    data = (run / "weights.safetensors").read_bytes()
    (run / "weights.safetensors").write_bytes(data.replace(b'"bias"', b'"bibs"'))
    with pytest.raises(CkptError) as caught:
        FORMAT.read(run)
    assert found(caught.value) == [("digest-mismatch", ("files", 0, "digest"))]


def test_checksums_of_other_tensors_do_not_give_the_digest(run):
    def change(manifest):
        text = manifest["files"][1]["tensor_crc32c"]
        manifest["files"][1]["tensor_crc32c"] = text[8:] + text[:8]

    edit(run, change)
    with pytest.raises(CkptError) as caught:
        FORMAT.read(run)
    assert found(caught.value) == [("digest-mismatch", ("files", 1, "digest"))]


@pytest.mark.parametrize(
    ("value", "code", "loc"),
    [
        ("", "corrupt-file", ("weights.safetensors",)),
        ("0" * 8 * 1000, "corrupt-file", ("weights.safetensors",)),
        ("0" * 7, "schema-invalid", ("files", 0, "tensor_crc32c")),
        ("G" * 8, "schema-invalid", ("files", 0, "tensor_crc32c")),
        (7, "schema-invalid", ("files", 0, "tensor_crc32c")),
    ],
)
def test_checksums_that_are_none(value, code, loc, run):
    edited("files", 0, "tensor_crc32c", value=value)(run)
    with pytest.raises(CkptError) as caught:
        FORMAT.read(run)
    assert found(caught.value) == [(code, loc)]
    assert code in {problem.code for problem in check_directory(run)}


@pytest.mark.parametrize("digest", [None, "sha256", "crc32c"])
def test_a_manifest_without_checksums_of_tensors(digest, run):
    """As others may write it, and as this library did: what digests there are is validated."""

    def change(manifest):
        for entry in manifest["files"]:
            data = (run / entry["path"]).read_bytes()
            entry.pop("tensor_crc32c", None)
            kinds = {
                None: None,
                "sha256": f"sha256:{hashlib.sha256(data).hexdigest()}",
                "crc32c": f"crc32c:{google_crc32c.value(data):08x}",
            }
            entry["digest"] = kinds[digest]

    before = load(run)
    edit(run, change)
    assert check_directory(run) == []
    assert_equal(load(run), before)
    for index, name in enumerate([*TENSOR_FILES, "state.msgpack"]):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        problems = [(problem.code, problem.loc) for problem in check_directory(run)]
        if digest is not None:
            assert problems == [("digest-mismatch", ("files", index, "digest"))]
        (run / name).write_bytes(whole)


def test_a_residue_that_is_told_but_not_there(run):
    (run / "state.msgpack").unlink()
    edit(run, lambda manifest: manifest["files"].pop(3))
    with pytest.raises(CkptError) as caught:
        load(run)
    assert found(caught.value) == [("missing-file", ("state.msgpack",))]
    assert [(p.code, p.loc) for p in check_directory(run)] == [("reference-broken", ("residue", "file"))]


def test_hidden_files_are_not_looked_at(run):
    (run / ".DS_Store").write_bytes(b"x")
    assert check_directory(run) == []


def test_opening_reads_no_tensor_byte(run):
    for name in ("weights", "optimizer", "extras"):
        path = run / f"{name}.safetensors"
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header] + bytes(len(data) - header))
    back = load(run)  # the values are other ones now, and nobody has looked
    assert set(back.params) == set(full_document().params)


@pytest.mark.parametrize("name", ["weights.safetensors", "none"])
def test_what_is_no_neutral_directory(run, name):
    assert not FORMAT.sniff(run / name)
