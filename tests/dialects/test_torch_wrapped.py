"""What wraps a model or stands beside it: PEFT, DDP, compiled, FSDP, and objects of the user's own."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.conversion import convert  # noqa: E402
from ckptconv.detect import read_raw  # noqa: E402
from ckptconv.dialects.torch_rows import matching  # noqa: E402
from ckptconv.dialects.torch_table import ACCELERATE, HF_TRAINER, LIGHTNING  # noqa: E402
from ckptconv.dialects.torch_values import count_of  # noqa: E402
from ckptconv.document import Checkpoint, Unknown, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.listing import rows  # noqa: E402
from ckptconv.rawtree import DictNode  # noqa: E402
from tests.support.producers import PRODUCERS, Run  # noqa: E402
from tests.support.torch_equal import assert_same  # noqa: E402

FIXTURES = Path(__file__).parents[2] / "fixtures"


def opened(value: object, path: Path) -> Checkpoint:
    torch.save(value, path)
    return ckptconv.open(path)


def trained() -> Run:
    run = Run()
    for _ in range(3):
        run.update()
    return run


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "base_model.model.",
        "module._orig_mod.",
        "module.base_model.model.",
        "_orig_mod.module.",
        "base_model.model._orig_mod.",
    ],
)
def test_what_stands_before_every_name_is_taken_off_and_comes_back(prefix: str, tmp_path: Path) -> None:
    run = trained()
    saved = {"model": run.model.state_dict(prefix=prefix), "optimizer": run.optimizer.state_dict()}
    checkpoint = opened(saved, tmp_path / "run.pt")
    assert list(checkpoint.params) == list(run.model.state_dict())
    assert checkpoint.optimizers[0].param_order == "declaration-order"
    convert(tmp_path / "run.pt", tmp_path / "again.pt")
    assert_same(saved, torch.load(tmp_path / "again.pt", weights_only=True))


def test_adapters_keep_their_own_names(tmp_path: Path) -> None:
    names = ("q.base_layer.weight", "q.lora_A.default.weight", "q.lora_B.default.weight", "norm.weight")
    state = {f"base_model.model.{name}": torch.ones(2, 2) for name in names}
    found = opened({"state_dict": state, "epoch": 0}, tmp_path / "a.pt").params
    assert tuple(found) == ("q.weight", "q.lora_A.weight", "q.lora_B.weight", "norm.weight")
    assert [param.trainable for param in found.values()] == [False, True, True, False]


def by_name(run: Run) -> dict[str, Any]:
    """`FSDP.full_optim_state_dict`, `get_optimizer_state_dict`: names where others have numbers."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = get_optimizer_state_dict(run.model, run.optimizer)
    return state


def test_an_optimizer_keyed_by_name_is_matched_by_name_in_any_order(tmp_path: Path) -> None:
    run = trained()
    optimizer = by_name(run)
    optimizer["state"] = dict(reversed(optimizer["state"].items()))
    optimizer["param_groups"][0]["params"].reverse()
    saved = {"model": run.model.state_dict(prefix="_fsdp_wrapped_module."), "optimizer": optimizer}
    optimizer["state"] = {f"_fsdp_wrapped_module.{n}": s for n, s in optimizer["state"].items()}
    optimizer["param_groups"][0]["params"] = list(optimizer["state"])
    (lifted,) = opened(saved, tmp_path / "run.pt").optimizers
    assert lifted.param_order == "named"
    for name, parameter in run.model.named_parameters():
        moment = run.optimizer.state[parameter]["exp_avg"]
        assert lifted.slots["first_moment"][name].read().tobytes() == moment.numpy().tobytes()


@pytest.mark.parametrize(
    "shares",
    [
        {"_fsdp_wrapped_module._flat_param": torch.arange(7.0)},
        {"_fsdp_wrapped_module.fc.weight": torch.arange(7.0), "_fsdp_wrapped_module.fc.bias": torch.zeros(0)},
    ],
    ids=["flat", "original"],
)
def test_what_fsdp_keeps_on_one_rank_is_refused(shares: dict[str, Any], tmp_path: Path) -> None:
    for saved, inside in (({"model": shares, "epoch": 1}, ("model",)), (shares, ())):
        with pytest.raises(CkptError) as caught:
            opened(saved, tmp_path / "rank0.pt")
        assert [(p.code, p.loc) for p in caught.value.problems] == [
            ("unsupported-feature", (*inside, next(iter(shares))))
        ]


def test_parameters_with_different_steps_keep_them(tmp_path: Path) -> None:
    path = PRODUCERS["timm"][1](Run(), tmp_path)
    saved = torch.load(path, weights_only=False)
    saved["optimizer"]["state"][2]["step"] = torch.tensor(4.0)
    torch.save(saved, path)
    checkpoint = ckptconv.open(path)
    assert value_of(checkpoint.progress.step) == 6
    assert sorted(set(checkpoint.optimizers[0].param_steps.values())) == [4, 6]
    convert(path, tmp_path / "run.neutral", to="neutral", allow=["opaque-globals"])
    back = tmp_path / "back.pth.tar"
    convert(tmp_path / "run.neutral", back, to="pytorch:timm", allow=["opaque-globals"])
    assert_same(saved, torch.load(back, weights_only=False))


@pytest.mark.parametrize(("case", "raw"), [("timm", 6), ("imagenet", 7), ("torchvision", 6)])
def test_a_template_of_a_dialect_holds_another_run_as_it_counts(case: str, raw: int, tmp_path: Path) -> None:
    run = Run(seed=4)
    run.update()
    source = tmp_path / "plain.pt"
    torch.save({"net": run.model.state_dict(), "optim": run.optimizer.state_dict(), "epoch": 6}, source)
    template = PRODUCERS[case][1](Run(), tmp_path)
    fresh = torch.load(template, weights_only=False)
    for key in ("scheduler", "lr_scheduler", "scaler", "amp_scaler", "model_ema", "state_dict_ema"):
        fresh.pop(key, None)
    torch.save(fresh, template)
    options: dict[str, Any] = {"template": template, "allow": ["opaque-globals"]}
    with pytest.raises(CkptError) as caught:
        convert(source, tmp_path / "no.pt", **options)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("progress-unknown", ("epoch",))]
    convert(source, tmp_path / "run.pt", **options, set_={"epochs": "7"})
    written = torch.load(tmp_path / "run.pt", weights_only=False)
    assert written["epoch"] == raw
    state = written["state_dict"] if "state_dict" in written else written["model"]
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    assert_same(dict(run.model.state_dict()), bare)


@dataclasses.dataclass
class Arguments:
    """The user's training arguments."""

    rate: float = 0.1
    layers: tuple[int, ...] = (1, 2)


def omegaconf() -> ModuleType:
    """A package that is there when the run is saved and not when it is converted."""
    module = ModuleType("omegaconf_of_the_run")

    class DictConfig:
        def __init__(self, content: dict[str, object]) -> None:
            self._content = content

    DictConfig.__module__, DictConfig.__qualname__ = module.__name__, "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    return module


def test_objects_of_the_users_own_are_shown_survive_and_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = omegaconf()
    monkeypatch.setitem(sys.modules, package.__name__, package)
    path = PRODUCERS["fairseq"][1](Run(), tmp_path)
    saved = torch.load(path, weights_only=False)
    saved["cfg"] = package.DictConfig({"model": {"width": 5}, "arguments": Arguments()})
    saved["extra_state"]["callback"] = [Arguments.__init__, slice(1, 2), frozenset({3})]
    torch.save(saved, path)
    monkeypatch.delitem(sys.modules, package.__name__)
    checkpoint = ckptconv.open(path)
    assert checkpoint.provenance.dialect == "fairseq"
    assert any(f"{package.__name__}.DictConfig" in odd for odd in checkpoint.oddities)
    names = {str(row["value"]) for row in rows(read_raw(path)) if str(row["key"]).endswith("@name")}
    assert {f"{package.__name__}.DictConfig", f"{__name__}.Arguments"} <= names
    allow = ["opaque-globals"]
    convert(path, tmp_path / "run.neutral", to="neutral", allow=allow)
    convert(tmp_path / "run.neutral", tmp_path / "back.pt", to="pytorch:fairseq", allow=allow)
    assert package.__name__ not in sys.modules
    monkeypatch.setitem(sys.modules, package.__name__, package)
    again = torch.load(tmp_path / "back.pt", weights_only=False)
    assert again["cfg"]._content == saved["cfg"]._content
    assert again["extra_state"] == saved["extra_state"]
    for part in ("model", "last_optimizer_state", "optimizer_history"):
        assert_same(saved[part], again[part])


@pytest.mark.parametrize("case", ["mid-epoch", "epoch-end", "after-fit", "sgd", "accumulating"])
def test_the_row_of_lightning_says_what_its_reader_does(case: str) -> None:
    path = FIXTURES / "lightning" / case / "run.ckpt"
    progress = ckptconv.open(path).progress
    fields = {"updates": "step", "iterations": "micro_steps"}
    root = read_raw(path).root
    for counter in LIGHTNING.counters:
        ((_, number),) = matching(root, counter.key)
        if counter.counts == "batch_in_epoch" and value_of(progress.batch_in_epoch) == 0:
            continue  # between two epochs Lightning keeps the last one's count
        assert value_of(getattr(progress, fields.get(counter.counts, counter.counts))) == number


@pytest.mark.parametrize("case", ["two-groups", "sharded"])
def test_the_row_of_the_trainer_says_what_its_reader_does(case: str) -> None:
    path = FIXTURES / "hf-trainer" / case / "checkpoint"
    progress, root = ckptconv.open(path).progress, read_raw(path).root
    assert isinstance(root, DictNode)
    assert HF_TRAINER.signature.holds(root, path.name)
    for counter in HF_TRAINER.counters:
        ((_, number),) = matching(root, counter.key)
        fact = getattr(progress, "step" if counter.counts == "updates" else counter.counts)
        if counter.unset is not None and number == counter.unset[0]:
            assert isinstance(fact, Unknown)
        else:
            assert value_of(fact) == number


def test_the_row_of_accelerate_says_what_its_reader_does() -> None:
    path = FIXTURES / "accelerate" / "two-models" / "state"
    checkpoint, root = ckptconv.open(path), read_raw(path).root
    assert isinstance(root, DictNode)
    assert ACCELERATE.signature.holds(root, path.name)
    steps = [count_of(node) for _, node in matching(root, ACCELERATE.counters[0].key)]
    assert {value[0] for value in steps if value} == {value_of(checkpoint.optimizers[0].step)}
