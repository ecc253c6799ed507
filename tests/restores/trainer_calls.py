"""The calls of the catalog's table on what Lightning, transformers and accelerate save; how that is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.restores.files import X, Y
from tests.restores.outcome import STEPS, Call, Held, Make, Outcome, judged
from tests.restores.torch_calls import Program, fresh

_EPOCHS, _BATCHES = 2, 4
assert _EPOCHS * _BATCHES == STEPS


def data() -> Any:
    """As many batches as are an epoch."""
    import torch

    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(dataset, batch_size=len(X) // _BATCHES)


# Lightning


def lightning_model(optimizer: str, *, seed: int = 1) -> Any:
    """A LightningModule around the model of the plain programs."""
    import lightning
    import torch

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.program = fresh(optimizer, seed=seed)
            self.net = self.program.model

        def training_step(self, batch: list[Any], index: int) -> Any:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return self.program.optimizer

    return Net()


def lightning_trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    import lightning

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        **quiet,
        **options,
    )


def lightning_file(optimizer: str = "Adam", **options: Any) -> Make:
    """`trainer.save_checkpoint` after two epochs."""

    def make(here: Path) -> tuple[Path, Held]:
        model = lightning_model(optimizer, seed=0)
        trainer = lightning_trainer(here, max_epochs=_EPOCHS)
        trainer.fit(model, data())
        trainer.save_checkpoint(here / "run.ckpt", **options)
        saved = model.program.held()
        return here / "run.ckpt", Held(trainer.global_step, saved.weights, saved.state)

    return make


def lightning_fit(optimizer: str = "Adam") -> Call:
    """What model and trainer hold when the training begins again."""

    def call(path: Path) -> Held:
        import lightning

        held: list[Held] = []

        class Watch(lightning.Callback):
            def on_train_start(self, trainer: Any, module: Any) -> None:
                found = module.program.held()
                held.append(Held(trainer.global_step, found.weights, found.state))
                trainer.should_stop = True

        trainer = lightning_trainer(path.parent, Watch(), max_epochs=_EPOCHS + 1)
        trainer.fit(lightning_model(optimizer), data(), ckpt_path=str(path))
        return held[0]

    return call


def load_from_checkpoint(optimizer: str = "Adam") -> Call:
    """The model that `load_from_checkpoint` makes, and a trainer that was not told of the file."""

    def call(path: Path) -> Held:
        model = type(lightning_model(optimizer)).load_from_checkpoint(str(path))
        found = model.program.held()
        return Held(lightning_trainer(path.parent).global_step, found.weights, found.state)

    return call


def lightning_state_dict(path: Path) -> Held:
    import torch

    model = lightning_model("Adam")
    model.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    return model.program.held()


# transformers


def hf_model(seed: int = 1) -> Any:
    """The model of the plain programs as transformers wants it."""
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    class Net(PreTrainedModel):  # type: ignore[misc]  # untyped
        config_class = PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = fresh(seed=seed).model
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            """As they are."""

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            predicted = self.net(x)
            return {"loss": torch.nn.functional.mse_loss(predicted, labels), "logits": predicted}

    return Net(PretrainedConfig())


def hf_trainer(folder: Path, model: Any) -> Any:
    import torch
    from transformers import Trainer, TrainingArguments

    rows = [{"x": torch.from_numpy(x), "labels": torch.from_numpy(y)} for x, y in zip(X, Y, strict=True)]
    settings = {
        "per_device_train_batch_size": len(X) // _BATCHES, "num_train_epochs": _EPOCHS + 1,
        "save_steps": STEPS,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 100, "warmup_steps": 3,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows)


def hf_held(trainer: Any, step: int) -> Held:
    found = Program(trainer.model, trainer.optimizer.optimizer).held()
    return Held(step, found.weights, found.state)


def hf_folder(*left_out: str) -> Make:
    """`checkpoint-8` of a run, without some files, and what the run held then."""

    def make(here: Path) -> tuple[Path, Held]:
        from transformers import TrainerCallback

        held: list[Held] = []
        trainer = hf_trainer(here, hf_model(seed=0))

        class Keep(TrainerCallback):  # type: ignore[misc]  # untyped
            def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
                held.append(hf_held(trainer, state.global_step))

        trainer.add_callback(Keep())
        trainer.train()
        for name in left_out:
            (here / f"checkpoint-{STEPS}" / name).unlink()
        return here / f"checkpoint-{STEPS}", held[0]

    return make


def hf_train(*, resume: bool) -> Call:
    """What the Trainer holds before its first update."""

    def call(path: Path) -> Held:
        from transformers import TrainerCallback

        held: list[Held] = []
        model = hf_model() if resume else type(hf_model()).from_pretrained(path)
        trainer = hf_trainer(path.parent / "again", model)

        class Watch(TrainerCallback):  # type: ignore[misc]  # untyped
            def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
                held.append(hf_held(trainer, state.global_step))
                control.should_training_stop = True

        trainer.add_callback(Watch())
        trainer.train(resume_from_checkpoint=str(path) if resume else None)
        return held[0]

    return call


# accelerate


def accelerator() -> Any:
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return accelerate.Accelerator(cpu=True)


def accelerate_folder(optimizer: str) -> Make:
    """`save_state` after two epochs of a loop within `accumulate()`."""

    def make(here: Path) -> tuple[Path, Held]:
        import torch

        program, run = fresh(optimizer, seed=0), accelerator()
        model, wrapped, loader = run.prepare(program.model, program.optimizer, data())
        for _ in range(_EPOCHS):
            for x, y in loader:
                with run.accumulate(model):
                    run.backward(torch.nn.functional.mse_loss(model(x), y))
                    wrapped.step()
                    wrapped.zero_grad()
        run.save_state(str(here / "state"))
        return here / "state", program.held()

    return make


def load_state(optimizer: str) -> Call:
    def call(path: Path) -> Held:
        program, run = fresh(optimizer), accelerator()
        run.prepare(program.model, program.optimizer, data())
        run.load_state(str(path))
        return program.held()

    return call


def load_checkpoint_in_model(path: Path) -> Held:
    import accelerate

    program = fresh()
    accelerate.load_checkpoint_in_model(program.model, str(path))
    return program.held()


FILES: Mapping[str, Callable[[Path], tuple[Path, Held]]] = {
    "lightning": lightning_file(),
    "lightning-weights": lightning_file(weights_only=True),
    "hf-trainer": hf_folder(),
    "hf-trainer-without-optimizer": hf_folder("optimizer.pt"),
    "accelerate": accelerate_folder("Adam"),
    "accelerate-stateless": accelerate_folder("SGD"),
}

CALLS: Mapping[str, tuple[str, Call]] = {
    "lightning-fit": ("lightning", lightning_fit()),
    "lightning-load-from": ("lightning", load_from_checkpoint()),
    "lightning-state-dict": ("lightning", lightning_state_dict),
    "lightning-weights-load-from": ("lightning-weights", load_from_checkpoint()),
    "lightning-weights-fit": ("lightning-weights", lightning_fit()),
    "hf-resume": ("hf-trainer", hf_train(resume=True)),
    "hf-from-pretrained": ("hf-trainer", hf_train(resume=False)),
    "hf-resume-without-optimizer": ("hf-trainer-without-optimizer", hf_train(resume=True)),
    "accelerate-load-state": ("accelerate", load_state("Adam")),
    "accelerate-load-model": ("accelerate", load_checkpoint_in_model),
    "accelerate-sgd-load-state": ("accelerate-stateless", load_state("SGD")),
}


def observed(name: str, path: Path, saved: Held) -> Outcome:
    return judged(CALLS[name][1], path, saved)
