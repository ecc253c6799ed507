"""The calls of the catalog's table on files and folders of plain PyTorch programs, and how these are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.restores.files import X, Y
from tests.restores.outcome import STEPS, Call, Held, Make, Outcome, judged


@dataclass(slots=True)
class Program:
    """A model of two dense layers and its optimizer."""

    model: Any
    optimizer: Any

    def train(self, steps: int = STEPS) -> Program:
        import torch

        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model(torch.from_numpy(X)) - torch.from_numpy(Y)).square().mean().backward()
            self.optimizer.step()
        return self

    def held(self) -> Held:
        """The step is None where the optimizer counts none, though it has state or hyperparameters only."""
        parameters = list(self.model.parameters())
        states = [self.optimizer.state.get(parameter, {}) for parameter in parameters]
        steps = {float(state["step"]) for state in states if "step" in state}
        assert len(steps) < 2
        counts = type(self.optimizer).__name__ != "SGD"
        slots = ("exp_avg", "exp_avg_sq", "momentum_buffer")
        return Held(
            (int(steps.pop()) if steps else 0) if counts else None,
            [parameter.detach().numpy().copy() for parameter in parameters],
            [state[slot].numpy().copy() for slot in slots for state in states if slot in state],
        )


def fresh(optimizer: str = "Adam", *, seed: int = 1, backwards: bool = False) -> Program:
    """Another model of the same shapes, with a fresh optimizer."""
    import torch

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 4))
    parameters = list(model.parameters())
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    order = parameters[::-1] if backwards else parameters
    return Program(model, getattr(torch.optim, optimizer)(order, lr=0.01, **options))


def saved(name: str, save: Callable[[Program, Path], object], optimizer: str = "Adam") -> Make:
    """A file or folder of a run after eight updates."""

    def make(here: Path) -> tuple[Path, Held]:
        program = fresh(optimizer, seed=0).train()
        save(program, here / name)
        return here / name, program.held()

    return make


def dictionary(program: Program, path: Path) -> None:
    import torch

    torch.save({"model": program.model.state_dict(), "optimizer": program.optimizer.state_dict()}, path)


def state_dict(program: Program, path: Path) -> None:
    import torch

    torch.save(program.model.state_dict(), path)


def module(program: Program, path: Path) -> None:
    import torch

    torch.save(program.model, path)


def safetensors_file(program: Program, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(program.model.state_dict(), path)


def neutral(program: Program, path: Path) -> None:
    import ckptconv

    dictionary(program, path.with_name("run.pt"))
    ckptconv.convert(path.with_name("run.pt"), path, to="neutral")


def by_name(program: Program) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return dict(zip(("model", "optimizer"), get_state_dict(program.model, program.optimizer), strict=True))


def by_number(program: Program) -> dict[str, Any]:
    return {"model": program.model.state_dict(), "optimizer": program.optimizer.state_dict()}


def folder(state: Callable[[Program], dict[str, Any]]) -> Callable[[Program, Path], None]:
    """A folder of torch.distributed.checkpoint."""

    def save(program: Program, path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(state(program), checkpoint_id=path)

    return save


def one_file_of(folder: Path, path: Path) -> None:
    """torch's tool makes one file of a folder."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, path)


def numbers_made_texts(program: Program, path: Path) -> None:
    folder(by_number)(program, path.with_name("folder"))
    one_file_of(path.with_name("folder"), path)


FILES: Mapping[str, Make] = {
    "torch-adam": saved("run.pt", dictionary),
    "torch-stateless": saved("run.pt", dictionary, "SGD"),
    "torch-texts": saved("one.pt", numbers_made_texts),
    "torch-weights": saved("weights.pt", state_dict),
    "torch-module": saved("model.pt", module),
    "safetensors": saved("model.safetensors", safetensors_file),
    "neutral": saved("run.neutral", neutral),
    "dcp-named": saved("run", folder(by_name)),
    "dcp-numbered": saved("run", folder(by_number)),
    "dcp-stateless": saved("run", folder(by_name), "SGD"),
    "dcp-weights": saved("run", folder(lambda program: dict(program.model.state_dict()))),
}


def load_state_dict(optimizer: str = "Adam", *, state: bool = True, backwards: bool = False) -> Call:
    """`load_state_dict` of the model, and of the optimizer too."""

    def call(path: Path) -> Held:
        import torch

        run, program = torch.load(path), fresh(optimizer, backwards=backwards)
        program.model.load_state_dict(run["model"])
        if state:
            program.optimizer.load_state_dict(run["optimizer"])
        return program.held()

    return call


def load_weights(read: Callable[[Path], Any]) -> Call:
    """`model.load_state_dict` of what `read` gives."""

    def call(path: Path) -> Held:
        program = fresh()
        program.model.load_state_dict(read(path))
        return program.held()

    return call


def torch_file(path: Path) -> Any:
    import torch

    return torch.load(path)


def tensors_of(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def load_module(weights_only: bool | None = None) -> Call:
    """`torch.load` of the whole module, with a fresh optimizer."""

    def call(path: Path) -> Held:
        import torch

        model = torch.load(path, weights_only=weights_only)
        return Program(model, torch.optim.Adam(model.parameters())).held()

    return call


def set_state_dict(optimizer: str = "Adam") -> Call:
    """`dcp.load` into the state by name, and `set_state_dict`."""

    def call(path: Path) -> Held:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        program = fresh(optimizer)
        state = by_name(program)
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            program.model,
            program.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return program.held()

    return call


def load_folder(*, steps: int = 0, state: bool = True) -> Call:
    """`dcp.load` into the state_dicts themselves, after some updates."""

    def call(path: Path) -> Held:
        import torch.distributed.checkpoint as dcp

        program = fresh().train(steps)
        wanted = by_number(program)
        if not state:
            del wanted["optimizer"]
        dcp.load(wanted, checkpoint_id=path)
        program.model.load_state_dict(wanted["model"])
        if state:
            program.optimizer.load_state_dict(wanted["optimizer"])
        return program.held()

    return call


def one_file(path: Path) -> Held:
    one_file_of(path, path.with_name("one.pt"))
    return load_state_dict()(path.with_name("one.pt"))


def texts_to_numbers(path: Path) -> Held:
    import torch

    run, program = torch.load(path), fresh()
    program.model.load_state_dict(run["model"])
    run["optimizer"]["state"] = {int(key): state for key, state in run["optimizer"]["state"].items()}
    program.optimizer.load_state_dict(run["optimizer"])
    return program.held()


def partly(path: Path) -> Held:
    """`dcp.load` of names that the folder does not have."""
    import torch.distributed.checkpoint as dcp

    program = fresh()
    wanted = {"net": program.model.state_dict(), "optim": program.optimizer.state_dict()}
    dcp.load(wanted, checkpoint_id=path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    program.model.load_state_dict(wanted["net"])
    program.optimizer.load_state_dict(wanted["optim"])
    return program.held()


def one_more(path: Path) -> Held:
    import torch.distributed.checkpoint as dcp

    program = fresh()
    wanted = {"model": program.model.state_dict(), "scheduler": {"last_epoch": 0}}
    dcp.load(wanted, checkpoint_id=path)
    return program.held()


def load_folder_of_weights(path: Path) -> Held:
    import torch.distributed.checkpoint as dcp

    program = fresh()
    state = program.model.state_dict()
    dcp.load(state, checkpoint_id=path)
    program.model.load_state_dict(state)
    return program.held()


CALLS: Mapping[str, tuple[str, Call]] = {
    "torch-load": ("torch-adam", load_state_dict()),
    "torch-model-only": ("torch-adam", load_state_dict(state=False)),
    "torch-other-order": ("torch-adam", load_state_dict(backwards=True)),
    "torch-sgd-load": ("torch-stateless", load_state_dict("SGD")),
    "torch-sgd-other-order": ("torch-stateless", load_state_dict("SGD", backwards=True)),
    "torch-texts-to-numbers": ("torch-texts", texts_to_numbers),
    "torch-texts-load": ("torch-texts", load_state_dict()),
    "torch-weights-load": ("torch-weights", load_weights(torch_file)),
    "torch-module-load": ("torch-module", load_module(weights_only=False)),
    "torch-module-safe-load": ("torch-module", load_module()),
    "safetensors-load": ("safetensors", load_weights(tensors_of)),
    "neutral-weights": ("neutral", load_weights(lambda path: tensors_of(path / "weights.safetensors"))),
    "dcp-named-set-state": ("dcp-named", set_state_dict()),
    "dcp-named-plain": ("dcp-named", load_folder()),
    "dcp-named-model-only": ("dcp-named", load_folder(state=False)),
    "dcp-named-one-more": ("dcp-named", one_more),
    "dcp-named-stepped": ("dcp-named", load_folder(steps=1)),
    "dcp-named-partial": ("dcp-named", partly),
    "dcp-numbered-set-state": ("dcp-numbered", set_state_dict()),
    "dcp-numbered-fresh": ("dcp-numbered", load_folder()),
    "dcp-numbered-stepped": ("dcp-numbered", load_folder(steps=1)),
    "dcp-numbered-one-file": ("dcp-numbered", one_file),
    "dcp-sgd-set-state": ("dcp-stateless", set_state_dict("SGD")),
    "dcp-weights-load": ("dcp-weights", load_folder_of_weights),
}


def observed(name: str, path: Path, saved: Held) -> Outcome:
    return judged(CALLS[name][1], path, saved)
