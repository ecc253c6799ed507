"""The folder of a transformers Trainer: `checkpoint-N/`, and what `save_pretrained` leaves of a model.

    model.safetensors (or its shards and index, or pytorch_model.bin and its), optimizer.pt, scheduler.pt,
    scaler.pt, rng_state.pth, trainer_state.json, training_args.bin, config.json, tokenizer files

The counters stand in `hf_trainer_state`. The optimizer has two groups, with decay and without, in the model's
order each; its indices run through the first group, so index order is not model order. safetensors sorts by
name: where shapes do not tell every index, a skeleton does (`describe(trainer.model, trainer.optimizer)` as
--source-spec). A tied output layer is absent from the weights. The schedule is told by the arguments
(`hf_schedule`). Arguments are an object of transformers that is described, not built: writing them needs
--allow opaque-globals. Writing needs a folder of the target's Trainer (or the run's own) as template.
Source: transformers 5.24 `trainer.py` `_save_checkpoint`, `get_decay_parameter_names`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ckptconv.catalog.schedule_rates import Curve, curve_of, flat, rate
from ckptconv.dialects import torch_adapter
from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.dcp_members import closed, opened
from ckptconv.dialects.deepspeed_within import Held, engine_in, lowered
from ckptconv.dialects.hf_schedule import curve_of_arguments
from ckptconv.dialects.hf_trainer_state import ARGUMENTS, SCALER, STATE, read_state, settle_state
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_folder_parts import (
    folder_of,
    has_order,
    lift_copies,
    lift_weights,
    not_read,
    raw_of,
    weights_of,
)
from ckptconv.dialects.torch_groups import GroupRule, anywhere
from ckptconv.dialects.torch_lower import settle
from ckptconv.dialects.torch_modules import Module
from ckptconv.dialects.torch_note import lift_note
from ckptconv.dialects.torch_objects import named_code, refuse_repeated_keys
from ckptconv.dialects.torch_optimizer import is_optimizer, lift_optimizer
from ckptconv.dialects.torch_plain import blocks, provenance, trained
from ckptconv.dialects.torch_scaler import lift_scaling
from ckptconv.dialects.torch_scheduler import is_scheduler, lift_schedule
from ckptconv.dialects.torch_survey import is_rng
from ckptconv.dialects.torch_table import HF_TRAINER
from ckptconv.dialects.torch_values import lift_rest, own_residue
from ckptconv.document import Checkpoint, Known, Optimizer, Param, Schedule, value_of
from ckptconv.errors import FormatError, LossError, MappingError, Problem
from ckptconv.rawtree import DictNode, ListNode, Node, RawTree

OPTIMIZERS, SCHEDULERS = ("optimizer.pt", "optimizer.bin", "optimizer_0"), ("scheduler.pt",)
_PRODUCERS = ("hf-trainer", "transformers")
_GROUPS = ("with decay", "without")
_NORM = re.compile(r"layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_ALIKE = 1e-9
_TICKS = 64
"""Rates that are compared, over the whole length of a run."""


class HFTrainer:
    """One folder of `Trainer._save_checkpoint`."""

    name = "hf-trainer"
    format = "pytorch"
    framework: str | None = "torch"
    needs_template = True
    save_counter: str | None = None
    summary = HF_TRAINER.summary

    def detect(self, raw: RawTree) -> Detection | None:
        """By the files that only the Trainer writes."""
        if raw.attributes.get("producer") not in _PRODUCERS or not isinstance(raw.root, DictNode):
            return None
        marks = [name for name in (STATE, ARGUMENTS) if name in raw.root]
        return Detection(score=100, evidence=f"a folder with {' and '.join(marks) or 'a model in shards'}")

    def lift(self, raw: RawTree) -> Checkpoint:
        """The training run. I/O: reads 0-d counters.

        Raises: unknown-dialect, duplicate-key, corrupt-file, progress-conflict.
        """
        raw = opened(raw)
        root = folder_of(raw)
        refuse_repeated_keys(root)
        engine = engine_in(root, raw)
        root = root if engine is None else engine.beside
        lifter = Lifter(root)
        held = _held(root, raw, lifter) if engine is None else Held.of_engine(engine, root, lifter)
        only = held.optimizers[0] if len(held.optimizers) == 1 else None
        schedule, odd_schedule = _schedule(root, only, lifter)
        progress, odd_progress = read_state(root, held.optimizers, lifter, held.progress)
        scaling = lift_scaling([((SCALER,), root.get(SCALER))], lifter) or held.loss_scaling
        extras = lift_rest(root, lifter, held.extras)
        adapter = torch_adapter.settings(root)
        checkpoint = Checkpoint(
            progress=progress,
            params=trained(held.params, held.optimizers),
            optimizers=held.optimizers,
            schedules=held.schedules if schedule is None else (schedule,),
            loss_scaling=scaling,
            rng=blocks(root, extras, is_rng),
            extras=extras,
            described=held.described,
            residue=held.residue(lifter.residue(), raw, self.name),
            provenance=provenance(raw, self.name, self.detect(raw), producer=_producer(root)),
            oddities=(
                *held.oddities,
                *odd_schedule,
                *odd_progress,
                *torch_adapter.said(adapter),
                *not_read(raw),
                *named_code(replace(root, kind="dict")),
            ),
            extensions={torch_adapter.EXTENSION: adapter} if adapter else {},
        )
        return lift_note(checkpoint, root)

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The template's folder (or the run's own) with the document's values."""
        root, residue = own_residue(checkpoint, self.name), checkpoint.residue
        if not isinstance(root, DictNode) or residue is None:
            raise MappingError.of(
                "template-required",
                "a Trainer's folder needs a template: its arguments and groups are the trainer's own",
                "Pass --template with a checkpoint-N folder of the target's Trainer, saved after one step.",
                loc=("residue",),
            )
        settled, followed = settle_state(settle(checkpoint, root), root)
        assert isinstance(followed, DictNode)
        _refuse_other_schedule(settled, root)
        paths = tuple((name,) for name in OPTIMIZERS if is_optimizer(root.get(name)))[:1]
        filled = lowered(followed, paths, settled, residue)
        return closed(raw_of(filled, RawTree(format=self.format, root=None, attributes=residue.attributes)))

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """None: an optimizer that was never stepped has its groups."""
        return ()

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`Trainer.train` with the folder, or `from_pretrained` where there is no run to go on with."""
        if not checkpoint.optimizers:
            return f"model = AutoModel.from_pretrained({target!r})"
        return f"trainer.train(resume_from_checkpoint={target!r})"


def _producer(root: DictNode) -> str:
    config = root.get("config.json")
    version = config.get("transformers_version") if isinstance(config, DictNode) else None
    return f"transformers {version[:20]}" if isinstance(version, str) else "transformers"


def _held(root: DictNode, raw: RawTree, lifter: Lifter) -> Held:
    """What the Trainer's own files hold."""
    model = weights_of(root)
    if model is None:
        raise FormatError.of(
            "unknown-dialect",
            "the folder has no file with the model's weights",
            "Copy the folder again, with its subfolders.",
            loc=(raw.location.rpartition("/")[2],),
        )
    module = lift_weights(root, model[1], lifter)
    copies = lift_copies(root, model[0], module.params, lifter)
    optimizer, odd = _optimizer(root, module, has_order(model[0]), lifter)
    return Held(
        params=module.params,
        optimizers=() if optimizer is None else (optimizer,),
        extras=module.parts,
        described=module.described,
        oddities=(*odd, *copies),
    )


def _optimizer(
    root: DictNode, module: Module, in_order: bool, lifter: Lifter
) -> tuple[Optimizer | None, tuple[str, ...]]:
    for name in OPTIMIZERS:
        node = root.get(name)
        if isinstance(node, DictNode) and is_optimizer(node):
            groups = node.get("param_groups")
            count = len(groups.items) if isinstance(groups, ListNode) else 0
            rule = GroupRule(
                is_ordered=in_order and count <= len(_GROUPS),
                may_be_in=_may_be_in if count == len(_GROUPS) else anywhere,
            )
            sets = (module.params,)
            return lift_optimizer(node, (name,), "optimizer", sets, module.raw_names, lifter, rule)
    return None, ()


def _may_be_in(param: Param, group: int) -> bool:
    """Whether the Trainer may have put a parameter there: layers of norms are told by their class only."""
    name = param.name.lower()
    if "bias" in name:
        return group == 1
    if len(param.tensor.shape) > 1 and not _NORM.search(name):
        return group == 0
    return True


def _schedule(
    root: DictNode, optimizer: Optimizer | None, lifter: Lifter
) -> tuple[Schedule | None, tuple[str, ...]]:
    for name in SCHEDULERS:
        node = root.get(name)
        if isinstance(node, DictNode) and is_scheduler(node):
            schedule, odd = lift_schedule(node, (name,), "scheduler", optimizer, lifter)
            return (_told(schedule, root), ()) if schedule.family == "lambda" else (schedule, odd)
    return None, ()


def _told(schedule: Schedule, root: DictNode) -> Schedule:
    """The schedule with the curve that the arguments tell; the Trainer steps it by the update."""
    curve = _curve(root)
    schedule = replace(schedule, unit="update")
    if curve is None:
        return schedule
    facts = {
        name: Known(value=value, status="derived", source=ARGUMENTS, formula="lr_scheduler_type and warmup")
        for name, value in flat(curve).items()
    }
    return replace(schedule, family=curve.family, parameters={**schedule.parameters, **facts})


def _curve(root: DictNode) -> Curve | None:
    return curve_of_arguments(root.get(ARGUMENTS), _length(root))


def _length(root: DictNode) -> Node:
    """Updates of the whole run, as the Trainer's state has them."""
    state = root.get(STATE)
    return state.get("max_steps") if isinstance(state, DictNode) else None


def _refuse_other_schedule(checkpoint: Checkpoint, root: DictNode) -> None:
    """Raises: schedule-unsupported where the folder's arguments make another schedule than the run's."""
    curve = _curve(root)
    if curve is None or len(checkpoint.schedules) != 1:
        return
    schedule, length = checkpoint.schedules[0], _length(root)
    position, own = value_of(schedule.position), curve_of(schedule)
    told = [g.hyperparameters.get("base_learning_rate") for o in checkpoint.optimizers for g in o.groups]
    base = value_of(told[0]) if told else None
    if not isinstance(length, int) or not isinstance(position, int) or own.family == "lambda":
        return
    base = float(base) if isinstance(base, (int, float)) and base else 1.0
    for tick in range(position, length, max(1, (length - position) // _TICKS)):
        theirs, ours = rate(curve, base, tick), rate(own, base, tick)
        if theirs is None or ours is None or abs(theirs - ours) > _ALIKE * abs(base):
            raise LossError.of(
                "schedule-unsupported",
                f"at {tick} the run's '{own.family}' gives the rate {ours}, the schedule that "
                f"'{ARGUMENTS}' of the folder makes gives {theirs}",
                "Use a template whose Trainer has lr_scheduler_type, warmup and max_steps of the run.",
                loc=("schedules", schedule.name),
            )


register(HFTrainer())
