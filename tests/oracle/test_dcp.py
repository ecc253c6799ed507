"""torch.distributed.checkpoint folders against torch itself: what ranks wrote, and what it loads of ours."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.checkpoint")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_state_dict,
)

import ckptconv  # noqa: E402
from ckptconv.detect import read_raw  # noqa: E402
from ckptconv.document import value_of  # noqa: E402
from ckptconv.formats.dcp_metadata import read_metadata  # noqa: E402
from ckptconv.formats.dcp_ranks import FIRST, REPEATED  # noqa: E402
from ckptconv.rawtree import Node, walk  # noqa: E402
from ckptconv.tensor import TensorRef, as_bytes  # noqa: E402
from tests.support.torch_equal import assert_same, bits, tensors  # noqa: E402

FIXTURES = Path(__file__).parents[2] / "fixtures"
DCP = FIXTURES / "dcp"
FSDP = DCP / "fsdp-2-ranks" / "run"
TITAN = DCP / "titan-2-ranks" / "run"
OWN = DCP / "own-2-ranks" / "run"
FILES = sorted((FIXTURES / "plain").glob("*/run.pt"))

pytestmark = pytest.mark.filterwarnings("ignore")


def leaves(folder: Path) -> dict[str, Node]:
    return {"/".join(map(str, path)): leaf for path, leaf in walk(read_raw(folder).root)}


def digest(leaf: TensorRef) -> list[Any]:
    """As `expected.json` has it."""
    return [leaf.dtype.name, list(leaf.shape), sha256(as_bytes(leaf.read())).hexdigest()]


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def items(node: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries and lists."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if pairs is None:
        return {path: node}
    return {key: leaf for step, part in pairs for key, leaf in items(part, f"{path}/{step}").items()}


def assert_equal_items(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
            assert bits(ours[key]) == bits(value), key
        else:
            assert type(ours[key]) is type(value), key
            assert ours[key] == value, key


CASES = ["fsdp-2-ranks", "titan-2-ranks", "grid-4-ranks", "safetensors-2-ranks", "own-2-ranks"]


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_the_one_that_torch_loads(case: str) -> None:
    truth = json.loads((DCP / case / "expected.json").read_text(encoding="utf-8"))["tensors"]
    found = {key: leaf for key, leaf in leaves(DCP / case / "run").items() if isinstance(leaf, TensorRef)}
    assert {key: digest(leaf) for key, leaf in found.items()} == truth


@pytest.mark.parametrize("name", ["shards", "both"])
def test_shards_of_the_huggingface_writer(name: str) -> None:
    """The 0-d float too, which torch consolidates to 0."""
    case = DCP / "hf-2-ranks"
    truth = json.loads((case / "expected.json").read_text(encoding="utf-8"))["tensors"]
    found = {key: leaf for key, leaf in leaves(case / "run" / name).items() if isinstance(leaf, TensorRef)}
    assert {key: digest(leaf) for key, leaf in found.items()} == truth
    assert float(found["temperature"].read()) == 123.0
    odd = ckptconv.open(case / "run" / name).oddities
    assert bool(odd) == (name == "shards")


def test_values_keep_their_types_and_places() -> None:
    found = leaves(FSDP)
    assert (found["epoch"], found["text"], found["nested/list/1"]) == (2, "two ranks", 4)
    assert found["nested/list/2/deep"] is None
    assert (found["nested/pair/0"], found["nested/pair/1"]) == (1, 2.5)
    assert found["optim/param_groups/0/params/0"] == "fc1.weight"
    assert found["optim/param_groups/0/amsgrad"] is False


@pytest.mark.parametrize("folder", [FSDP, TITAN, OWN], ids=["nested", "flat", "own"])
def test_the_run_is_lifted(folder: Path) -> None:
    truth = json.loads((folder.parent / "expected.json").read_text(encoding="utf-8"))
    checkpoint = ckptconv.open(folder)
    (optimizer,) = checkpoint.optimizers
    assert value_of(checkpoint.progress.step) == truth["step"]
    assert (optimizer.algorithm, optimizer.param_order) == (truth["optimizer"], "named")
    trained = ["fc1.weight", "fc1.bias", "bn.weight", "bn.bias", "fc2.weight", "fc2.bias"]
    assert list(optimizer.params) == trained
    assert set(checkpoint.params) - set(trained) == {
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    }


def test_one_torch_file_equals_what_torch_consolidates(tmp_path: Path) -> None:
    ckptconv.convert(FSDP, tmp_path / "ours.pt")
    dcp_to_torch_save(FSDP, tmp_path / "theirs.pt")
    assert_equal_items(items(load(tmp_path / "ours.pt")), items(load(tmp_path / "theirs.pt")))


def test_weights_equal_what_torch_consolidates(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    ckptconv.convert(FSDP, tmp_path / "ours.safetensors")
    dcp_to_torch_save(FSDP, tmp_path / "theirs.pt")
    ours = safetensors.load_file(tmp_path / "ours.safetensors")
    assert_equal_items(ours, load(tmp_path / "theirs.pt")["model"])


def test_ranks_that_saved_for_themselves_are_one_run(tmp_path: Path) -> None:
    """What several have is the first one's, and said; torch's own metadata of all ranks comes first."""
    found = leaves(OWN)
    assert (found["epoch"], found["rank"]) == (2, 0)
    raw = read_raw(OWN)
    entries = read_metadata((OWN / FIRST).read_bytes(), FIRST).entries
    shared = [
        key for key, leaf in found.items() if isinstance(leaf, TensorRef) and leaf.shape and "bn.r" not in key
    ]
    assert raw.attributes[REPEATED] == len(entries) - len(shared) + len(["rng"])
    (said,) = [odd for odd in ckptconv.open(OWN).oddities if "lowest rank" in odd]
    assert str(raw.attributes[REPEATED]) in said
    ckptconv.convert(OWN, tmp_path / "whole", to="dcp")
    ckptconv.convert(OWN, tmp_path / "ours.pt")
    dcp_to_torch_save(tmp_path / "whole", tmp_path / "theirs.pt")
    theirs = {k: v for k, v in items(load(tmp_path / "theirs.pt")).items() if not k.startswith("/ckptconv.")}
    assert_equal_items(items(load(tmp_path / "ours.pt")), theirs)
    both = shutil.copytree(OWN, tmp_path / "both")
    shutil.copytree(FSDP, both, dirs_exist_ok=True)
    assert "rank" not in leaves(both)


@pytest.mark.parametrize("folder", [FSDP, TITAN, DCP / "grid-4-ranks" / "run"], ids=["fsdp", "titan", "grid"])
def test_the_way_through_neutral_gives_the_same_folder(folder: Path, tmp_path: Path) -> None:
    ckptconv.convert(folder, tmp_path / "neutral", to="neutral")
    ckptconv.convert(tmp_path / "neutral", tmp_path / "again", to="dcp")
    dcp_to_torch_save(folder, tmp_path / "before.pt")
    dcp_to_torch_save(tmp_path / "again", tmp_path / "after.pt")
    ours = items(load(tmp_path / "after.pt"))
    ours = {key: value for key, value in ours.items() if not key.startswith("/ckptconv.containers")}
    assert_equal_items(ours, items(load(tmp_path / "before.pt")))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_a_file_comes_back_from_a_folder(path: Path, tmp_path: Path) -> None:
    """Kinds of containers, attributes, numbers as keys, ties and strides too."""
    ckptconv.convert(path, tmp_path / "folder", to="dcp")
    ckptconv.convert(tmp_path / "folder", tmp_path / "again.pt")
    before, after = load(path), load(tmp_path / "again.pt")
    assert_same_but_for_storages(before, after)


def assert_same_but_for_storages(a: Any, b: Any, path: str = "$") -> None:
    """A folder has no storages: a view of a part comes back with one of its own."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (
            b.dtype,
            b.shape,
            b.stride(),
            b.requires_grad,
        )
        assert bits(a) == bits(b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same_but_for_storages(a[key], b[key], f"{path}.{key}")
        assert_same(getattr(a, "_metadata", None), getattr(b, "_metadata", None))
    elif isinstance(a, (list, tuple)):
        for position, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_but_for_storages(x, y, f"{path}.{position}")
    else:
        assert repr(a) == repr(b), path


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    ckptconv.convert(FIXTURES / "plain" / "tied" / "run.pt", tmp_path / "folder", to="dcp")
    ckptconv.convert(tmp_path / "folder", tmp_path / "again.pt")

    def shared(path: Path) -> int:
        pointers = [t.data_ptr() for t in tensors(load(path)) if t.numel()]
        return len(pointers) - len(set(pointers))

    assert shared(tmp_path / "again.pt") == shared(FIXTURES / "plain" / "tied" / "run.pt") > 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))
        return out


def build(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    net = Net()
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    names = {id(p): name for name, p in net.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(p)] for p in group["params"]]
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(3, 2, 4, 4)).pow(2).mean().backward()
        optimizer.step()
    return net, optimizer


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    by_name = {}
    for name, parameter in net.named_parameters():
        by_name[name] = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    return {"model": {k: v.clone() for k, v in net.state_dict().items()}, "state": by_name}


@pytest.mark.parametrize("sharded", [False, True], ids=["one", "several"])
def test_torch_loads_a_folder_of_ours_into_model_and_optimizer(sharded: bool, tmp_path: Path) -> None:
    """From a file whose optimizer has numbers, in two groups that are not in the order of the model."""
    net, optimizer = build(4)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    limit = 600 if sharded else None
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "run", to="dcp", shard_size=limit)
    assert (len(list((tmp_path / "run").glob("*.distcp"))) > 1) == sharded
    fresh_net, fresh = build(1)
    exec(report.restore, {"model": fresh_net, "optimizer": fresh})
    assert_same(state_of(fresh_net, fresh), state_of(net, optimizer))
    assert len(fresh.state) == len(list(net.parameters()))


def go_on(net: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
    torch.manual_seed(99)
    for _ in range(updates):
        optimizer.zero_grad()
        net(torch.randn(3, 2, 4, 4)).pow(2).mean().backward()
        optimizer.step()


def test_a_run_goes_on_from_a_folder_of_ours_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """On one rank; two are in `test_fsdp`. A fresh run that loads nothing goes elsewhere."""
    net, optimizer = build(4)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "run", to="dcp")
    (resumed, its), (cold, other) = build(1), build(4)
    exec(report.restore, {"model": resumed, "optimizer": its})
    other.state.clear()
    for run in ((net, optimizer), (resumed, its), (cold, other)):
        go_on(*run, updates=5)
    assert_same(state_of(resumed, its), state_of(net, optimizer))
    weights = net.state_dict()["fc.weight"]
    assert not torch.allclose(cold.state_dict()["fc.weight"], weights, rtol=0, atol=1e-4)


def test_torch_loads_a_flat_folder_of_ours(tmp_path: Path) -> None:
    """Settings of every parameter by itself, as it was saved."""
    net, optimizer = build(4)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
    for group in optimizer.param_groups:
        group.pop("param_names")
    flat = {k: v for k, v in optimizer_state.items() if not k.endswith("param_names")}
    dcp.save({"weights": model_state, "opt": flat}, checkpoint_id=tmp_path / "theirs")
    ckptconv.convert(tmp_path / "theirs", tmp_path / "neutral", to="neutral")
    report = ckptconv.convert(tmp_path / "neutral", tmp_path / "ours", to="dcp")
    fresh_net, fresh = build(1)
    for group in fresh.param_groups:
        group.pop("param_names")
    exec(report.restore, {"model": fresh_net, "optimizer": fresh})
    assert_same(state_of(fresh_net, fresh), state_of(net, optimizer))


def test_torch_loads_weights_alone(tmp_path: Path) -> None:
    net, _ = build(4)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    report = ckptconv.convert(tmp_path / "weights.pt", tmp_path / "weights", to="dcp")
    fresh, _ = build(1)
    exec(report.restore, {"model": fresh})
    assert_same(dict(fresh.state_dict()), dict(net.state_dict()))


def test_a_folder_crosses_to_keras_as_its_file_does(tmp_path: Path) -> None:
    """And a Keras run goes onto a folder as template."""
    template = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
    file = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
    ckptconv.convert(file, tmp_path / "folder", to="dcp")
    ckptconv.convert(file, tmp_path / "ckpt-1", template=template)
    ckptconv.convert(tmp_path / "folder", tmp_path / "ckpt-2", template=template)
    direct, through = leaves(tmp_path / "ckpt-1"), leaves(tmp_path / "ckpt-2")
    number = "save_counter/.ATTRIBUTES/VARIABLE_VALUE"
    assert {key: told(leaf) for key, leaf in direct.items() if key != number} == {
        key: told(leaf) for key, leaf in through.items() if key != number
    }
    settled = {"epochs": "2", "epoch_convention": "count"}
    ckptconv.convert(tmp_path / "ckpt-2", tmp_path / "back", template=tmp_path / "folder", set_=settled)
    before, after = leaves(tmp_path / "folder"), leaves(tmp_path / "back")
    kept = [key for key, leaf in before.items() if isinstance(leaf, TensorRef)]
    assert kept
    assert {key: told(after[key]) for key in kept} == {key: told(before[key]) for key in kept}


def told(leaf: Node) -> object:
    return as_bytes(leaf.read()).tobytes() if isinstance(leaf, TensorRef) else repr(leaf)


def test_a_file_through_a_folder_restores_state_for_all_parameters(tmp_path: Path) -> None:
    """torch's own tool makes text of the numbers, and then restores none."""
    net, optimizer = build(4)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    torch_save_to_dcp(tmp_path / "run.pt", tmp_path / "theirs")
    dcp_to_torch_save(tmp_path / "theirs", tmp_path / "theirs.pt")
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "ours", to="dcp")
    ckptconv.convert(tmp_path / "ours", tmp_path / "ours.pt")
    ckptconv.convert(tmp_path / "theirs", tmp_path / "mended.pt")

    def restored(path: Path) -> tuple[int, bool]:
        fresh_net, fresh = build(0)
        fresh.load_state_dict(load(path)["optimizer"])
        mine = [fresh.state[p] for p in fresh_net.parameters() if p in fresh.state]
        saved = [optimizer.state[p] for p in net.parameters()]
        equal = len(mine) == len(saved) and all(
            torch.equal(a[key], b[key]) for a, b in zip(mine, saved, strict=True) for key in b
        )
        return len(mine), equal

    assert restored(tmp_path / "theirs.pt") == (0, False)
    assert restored(tmp_path / "ours.pt") == (6, True)
    assert restored(tmp_path / "mended.pt") == (6, True)


def test_a_step_that_is_edited_is_written_to_every_parameter(tmp_path: Path) -> None:
    ckptconv.convert(
        FIXTURES / "plain" / "mlp-adamw" / "run.pt", tmp_path / "a", to="dcp", set_={"step": "41"}
    )
    dcp_to_torch_save(tmp_path / "a", tmp_path / "a.pt")
    steps = [v for k, v in items(load(tmp_path / "a.pt")).items() if k.endswith("/step") and "/state/" in k]
    assert {float(step) for step in steps} == {41.0}


def test_every_counter_of_a_torchtitan_folder_follows_an_edited_step(tmp_path: Path) -> None:
    ckptconv.convert(TITAN, tmp_path / "a", to="dcp", set_={"step": "41", "learning_rate": "0.001"})
    dcp_to_torch_save(tmp_path / "a", tmp_path / "a.pt")
    state = load(tmp_path / "a.pt")
    assert state["train_state"]["step"] == 41
    assert {float(v) for k, v in state["optimizer"].items() if k.endswith(".step")} == {41.0}


@pytest.mark.slow
def test_a_bundle_holds_what_torch_consolidates(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    ckptconv.convert(FSDP, tmp_path / "bundle", to="tensorflow:tf-module", allow=["state-dropped"])
    dcp_to_torch_save(FSDP, tmp_path / "theirs.pt")
    model = load(tmp_path / "theirs.pt")["model"]
    reader = tf.train.load_checkpoint(str(tmp_path / "bundle"))
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    ours = {
        k.removesuffix(suffix).replace("/", "."): reader.get_tensor(k)
        for k in reader.get_variable_to_shape_map()
        if k.endswith(suffix)
    }
    assert {k: v.tobytes() for k, v in ours.items() if k in model} == {k: bits(v) for k, v in model.items()}
    assert set(ours) - set(model) <= {"save_counter"}


# Lightning: a part of the dictionary stands beside the entries

LIGHTNING = DCP / "lightning-2-ranks" / "run"


def test_a_lightning_folder_is_lifted_with_what_stands_beside() -> None:
    truth = json.loads((LIGHTNING.parent / "expected.json").read_text(encoding="utf-8"))
    checkpoint = ckptconv.open(LIGHTNING)
    assert checkpoint.provenance.dialect == "lightning"
    assert value_of(checkpoint.progress.step) == truth["step"]
    assert value_of(checkpoint.progress.epochs) == truth["epochs"]
    (optimizer,) = checkpoint.optimizers
    assert (optimizer.algorithm, optimizer.param_order) == (truth["optimizer"], "named")


def test_a_lightning_folder_as_a_file_holds_what_lightning_loads(tmp_path: Path) -> None:
    load_folder = pytest.importorskip("lightning.fabric.utilities.load")._load_distributed_checkpoint
    theirs = load_folder(LIGHTNING)
    theirs["optimizer_states"] = [theirs.pop("optimizer_0")]
    ckptconv.convert(LIGHTNING, tmp_path / "run.ckpt")
    assert_equal_items(items(load(tmp_path / "run.ckpt")), items(theirs))


def test_a_lightning_folder_comes_back_through_neutral(tmp_path: Path) -> None:
    ckptconv.convert(LIGHTNING, tmp_path / "neutral", to="neutral")
    ckptconv.convert(tmp_path / "neutral", tmp_path / "again", to="dcp")
    assert_equal_items(items(load(tmp_path / "again" / "meta.pt")), items(load(LIGHTNING / "meta.pt")))
    dcp_to_torch_save(LIGHTNING, tmp_path / "before.pt")
    dcp_to_torch_save(tmp_path / "again", tmp_path / "after.pt")
    assert_equal_items(items(load(tmp_path / "after.pt")), items(load(tmp_path / "before.pt")))


LIGHTNING_FILES = sorted((FIXTURES / "lightning").glob("[!b]*/*.ckpt"))


@pytest.mark.parametrize("path", LIGHTNING_FILES, ids=lambda path: path.parent.name)
def test_a_lightning_file_comes_back_from_a_folder(path: Path, tmp_path: Path) -> None:
    ckptconv.convert(path, tmp_path / "folder", to="dcp")
    assert (tmp_path / "folder" / "meta.pt").is_file()
    ckptconv.convert(tmp_path / "folder", tmp_path / "again.ckpt")
    assert_equal_items(items(load(tmp_path / "again.ckpt")), items(load(path)))


def test_tensors_of_every_kind_without_paths(tmp_path: Path) -> None:
    """A file for each entry, no `planner_data`; strides, a view, a flag, dtypes without a storage class."""
    state = {
        "a.b": torch.randn(3, 4).t(),
        "view": torch.arange(10)[2:7],
        "flagged": torch.randn(3, dtype=torch.complex64).conj(),
        "eight": torch.randn(3).to(torch.float8_e4m3fn),
        "unsigned": torch.tensor([1, 2], dtype=torch.uint16),
        "none": torch.zeros(0, 2),
    }
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    writer = dcp.FileSystemWriter(tmp_path / "theirs", single_file_per_rank=False)
    dcp.save(state, storage_writer=writer, planner=planner)
    ckptconv.convert(tmp_path / "theirs", tmp_path / "ours", to="dcp")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        found = leaves(folder)
        assert found.keys() == state.keys()
        for key, tensor in state.items():
            assert told(found[key]) == bits(tensor), key
    again = {key: torch.zeros_like(tensor.resolve_conj()) for key, tensor in state.items()}
    dcp.load(again, checkpoint_id=tmp_path / "ours")
    assert {key: bits(tensor) for key, tensor in again.items()} == {k: bits(v) for k, v in state.items()}


def test_a_file_of_a_known_program_goes_into_a_folder_and_back(tmp_path: Path) -> None:
    """Its own counters with it: the folder is of its dialect."""
    net, optimizer = build(4)
    state = {
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "arch": "net",
        "version": 2,
    }
    torch.save(state, tmp_path / "run.pt")
    before = ckptconv.open(tmp_path / "run.pt")
    assert before.provenance.dialect == "timm"
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "folder", to="dcp")
    folder = ckptconv.open(tmp_path / "folder")
    assert folder.provenance.dialect == "timm"
    assert value_of(folder.progress.epochs) == value_of(before.progress.epochs) == 4
    assert value_of(folder.progress.step) == value_of(before.progress.step) == 4
    ckptconv.convert(tmp_path / "folder", tmp_path / "again.pt")
    assert_equal_items(items(load(tmp_path / "again.pt")), items(load(tmp_path / "run.pt")))
