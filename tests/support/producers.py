"""Training programs in miniature: each trains, saves and resumes as the source named in its docstring does.

They share nothing with the readers in `ckptconv.dialects`. A `Run` counts for itself what really happened.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BATCHES = 3
"""In an epoch."""


class Net(torch.nn.Module):
    """Every parameter has a shape of its own, but two square ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.square = torch.nn.Linear(5, 5)
        self.last = torch.nn.Linear(5, 2)
        self.register_buffer("seen", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.square(torch.relu(self.norm(self.first(x)))))


class Run:
    """A training run and what really happened in it."""

    def __init__(self, optimizer: str = "AdamW", *, seed: int = 0, per_epoch: bool = True) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        options = {"momentum": 0.9} if optimizer == "SGD" else {}
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), lr=0.1, **options)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.per_epoch = per_epoch
        self.ema = copy.deepcopy(self.model)
        self.updates = self.epochs = self.batch = self.samples = 0

    def update(self, *, skipped: bool = False) -> None:
        """One batch; `skipped`: the loss scaler found infinite gradients."""
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 3)).pow(2).mean().backward()
        if not skipped:
            self.optimizer.step()
            self.updates += 1
        with torch.no_grad():
            for mean, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                mean.mul_(0.9).add_(value, alpha=0.1)
        if not self.per_epoch:
            self.scheduler.step()
        self.batch += 1
        self.samples += 4

    def finish_epoch(self) -> None:
        if self.per_epoch:
            self.scheduler.step()
        self.epochs, self.batch = self.epochs + 1, 0


@dataclasses.dataclass
class Config:
    """A dataclass among the arguments."""

    width: int = 5


def scaler() -> dict[str, Any]:
    return {
        "scale": 1024.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 9,
        "_growth_tracker": 4,
    }


def arguments() -> argparse.Namespace:
    return argparse.Namespace(lr=0.1, model="net", config=Config(), epochs=90)


def torchvision(run: Run, path: Path) -> Path:
    """references/classification/train.py."""
    for epoch in range(2):
        for _ in range(BATCHES):
            run.update()
        run.finish_epoch()
        torch.save(
            {
                "model": run.model.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "lr_scheduler": run.scheduler.state_dict(),
                "epoch": epoch,
                "args": arguments(),
                "model_ema": {"n_averaged": torch.tensor(6), **run.ema.state_dict(prefix="module.")},
                "scaler": scaler(),
            },
            path / "checkpoint.pth",
        )
    return path / "checkpoint.pth"


def torchvision_resume(saved: dict[str, Any]) -> dict[str, int]:
    return {"epochs": saved["epoch"] + 1}


def imagenet(run: Run, path: Path) -> Path:
    """pytorch/examples imagenet/main.py."""
    for epoch in range(2):
        for _ in range(BATCHES):
            run.update()
        run.finish_epoch()
        torch.save(
            {
                "epoch": epoch + 1,
                "arch": "net",
                "state_dict": run.model.state_dict(prefix="module."),
                "best_acc1": torch.tensor(12.5),
                "optimizer": run.optimizer.state_dict(),
                "scheduler": run.scheduler.state_dict(),
            },
            path / "checkpoint.pth.tar",
        )
    return path / "checkpoint.pth.tar"


def imagenet_resume(saved: dict[str, Any]) -> dict[str, int]:
    return {"epochs": saved["epoch"]}


def timm_before_version_2(run: Run, path: Path) -> Path:
    """timm 0.1 utils.py CheckpointSaver._save."""
    for epoch in range(2):
        for _ in range(BATCHES):
            run.update()
        run.finish_epoch()
        torch.save(
            {
                "epoch": epoch + 1,
                "arch": "net",
                "state_dict": run.model.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "args": arguments(),
                "metric": 71.5,
                "state_dict_ema": run.ema.state_dict(),
            },
            path / "checkpoint-1.pth.tar",
        )
    return path / "checkpoint-1.pth.tar"


def timm(run: Run, path: Path) -> Path:
    """timm/utils/checkpoint_saver.py CheckpointSaver._save."""
    for epoch in range(2):
        for _ in range(BATCHES):
            run.update()
        run.finish_epoch()
        state = {"epoch": epoch, "arch": "net", "optimizer": run.optimizer.state_dict(), "version": 2}
        state |= {"args": arguments(), "amp_scaler": scaler(), "state_dict": run.model.state_dict()}
        torch.save({**state, "state_dict_ema": run.ema.state_dict(), "metric": 71.5}, path / "last.pth.tar")
    return path / "last.pth.tar"


def timm_recovery(run: Run, path: Path) -> Path:
    """timm/utils/checkpoint_saver.py save_recovery, in the midst of epoch 1."""
    for _ in range(BATCHES):
        run.update()
    run.finish_epoch()
    run.update()
    state = {"epoch": 1, "arch": "net", "optimizer": run.optimizer.state_dict(), "version": 2}
    torch.save({**state, "state_dict": run.model.state_dict()}, path / "recovery-1-0.pth.tar")
    return path / "recovery-1-0.pth.tar"


def timm_resume(saved: dict[str, Any]) -> dict[str, int]:
    """timm/models/_helpers.py resume_checkpoint."""
    resume = saved["epoch"]
    if "version" in saved and saved["version"] > 1:
        resume += 1
    return {"epochs": resume}


def _mmengine(run: Run, epoch: int, iteration: int, by_epoch: bool) -> dict[str, Any]:
    """Runner.save_checkpoint: `epoch` and `iteration` as the loop holds them when the hook runs."""
    meta: dict[str, Any] = {}
    meta.setdefault("epoch", epoch + 1 if by_epoch else epoch)
    meta.setdefault("iter", iteration if by_epoch else iteration + 1)
    meta.update(cfg="model = dict()", seed=0, experiment_name="x", time="20240101", mmengine_version="0.10.4")
    warmup = {
        "param_name": "lr", "begin": 0, "end": 1000, "by_epoch": False, "base_values": [0.1],
        "last_step": run.updates, "_global_step": run.updates + 1, "verbose": False, "start_factor": 0.1,
        "end_factor": 1.0, "total_iters": 999, "_last_value": [run.optimizer.param_groups[0]["lr"]],
    }  # fmt: skip
    main = {
        "param_name": "lr", "begin": 0, "end": 300, "by_epoch": True, "base_values": [0.1],
        "last_step": run.epochs, "_global_step": run.epochs + 1, "verbose": False, "milestones": {8: 1},
        "gamma": 0.1, "_last_value": [run.optimizer.param_groups[0]["lr"]],
    }  # fmt: skip
    return {
        "meta": meta,
        "state_dict": OrderedDict(run.model.state_dict()),
        "message_hub": {
            "log_scalars": OrderedDict(),
            "runtime_info": OrderedDict(
                epoch=epoch, iter=iteration - 1 if by_epoch else iteration, max_epochs=9
            ),
            "resumed_keys": OrderedDict(),
        },
        "optimizer": {**run.optimizer.state_dict(), "loss_scaler": scaler()},
        "param_schedulers": [warmup, main],
    }


def mmengine_by_epoch(run: Run, path: Path) -> Path:
    """EpochBasedTrainLoop, CheckpointHook.after_train_epoch: `_epoch` is counted after the hook."""
    iteration = 0
    for epoch in range(2):
        for _ in range(BATCHES):
            run.update()
            iteration += 1
        saved = _mmengine(run, epoch, iteration, by_epoch=True)
        run.finish_epoch()
        # the hook of the schedulers runs before that of the checkpoint
        saved["param_schedulers"][1].update(last_step=run.epochs, _global_step=run.epochs + 1)
    torch.save(saved, path / "epoch_2.pth")
    return path / "epoch_2.pth"


def mmengine_by_iteration(run: Run, path: Path) -> Path:
    """CheckpointHook.after_train_iter: `_iter` is counted after the hook."""
    for iteration in range(4):
        run.update()
        if iteration == BATCHES - 1:
            run.finish_epoch()
    run.batch = 0  # MMEngine stores none
    torch.save(_mmengine(run, run.epochs, 3, by_epoch=False), path / "iter_4.pth")
    return path / "iter_4.pth"


def mmengine_resume(saved: dict[str, Any]) -> dict[str, int]:
    """Runner.resume."""
    return {"epochs": saved["meta"]["epoch"], "step": saved["meta"]["iter"]}


def mmcv(run: Run, path: Path) -> Path:
    """mmcv/runner/epoch_based_runner.py."""
    inner = 0
    for _ in range(2):
        for _ in range(BATCHES):
            run.update()
            inner += 1
        meta = {"mmcv_version": "1.7.1", "time": "x", "epoch": run.epochs + 1, "iter": inner}
        run.finish_epoch()
        saved = {"meta": meta, "state_dict": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(saved, path / "epoch_2.pth")
    return path / "epoch_2.pth"


def mmcv_by_iteration(run: Run, path: Path) -> Path:
    """mmcv/runner/iter_based_runner.py: the hook runs before `_iter` is counted."""
    for iteration in range(4):
        run.update()
        if iteration == BATCHES - 1:
            run.finish_epoch()
    run.batch = 0
    meta = {"mmcv_version": "1.7.1", "epoch": run.epochs + 1, "iter": 3}
    saved = {"meta": meta, "state_dict": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(saved, path / "iter_4.pth")
    return path / "iter_4.pth"


def detectron2(run: Run, path: Path) -> Path:
    """DefaultTrainer with PeriodicCheckpointer.step in after_step; LRScheduler's hook stands before it."""
    for iteration in range(5):
        run.update()
        trainer = {
            "iteration": iteration,
            "hooks": {"LRScheduler": run.scheduler.state_dict()},
            "_trainer": {"iteration": iteration, "optimizer": run.optimizer.state_dict()},
        }
        saved = {"model": run.model.state_dict(), "trainer": trainer, "iteration": iteration}
    torch.save(saved, path / "model_0000004.pth")
    return path / "model_0000004.pth"


def detectron2_resume(saved: dict[str, Any]) -> dict[str, int]:
    """DefaultTrainer.resume_or_load: `start_iter = self.iter + 1`, from the trainer's state."""
    assert saved["trainer"]["_trainer"]["iteration"] == saved["trainer"]["iteration"]
    return {"step": saved["trainer"]["iteration"] + 1}


def fvcore(run: Run, path: Path) -> Path:
    """fvcore/common/checkpoint.py with Detectron2 0.2's checkpointables."""
    for iteration in range(5):
        run.update()
        last = iteration
    saved = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(
        {**saved, "scheduler": run.scheduler.state_dict(), "iteration": last}, path / "model_final.pth"
    )
    return path / "model_final.pth"


def fvcore_resume(saved: dict[str, Any]) -> dict[str, int]:
    return {"step": saved["iteration"] + 1}


def ultralytics(run: Run, path: Path) -> Path:
    """ultralytics/engine/trainer.py save_model: only the EMA, as a whole module in half precision."""
    for epoch in range(2):
        for _ in range(BATCHES):
            run.update()
        saved = {
            "epoch": epoch,
            "best_fitness": 0.5,
            "model": None,
            "ema": copy.deepcopy(run.ema).half(),
            "updates": run.updates,
            "optimizer": run.optimizer.state_dict(),
            "scaler": scaler(),
            "train_args": {"epochs": 9, "data": "coco8.yaml"},
            "date": "2024-01-01T00:00:00",
            "version": "8.3.0",
        }
        run.finish_epoch()
    torch.save(saved, path / "last.pt")
    return path / "last.pt"


def ultralytics_resume(saved: dict[str, Any]) -> dict[str, int]:
    return {"epochs": saved.get("epoch", -1) + 1, "step": saved["updates"]}


def yolov5(run: Run, path: Path) -> Path:
    """yolov5/train.py: model and EMA, both whole modules."""
    for epoch in range(2):
        for _ in range(BATCHES):
            run.update()
        run.finish_epoch()
        last = epoch
    saved = {
        "epoch": last, "best_fitness": 0.5, "model": copy.deepcopy(run.model), "ema": copy.deepcopy(run.ema),
        "updates": run.updates, "optimizer": run.optimizer.state_dict(), "opt": {"epochs": 9},
        "git": None, "date": "2024-01-01T00:00:00",
    }  # fmt: skip
    torch.save(saved, path / "last.pt")
    return path / "last.pt"


def fairseq(run: Run, path: Path) -> Path:
    """fairseq/trainer.py and data/iterators.py EpochBatchIterator.state_dict, at an epoch's end."""
    return _fairseq(run, path, 2 * BATCHES)


def fairseq_within(run: Run, path: Path) -> Path:
    """The same in the midst of the second epoch."""
    return _fairseq(run, path, BATCHES + 2)


def _fairseq(run: Run, path: Path, batches: int) -> Path:
    epoch, offset = 1, 0
    for _ in range(batches):
        run.update()
        offset += 1
        if offset == BATCHES:  # end_of_epoch(): the iterator's state is that of the next one
            run.finish_epoch()
            epoch, offset = epoch + 1, 0
    history = {"criterion_name": "CrossEntropy", "optimizer_name": "FairseqAdam", "num_updates": run.updates}
    saved = {
        "args": None,
        "cfg": {"checkpoint": Config()},
        "model": run.model.state_dict(),
        "criterion": None,
        "optimizer_history": [{"num_updates": 1}, {**history, "lr_scheduler_state": {"best": None}}],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": epoch, "iterations_in_epoch": offset, "shuffle": True},
            "val_loss": 1.5,
        },
        "last_optimizer_state": {**run.optimizer.state_dict(), "loss_scale": 128.0},
    }
    torch.save(saved, path / "checkpoint_last.pt")
    return path / "checkpoint_last.pt"


def fairseq_resume(saved: dict[str, Any]) -> dict[str, int]:
    """Trainer.load_checkpoint; the iterator starts in `epoch` after `iterations_in_epoch` batches."""
    iterator = saved["extra_state"]["train_iterator"]
    return {
        "epochs": iterator["epoch"] - 1,
        "batch_in_epoch": iterator["iterations_in_epoch"],
        "step": saved["optimizer_history"][-1]["num_updates"],
    }


def nanogpt(run: Run, path: Path) -> Path:
    """nanoGPT train.py: it saves before the update of that number."""
    iter_num = 0
    while True:
        if iter_num == 4:
            saved = {
                "model": OrderedDict((f"_orig_mod.{k}", v) for k, v in run.model.state_dict().items()),
                "optimizer": run.optimizer.state_dict(),
                "model_args": {"n_layer": 1},
                "iter_num": iter_num,
                "best_val_loss": torch.tensor(2.5),
                "config": {"batch_size": 4, "block_size": 8, "gradient_accumulation_steps": 5},
            }
            torch.save(saved, path / "ckpt.pt")
            return path / "ckpt.pt"
        run.update()
        iter_num += 1


def nanogpt_resume(saved: dict[str, Any]) -> dict[str, int]:
    return {"step": saved["iter_num"]}


def open_clip(run: Run, path: Path) -> Path:
    """open_clip_train/main.py."""
    for epoch in range(2):
        for _ in range(BATCHES):
            run.update()
        run.finish_epoch()
        completed_epoch = epoch + 1
    saved = {
        "epoch": completed_epoch,
        "name": "run",
        "state_dict": run.model.state_dict(prefix="module."),
        "optimizer": run.optimizer.state_dict(),
        "scaler": scaler(),
    }
    torch.save(saved, path / "epoch_2.pt")
    return path / "epoch_2.pt"


def composer(run: Run, path: Path) -> Path:
    """composer/core/state.py state_dict, core/time.py Timestamp; the optimizer by parameter name."""
    for _ in range(BATCHES):
        run.update()
    run.finish_epoch()
    run.update()
    names = {i: n for i, (n, _) in enumerate(run.model.named_parameters())}
    state = run.optimizer.state_dict()
    named = {
        "state": {names[i]: entry for i, entry in state["state"].items()},
        "param_groups": [{**g, "params": [names[i] for i in g["params"]]} for g in state["param_groups"]],
    }
    timestamp = {
        "iteration": 0, "epoch": run.epochs, "batch": run.updates, "sample": run.samples, "token": 0,
        "epoch_in_iteration": run.epochs, "token_in_iteration": 0, "batch_in_epoch": run.batch,
        "sample_in_epoch": 4 * run.batch, "token_in_epoch": 0, "total_wct": datetime.timedelta(seconds=5),
    }  # fmt: skip
    saved = {
        "state": {
            "model": run.model.state_dict(),
            "optimizers": {type(run.optimizer).__qualname__: named},
            "schedulers": {"LambdaLR": run.scheduler.state_dict()},
            "algorithms": [("EMA", {})],
            "callbacks": {"SpeedMonitor": {"total_eval_wct": 0.5}},
            "timestamp": {"Timestamp": timestamp},
            "integrations": {},
        },
        "rng": [{"python": (3, (1, 2), None), "torch": torch.get_rng_state()}],
    }
    torch.save(saved, path / "ep1-ba4-rank0.pt")
    return path / "ep1-ba4-rank0.pt"


def composer_resume(saved: dict[str, Any]) -> dict[str, int]:
    """Timestamp.load_state_dict."""
    timestamp = saved["state"]["timestamp"]["Timestamp"]
    told = {"epochs": "epoch", "step": "batch", "batch_in_epoch": "batch_in_epoch", "samples": "sample"}
    return {field: timestamp[key] for field, key in told.items()}


Save = Callable[[Run, Path], Path]
Resume = Callable[[dict[str, Any]], dict[str, int]]

PRODUCERS: dict[str, tuple[str, Save, Resume, bool]] = {
    "torchvision": ("torchvision", torchvision, torchvision_resume, True),
    "imagenet": ("imagenet", imagenet, imagenet_resume, True),
    "timm": ("timm", timm, timm_resume, True),
    "timm-1": ("timm", timm_before_version_2, timm_resume, True),
    "mmengine-epoch": ("mmengine", mmengine_by_epoch, mmengine_resume, True),
    "mmengine-iter": ("mmengine", mmengine_by_iteration, mmengine_resume, True),
    "mmcv": ("mmcv", mmcv, mmengine_resume, True),
    "detectron2": ("detectron2", detectron2, detectron2_resume, False),
    "fvcore": ("fvcore", fvcore, fvcore_resume, False),
    "ultralytics": ("ultralytics", ultralytics, ultralytics_resume, True),
    "yolov5": ("ultralytics", yolov5, ultralytics_resume, True),
    "fairseq": ("fairseq", fairseq, fairseq_resume, True),
    "fairseq-within": ("fairseq", fairseq_within, fairseq_resume, True),
    "nanogpt": ("nanogpt", nanogpt, nanogpt_resume, False),
    "open-clip": ("open-clip", open_clip, imagenet_resume, True),
    "composer": ("composer", composer, composer_resume, False),
}
"""Case -> dialect, how it saves, where it resumes, whether its scheduler is stepped per epoch."""
