"""`--select`: averages beside the model, one of several models or optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.document import Checkpoint, Unknown, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.selection import selected  # noqa: E402
from tests.support.command import convert_here  # noqa: E402
from tests.support.producers import PRODUCERS, Run  # noqa: E402

GAN = Path(__file__).parent.parent / "fixtures" / "lightning" / "gan" / "run.ckpt"


def opened(value: object, path: Path) -> Checkpoint:
    torch.save(value, path)
    return ckptconv.open(path)


def trained() -> Run:
    run = Run()
    for _ in range(3):
        run.update()
    return run


def weights(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: param.read().tobytes() for name, param in checkpoint.params.items()}


def of_module(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def with_buffers_of(ema: torch.nn.Module, model: torch.nn.Module) -> dict[str, bytes]:
    trained_names = {name for name, _ in ema.named_parameters()}
    own, averaged = of_module(model), of_module(ema)
    return {name: averaged[name] if name in trained_names else own[name] for name in own}


@pytest.mark.parametrize("case", ["timm", "timm-1", "torchvision", "yolov5"])
@pytest.mark.parametrize("name", ["ema", "key"])
def test_an_average_beside_the_model_is_taken_by_its_word_or_its_key(
    case: str, name: str, tmp_path: Path
) -> None:
    run = Run()
    path = PRODUCERS[case][1](run, tmp_path)
    key = {"torchvision": "model_ema", "yolov5": "ema"}.get(case, "state_dict_ema")
    whole = ckptconv.open(path)
    assert weights(whole) == of_module(run.model)
    assert any(f"'{key}': --select ema" in odd for odd in whole.oddities)
    assert weights(ckptconv.open(path, select=["model"])) == of_module(run.model)
    part = ckptconv.open(path, select=["ema" if name == "ema" else key])
    assert weights(part) == of_module(run.ema) != of_module(run.model)
    assert (part.kind, part.residue, dict(part.extras)) == ("weights", None, {})
    assert value_of(part.progress.step) == run.updates


def averaged_model(run: Run) -> dict[str, Any]:
    """torch.optim.swa_utils.AveragedModel."""
    swa = torch.optim.swa_utils.AveragedModel(run.ema)
    return {"model": run.model.state_dict(), "swa_model": swa.state_dict()}


def compiled_in_ddp(run: Run) -> dict[str, Any]:
    state = {f"module._orig_mod.{k}": v for k, v in run.model.state_dict().items()}
    return {"net": state, "net_ema": {f"module._orig_mod.{k}": v for k, v in run.ema.state_dict().items()}}


def within_lightning(run: Run) -> dict[str, Any]:
    """latent-diffusion's LitEma: parameters only, names without dots, and numbers of its own."""
    state = run.model.state_dict(prefix="model.")
    for name, parameter in run.ema.named_parameters():
        state["model_ema." + name.replace(".", "")] = parameter.detach()
    state["model_ema.decay"] = torch.tensor(0.99)
    return {"state_dict": state, "pytorch-lightning_version": "1.4.2", "global_step": 3, "epoch": 0}


def shadow_params(run: Run) -> dict[str, Any]:
    """torch_ema and diffusers' EMAModel: a list in the order of model.parameters()."""
    shadow = [parameter.detach() for parameter in run.ema.parameters()]
    return {"model": run.model.state_dict(), "ema": {"decay": 0.99, "shadow_params": shadow}}


def nested(run: Run) -> dict[str, Any]:
    ema = {"module": run.ema.state_dict(), "decay": 0.99}
    return {"model": run.model.state_dict(), "ema": ema, "optimizer": run.optimizer.state_dict()}


@pytest.mark.parametrize("save", [averaged_model, compiled_in_ddp, within_lightning, shadow_params, nested])
def test_averages_as_people_save_them(save: Any, tmp_path: Path) -> None:
    run = trained()
    opened(save(run), tmp_path / "run.pt")
    part = ckptconv.open(tmp_path / "run.pt", select=["ema"])
    prefix = "model." if save is within_lightning else ""
    wanted = of_module(run.ema) if save not in (within_lightning, shadow_params) else None
    wanted = wanted or with_buffers_of(run.ema, run.model)
    assert weights(part) == {prefix + name: data for name, data in wanted.items()}


def test_an_average_of_another_model_is_none(tmp_path: Path) -> None:
    run = trained()
    ema = dict(run.ema.state_dict())
    ema["square.weight"] = torch.zeros(4, 4)
    saved = {"model": run.model.state_dict(), "ema": ema}
    with pytest.raises(CkptError) as caught:
        selected(opened(saved, tmp_path / "run.pt"), ["ema"])
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("--select", "ema"))]


def gan() -> tuple[dict[str, Any], Run, Run]:
    one, other = Run(seed=1), Run(seed=2)
    for _ in range(4):
        one.update()
    other.update()
    saved = {
        "netG": one.model.state_dict(),
        "netD": other.model.state_dict(),
        "optimizerG": one.optimizer.state_dict(),
        "optimizerD": other.optimizer.state_dict(),
        "schedulerG": one.scheduler.state_dict(),
        "epoch": 1,
    }
    return saved, one, other


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_several_models_with_its_optimizer_and_its_step(which: int, tmp_path: Path) -> None:
    saved, *runs = gan()
    whole = opened(saved, tmp_path / "gan.pt")
    assert isinstance(whole.progress.step, Unknown)
    assert [value_of(o.step) for o in whole.optimizers] == [4, 1]
    part = selected(whole, [f"model:net{'GD'[which]}"])
    run = runs[which]
    assert weights(part) == of_module(run.model)
    (optimizer,) = part.optimizers
    assert optimizer.params == tuple(name for name, _ in run.model.named_parameters())
    assert value_of(part.progress.step) == value_of(optimizer.step) == run.updates
    moment = run.optimizer.state[run.model.last.weight]["exp_avg"]
    assert optimizer.slots["first_moment"]["last.weight"].read().tobytes() == moment.numpy().tobytes()


@pytest.mark.parametrize("name", ["optimizer:1", "optimizer:optimizerD"])
def test_one_of_several_optimizers(name: str, tmp_path: Path) -> None:
    saved, _, other = gan()
    part = selected(opened(saved, tmp_path / "gan.pt"), [name])
    assert [o.name for o in part.optimizers] == ["optimizerD"]
    assert value_of(part.progress.step) == other.updates
    assert part.schedules == ()


def test_the_two_of_a_lightning_gan_go_their_ways(tmp_path: Path) -> None:
    whole = ckptconv.open(GAN)
    for position, head in enumerate(dict.fromkeys(name.partition(".")[0] for name in whole.params)):
        part = ckptconv.open(GAN, select=[f"model:{head}"])
        assert weights(part) == {
            n.removeprefix(f"{head}."): p.read().tobytes()
            for n, p in whole.params.items()
            if n.startswith(f"{head}.")
        }
        assert [o.name for o in part.optimizers] == [whole.optimizers[position].name]


def test_ties_within_a_part_stay_ties(tmp_path: Path) -> None:
    shared = torch.ones(2, 3)
    state = {"other.w": shared, "net.a": shared, "net.b": shared}
    part = selected(opened({"model": state, "epoch": 0}, tmp_path / "a.pt"), ["model:net"])
    assert {name: param.tied_to for name, param in part.params.items()} == {"a": None, "b": "a"}


def test_a_part_of_an_optimizer_of_unknown_order_is_refused(tmp_path: Path) -> None:
    saved, *_ = gan()
    state = saved["optimizerG"]["state"]
    saved["optimizerG"]["state"] = {i: state[len(state) - 1 - i] for i in state}
    with pytest.raises(CkptError) as caught:
        selected(opened(saved, tmp_path / "gan.pt"), ["model:netG"])
    assert [p.code for p in caught.value.problems] == ["order-ambiguous"]


@pytest.mark.parametrize("name", ["best", "optimizer:2", "optimizer:x", "model:none", "ema"])
def test_what_is_not_there_is_said_with_what_is(name: str, tmp_path: Path) -> None:
    saved, *_ = gan()
    with pytest.raises(CkptError) as caught:
        selected(opened(saved, tmp_path / "gan.pt"), [name])
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("usage", ("--select", name))
    assert {"model:netG", "model:netD", "optimizer:1"} <= set(
        problem.hint.removesuffix(".").replace(",", "").split()
    )


def test_the_command_writes_the_average_and_a_part_onto_a_template(tmp_path: Path) -> None:
    run = Run()
    path = PRODUCERS["timm"][1](run, tmp_path)
    written = convert_here(path, tmp_path / "ema.pt", "--to", "pytorch:state-dict", "--select", "ema")
    loaded = torch.load(written, weights_only=True)
    assert {name: tensor.numpy().tobytes() for name, tensor in loaded.items()} == of_module(run.ema)
    saved, one, _ = gan()
    del saved["schedulerG"]
    torch.save(saved, tmp_path / "gan.pt")
    fresh = Run(seed=3)
    torch.save(
        {"model": fresh.model.state_dict(), "optimizer": fresh.optimizer.state_dict()}, tmp_path / "fresh.pt"
    )
    back = convert_here(
        tmp_path / "gan.pt", tmp_path / "g.pt", "--template", tmp_path / "fresh.pt", "--select", "model:netG"
    )
    part = torch.load(back, weights_only=True)
    fresh.model.load_state_dict(part["model"])
    fresh.optimizer.load_state_dict(part["optimizer"])
    assert of_module(fresh.model) == of_module(one.model)
    assert {float(state["step"]) for state in fresh.optimizer.state.values()} == {4.0}
