"""safetensors against its own library: what it writes we read bit for bit, what we write it loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptconv import dtypes
from ckptconv.dialects.safetensors_weights import DIALECT
from ckptconv.document import Checkpoint, Known, Param, Progress
from ckptconv.errors import CkptError
from ckptconv.formats.safetensors import FORMAT
from ckptconv.formats.safetensors_header import tag_of
from ckptconv.ops import Concat, Permute
from ckptconv.rawtree import DictNode, RawTree, dict_of
from ckptconv.tensor import FilledTensor, StoredTensor, TensorSpec
from tests.support.documents import array_tensor, full_document, same_bytes
from tests.support.write_layout import write_layout

safetensors = pytest.importorskip("safetensors")
torch = pytest.importorskip("torch")
st = pytest.importorskip("safetensors.torch")

TAGGED = [
    row.name for row in dtypes.ROWS if row.torch and tag_of(TensorSpec(dtype=row, shape=(2,))) is not None
]


def write(raw: RawTree, path: Path) -> Path:
    write_layout(FORMAT.layout(raw, path), path)
    return path


def tree(items, note=None, **attributes) -> RawTree:
    return RawTree(format="safetensors", root=dict_of(items), attributes=attributes, note=note)


def tensors(raw: RawTree) -> dict[str, StoredTensor]:
    return dict(raw.root.items)


def torch_bytes(tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def our_bytes(tensor) -> bytes:
    return b"".join(window.tobytes() for window in tensor.windows())


def of_torch(name: str, shape=(2, 4)):
    data = array_tensor(shape, name)
    raw = torch.frombuffer(bytearray(our_bytes(data)), dtype=torch.uint8)
    return raw.view(getattr(torch, dtypes.BY_NAME[name].torch)).reshape(shape)


@pytest.fixture
def everything():
    named = {f"t.{name}": of_torch(name) for name in TAGGED}
    return {
        **named,
        "scalar": torch.tensor(-1.5),
        "empty": torch.zeros(0, 3),
        "é ключ 😀": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }


def test_what_the_library_writes_we_read(everything, tmp_path):
    path = tmp_path / "a.safetensors"
    st.save_file(everything, path, metadata={"format": "pt", "step": "9"})
    raw = FORMAT.read(path)
    assert raw.attributes == {"format": "pt", "step": "9"}
    read = tensors(raw)
    assert set(read) == set(everything)
    for name, tensor in everything.items():
        assert read[name].shape == tuple(tensor.shape)
        assert getattr(torch, read[name].dtype.torch) == tensor.dtype
        assert our_bytes(read[name]) == torch_bytes(tensor)


def test_what_we_write_is_what_the_library_writes(everything, tmp_path):
    path = tmp_path / "a.safetensors"
    st.save_file(everything, path, metadata={"format": "pt"})
    again = write(FORMAT.read(path), tmp_path / "b.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_what_we_write_the_library_loads(everything, tmp_path):
    path = tmp_path / "a.safetensors"
    st.save_file(everything, path)
    raw = FORMAT.read(path)
    loaded = st.load_file(write(replace(raw, attributes={}), tmp_path / "b.safetensors"))
    assert set(loaded) == set(everything)
    assert all(torch_bytes(loaded[name]) == torch_bytes(tensor) for name, tensor in everything.items())
    with safetensors.safe_open(tmp_path / "b.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_strided_tensors_are_packed(tmp_path):
    stored = array_tensor((3, 4, 5))
    turned = stored.apply(Permute((2, 0, 1)))
    assert not turned.is_dense
    expanded = StoredTensor(
        spec=TensorSpec(dtype=stored.dtype, shape=(2, 4)), extent=stored.extent, offset=1, strides=(0, 3)
    )
    joined = stored.apply(Concat(0), array_tensor((1, 4, 5)))
    items = {"turned": turned, "expanded": expanded, "joined": joined, "stored": stored}
    loaded = st.load_file(write(tree(items), tmp_path / "a.safetensors"))
    for name, tensor in items.items():
        assert torch_bytes(loaded[name]) == np.ascontiguousarray(tensor.read()).tobytes()


def test_save_model_aliases_are_read_and_written(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 3)
            self.b = torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

    model = Tied()
    path = tmp_path / "a.safetensors"
    st.save_model(model, str(path))
    raw = FORMAT.read(path)
    read = tensors(raw)
    assert set(read) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert read["a.weight"] is read["b.weight"]
    params = DIALECT.lift(raw).params
    assert {params["a.weight"].tied_to, params["b.weight"].tied_to} == {None, "a.weight"}

    again = write(raw, tmp_path / "b.safetensors")
    assert set(st.load_file(again)) == {"a.weight", "a.bias", "b.bias"}
    other = Tied()
    assert st.load_model(other, str(again)) == (set(), [])
    assert torch.equal(other.b.weight, model.a.weight)
    assert other.b.weight is other.a.weight


def test_only_twins_are_stored_once(tmp_path):
    stored = array_tensor((4, 4))
    turned = stored.apply(Permute((1, 0)))
    zeros = FilledTensor(spec=TensorSpec(dtype=stored.dtype, shape=(2,)))
    empty = array_tensor((0,))
    items = {
        "w": stored,
        "same": StoredTensor(spec=stored.spec, extent=stored.extent, strides=stored.strides),
        "turned": turned,
        "turned too": stored.apply(Permute((1, 0))),
        "z1": zeros,
        "z2": zeros,
        "e1": empty,
        "e2": empty,
    }
    path = write(tree(items), tmp_path / "a.safetensors")
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {"w", "turned", "z1", "z2", "e1", "e2"}
        assert file.metadata() == {"format": "pt", "same": "w", "turned too": "turned"}
    assert set(tensors(FORMAT.read(path))) == set(items)


def shards(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("name", ["m.safetensors", "m.safetensors.index.json", "m"])
def test_shards(everything, tmp_path, name):
    st.save_file(everything, tmp_path / "one.safetensors")
    raw = FORMAT.read(tmp_path / "one.safetensors")
    first = next(iter(tensors(raw)))
    raw = replace(
        raw,
        root=DictNode(items=(*raw.root.items, ("twin", raw.root.get(first)))),
        attributes={"shard_nbytes": 150, "who": "me"},
        note='{"n":1}',
    )
    target = tmp_path / "out" / name
    write(raw, target)
    directory = target if target.is_dir() else target.parent
    stem = "model" if target.is_dir() else "m"
    names = shards(directory)
    count = len(names) - 1
    assert count > 2
    assert names[-1] == f"{stem}.safetensors.index.json"
    assert names[0] == f"{stem}-00001-of-{count:05d}.safetensors"
    index = json.loads((directory / names[-1]).read_text())
    loaded = {}
    for shard in names[:-1]:
        part = st.load_file(directory / shard)
        assert all(index["weight_map"][key] == shard for key in part)
        loaded.update(part)
    assert set(loaded) == set(everything) == set(index["weight_map"])
    assert all(torch_bytes(loaded[key]) == torch_bytes(tensor) for key, tensor in everything.items())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in everything.values())

    for path in (target, directory / names[-1], directory):
        assert FORMAT.sniff(path)
        back = FORMAT.read(path)
        assert back.note == '{"n":1}'
        assert back.attributes == {"format": "pt", "who": "me"}
        assert set(tensors(back)) == {*everything, "twin"}
        assert tensors(back)["twin"] == tensors(back)[first]
        assert all(same_bytes(tensors(back)[key], tensor) for key, tensor in tensors(raw).items())


def test_an_index_with_one_shard(tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    write(tree({"w": array_tensor()}), path)
    assert shards(tmp_path) == ["m-00001-of-00001.safetensors", "m.safetensors.index.json"]
    assert set(tensors(FORMAT.read(path))) == {"w"}


def test_a_header_the_library_takes_in_any_order_we_take_too(tmp_path):
    header = json.dumps(
        {
            "b": {"dtype": "F32", "shape": [], "data_offsets": [2, 6], "extra": 1},
            "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
            "z": {"dtype": "F64", "shape": [0, 9], "data_offsets": [2, 2]},
        }
    ).encode()
    for number, text in enumerate((header, header + b"\n ", b" " + header)):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(6)))
        assert set(st.load_file(path)) == {"a", "b", "z"}
        raw = FORMAT.read(path)
        assert list(tensors(raw)) == ["b", "a", "z"]
        assert our_bytes(tensors(raw)["b"]) == bytes([2, 3, 4, 5])


def test_a_file_without_tensors(tmp_path):
    st.save_file({}, tmp_path / "a.safetensors")
    assert FORMAT.read(tmp_path / "a.safetensors").root.items == ()
    assert st.load_file(write(tree({}), tmp_path / "b.safetensors")) == {}


UNTAGGED = [row.name for row in dtypes.ROWS if row.itemsize and row.safetensors is None]


@pytest.mark.parametrize("name", [name for name in UNTAGGED if name != "float4_e2m1fn_x2"])
def test_a_dtype_without_a_tag_is_refused(name, tmp_path):
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(tree({"ok": array_tensor(), "w": array_tensor((2,), name)}), tmp_path / "a.safetensors")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("unknown-dtype", ("w",))]


def test_reading_reads_no_tensor_byte(tmp_path, monkeypatch):
    path = write(tree({"w": array_tensor((64, 64))}), tmp_path / "a.safetensors")
    nbytes = path.stat().st_size - 64 * 64 * 4
    path.write_bytes(path.read_bytes()[:nbytes])
    with path.open("r+b") as file:
        file.truncate(nbytes + 64 * 64 * 4)  # a hole: reading it would give zeros
    import ckptconv.tensor as module

    seen = []
    original = module.FileSource.read_into
    monkeypatch.setattr(
        module.FileSource,
        "read_into",
        lambda self, offset, out: (seen.append(offset + len(out)), original(self, offset, out))[1],
    )
    DIALECT.lift(FORMAT.read(path))
    assert max(seen) == nbytes


# -- the dialect ---------------------------------------------------------------------------------------


def weights_document() -> Checkpoint:
    shared = array_tensor((2, 3))
    return Checkpoint(
        progress=Progress(step=Known(value=9, source="optimizer.step")),
        params={
            "w": Param(name="w", tensor=shared),
            "v": Param(name="v", tensor=shared, tied_to="w"),
            "b": Param(name="b", tensor=array_tensor((3,), "bfloat16"), trainable=False),
        },
    )


def test_the_note_tells_progress(tmp_path):
    checkpoint = weights_document()
    path = write(DIALECT.lower(checkpoint), tmp_path / "a.safetensors")
    assert set(st.load_file(path)) == {"w", "b"}
    back = DIALECT.lift(FORMAT.read(path))
    assert back.progress.step == Known(value=9, source="embedded note")
    assert back.params["v"].tied_to == "w"
    assert back.kind == "weights"
    assert all(same_bytes(back.params[n].tensor, p.tensor) for n, p in checkpoint.params.items())


def test_without_a_note_nothing_is_known(tmp_path):
    st.save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    back = DIALECT.lift(FORMAT.read(tmp_path / "a.safetensors"))
    assert back.progress.step.reason == "safetensors holds weights only"


def test_optimizer_state_stays_in_the_note_only(tmp_path):
    checkpoint = full_document()
    kept = {n: p for n, p in checkpoint.params.items() if tag_of(p.tensor.spec)}
    raw = DIALECT.lower(replace(checkpoint, params=kept))
    path = write(raw, tmp_path / "a.safetensors")
    assert set(st.load_file(path)) == {"dense/kernel", "bias", "empty"}
    text = json.loads(FORMAT.read(path).note)
    assert [o["name"] for o in text["optimizers"]] == ["optimizer", "gen/sgd"]


def test_lower_undoes_lift(tmp_path):
    path = write(DIALECT.lower(weights_document()), tmp_path / "a.safetensors")
    raw = FORMAT.read(path)
    again = DIALECT.lower(DIALECT.lift(raw))
    assert (again.root, again.attributes, again.note) == (raw.root, raw.attributes, raw.note)
    assert write(again, tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_an_edited_document_wins_over_the_old_note(tmp_path):
    path = write(DIALECT.lower(full_weights()), tmp_path / "a.safetensors")
    lifted = DIALECT.lift(FORMAT.read(path))
    step = Known(value=20, status="supplied", source="--set")
    raw = DIALECT.lower(replace(lifted, progress=replace(lifted.progress, step=step)))
    back = json.loads(raw.note)
    assert back["progress"]["step"]["value"] == 20
    assert [o["name"] for o in back["optimizers"]] == ["optimizer", "gen/sgd"]


def full_weights() -> Checkpoint:
    checkpoint = full_document()
    kept = {n: p for n, p in checkpoint.params.items() if tag_of(p.tensor.spec)}
    return replace(checkpoint, params=kept)
