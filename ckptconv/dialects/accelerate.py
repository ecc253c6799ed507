"""The folder of accelerate's `Accelerator.save_state`.

    model.safetensors (or pytorch_model.bin), optimizer.bin, scheduler.bin, scaler.pt, sampler.bin,
    random_states_<rank>.pkl, dl_state_dict.bin, custom_checkpoint_<n>.pkl; second ones as optimizer_1.bin;
    instead of the first two what `dcp_members` (FSDP) and `deepspeed_within` tell

| place | counts |
|---|---|
| optimizer's `step` | updates |
| scheduler's `last_epoch` | updates, times the processes unless batches are split |
| `step` of `random_states_0.pkl` | NOT progress: passes inside `accumulate()` since the epoch began |
| `dl_state_dict.bin` | batches since the epoch began (`torchdata_state`) |

Epochs are the loop's own business, in custom checkpoints if anywhere. Several models or optimizers keep their
files' names. diffusers' training scripts write their model below (`unet/`). A sampler is an object that is
described, not built: writing it needs --allow opaque-globals. Writing needs a folder of the target's loop (or
the run's own) as template. Source: accelerate 1.15 `checkpointing.py` `save_accelerator_state`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.dcp_members import MODEL, OPTIMIZER, closed, opened
from ckptconv.dialects.deepspeed_within import Held, engine_in, lowered
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_folder_parts import (
    folder_of,
    has_order,
    lift_weights,
    not_read,
    numbered,
    raw_of,
)
from ckptconv.dialects.torch_groups import GroupRule, anywhere
from ckptconv.dialects.torch_lower import settle
from ckptconv.dialects.torch_modules import Module
from ckptconv.dialects.torch_note import lift_note
from ckptconv.dialects.torch_objects import named_code, refuse_repeated_keys
from ckptconv.dialects.torch_optimizer import is_optimizer, lift_optimizer
from ckptconv.dialects.torch_plain import blocks, provenance, trained, unit_names
from ckptconv.dialects.torch_progress import step_of_optimizers
from ckptconv.dialects.torch_scheduler import is_scheduler, lift_schedule
from ckptconv.dialects.torch_table import ACCELERATE
from ckptconv.dialects.torch_values import count_of, lift_rest, number_of, own_residue
from ckptconv.dialects.torchdata_state import batch_of
from ckptconv.document import (
    NOT_RECORDED,
    Absent,
    Candidate,
    Checkpoint,
    Fact,
    Known,
    Optimizer,
    Param,
    Progress,
    Schedule,
    Unknown,
    value_of,
)
from ckptconv.errors import FormatError, MappingError, Problem
from ckptconv.rawtree import DictNode, Node, Path, RawTree

_MODELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (MODEL, ("", ".bin")),
    ("model", (".safetensors",)),
    ("pytorch_model", (".bin",)),
)
"""How the files of models are called, those first that `load_state` looks for first."""
_SCALER, _LOADER = "scaler.pt", "dl_state_dict"
_GENERATORS = re.compile(r"random_states_\d+\.pkl")
_BELOW = re.compile(r"([^/]+)/(?:diffusion_pytorch_model|model|adapter_model)\.safetensors")
_NO_EPOCHS = Unknown(reason="accelerate counts none; a loop may keep them in a custom checkpoint")


class Accelerate:
    """One folder of `Accelerator.save_state`."""

    name = "accelerate"
    format = "pytorch"
    framework: str | None = "torch"
    needs_template = True
    save_counter: str | None = None
    summary = ACCELERATE.summary

    def detect(self, raw: RawTree) -> Detection | None:
        """By the files that only accelerate writes."""
        if raw.attributes.get("producer") != self.name or not isinstance(raw.root, DictNode):
            return None
        names = map(str, raw.root.keys)
        marks = [name for name in names if name == "optimizer.bin" or _is_generators(name)]
        return Detection(score=100, evidence=f"a folder with {', '.join(marks[:3])}")

    def lift(self, raw: RawTree) -> Checkpoint:
        """The training run. I/O: reads 0-d counters. Raises: unknown-dialect, duplicate-key, corrupt-file."""
        raw = opened(raw)
        root = folder_of(raw)
        refuse_repeated_keys(root)
        engine = engine_in(root, raw)
        root = root if engine is None else engine.beside
        lifter = Lifter(root)
        held = _held(root, raw, lifter) if engine is None else Held.of_engine(engine, root, lifter)
        schedules, odd_schedules = _schedules(root, held.optimizers, lifter)
        progress = _progress(root, held, schedules, lifter)
        extras = lift_rest(root, lifter, held.extras)
        checkpoint = Checkpoint(
            progress=progress,
            params=trained(held.params, held.optimizers),
            optimizers=held.optimizers,
            schedules=schedules or held.schedules,
            loss_scaling=held.loss_scaling,
            rng=tuple(b for b in blocks(root, extras, _is_generators) if not b.name.endswith("/step")),
            data=blocks(root, extras, lambda key: key.startswith((_LOADER, "sampler"))),
            extras=extras,
            described=held.described,
            residue=held.residue(lifter.residue(), raw, self.name),
            provenance=provenance(raw, self.name, self.detect(raw), producer="accelerate"),
            oddities=(
                *held.oddities,
                *odd_schedules,
                *not_read(raw),
                *named_code(replace(root, kind="dict")),
            ),
        )
        return lift_note(checkpoint, root)

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The template's folder (or the run's own) with the document's values."""
        root, residue = own_residue(checkpoint, self.name), checkpoint.residue
        if not isinstance(root, DictNode) or residue is None:
            raise MappingError.of(
                "template-required",
                "a folder of accelerate needs a template: which files there are is the loop's own business",
                "Pass --template with a save_state folder of the target's loop.",
                loc=("residue",),
            )
        paths = _paths(root, OPTIMIZER, is_optimizer)
        filled = lowered(root, paths, settle(checkpoint, root), residue)
        return closed(raw_of(filled, RawTree(format=self.format, root=None, attributes=residue.attributes)))

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """None: an optimizer that was never stepped has its groups."""
        return ()

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`Accelerator.load_state` after everything was prepared."""
        return f"accelerator.load_state({target!r})  # after prepare() and register_for_checkpointing()"


def _is_generators(key: str) -> bool:
    return _GENERATORS.fullmatch(key) is not None


def _held(root: DictNode, raw: RawTree, lifter: Lifter) -> Held:
    """What accelerate's own files hold."""
    modules = list(_modules(root, lifter))
    if not modules:
        raise FormatError.of(
            "unknown-dialect",
            "the folder has no file with a model's weights",
            "Copy the folder again, with its subfolders.",
            loc=(raw.location.rpartition("/")[2],),
        )
    optimizers, odd = _optimizers(root, modules, lifter)
    return Held(
        params={name: param for _, module in modules for name, param in module.params.items()},
        optimizers=optimizers,
        extras={key: part for _, module in modules for key, part in module.parts.items()},
        described=tuple(block for _, module in modules for block in module.described),
        oddities=odd,
    )


def _modules(root: DictNode, lifter: Lifter) -> Iterator[tuple[str, Module]]:
    """Each model with its file: the first has bare names, others those of their files before theirs."""
    files = next(filter(None, (numbered(root, stem, suffixes) for stem, suffixes in _MODELS)), ())
    seen: dict[object, str] = {}
    if files:
        for place, file in enumerate(files):
            prefix = f"{file.partition('.')[0]}." if place else ""
            yield file, lift_weights(root, (file,), lifter, prefix=prefix, seen=seen)
        return
    below = [(told[1], told[0]) for key in root.keys if (told := _BELOW.fullmatch(str(key))) is not None]
    below = [pair for pair in below if not pair[0].endswith("_ema")]
    for directory, file in below:
        prefix = f"{directory}." if len(below) > 1 else ""
        yield file, lift_weights(root, (file,), lifter, prefix=prefix, seen=seen)


def _paths(root: DictNode, stem: str, told: Callable[[Node], bool]) -> tuple[Path, ...]:
    return tuple((file,) for file in numbered(root, stem, ("", ".bin")) if told(root.get(file)))


def _optimizers(
    root: DictNode, modules: list[tuple[str, Module]], lifter: Lifter
) -> tuple[tuple[Optimizer, ...], tuple[str, ...]]:
    rule = None
    if not all(has_order(file) for file, _ in modules):
        rule = GroupRule(is_ordered=False, may_be_in=anywhere)
    sets: list[Mapping[str, Param]] = [module.params for _, module in modules]
    if len(modules) > 1:
        sets.append({name: param for _, module in modules for name, param in module.params.items()})
    raw_names = {raw: name for _, module in modules for raw, name in module.raw_names.items()}
    optimizers: list[Optimizer] = []
    oddities: list[str] = []
    paths = _paths(root, OPTIMIZER, is_optimizer)
    for path, name in zip(paths, unit_names(paths, "optimizer"), strict=True):
        node = root.get(str(path[0]))
        assert isinstance(node, DictNode)
        optimizer, odd = lift_optimizer(node, path, name, tuple(sets), raw_names, lifter, rule)
        optimizers.append(optimizer)
        oddities += odd
    return tuple(optimizers), tuple(oddities)


def _schedules(
    root: DictNode, optimizers: tuple[Optimizer, ...], lifter: Lifter
) -> tuple[tuple[Schedule, ...], tuple[str, ...]]:
    """The schedules: one for each optimizer drives that of its number, else the only optimizer."""
    paths = _paths(root, "scheduler", is_scheduler)
    schedules: list[Schedule] = []
    oddities: list[str] = []
    for place, (path, name) in enumerate(zip(paths, unit_names(paths, "scheduler"), strict=True)):
        node = root.get(str(path[0]))
        assert isinstance(node, DictNode)
        mine = optimizers[place] if len(paths) == len(optimizers) else None
        schedule, odd = lift_schedule(node, path, name, mine, lifter)
        schedules.append(schedule)
        oddities += odd
    return tuple(schedules), tuple(oddities)


def _progress(root: DictNode, held: Held, schedules: tuple[Schedule, ...], lifter: Lifter) -> Progress:
    if held.progress is not None:
        return replace(held.progress, epochs=_NO_EPOCHS, batch_in_epoch=_batch(root))
    step = step_of_optimizers(held.optimizers)
    if isinstance(step, Unknown):
        step = replace(step, candidates=(*step.candidates, *_by_schedules(root, schedules)))
    scale: Fact = Absent(reason=f"there is no {_SCALER}")
    scaler = root.get(_SCALER)
    found = number_of(scaler.get("scale")) if isinstance(scaler, DictNode) else None
    if found is not None and not isinstance(found[0], bool):
        lifter.take((_SCALER, "scale"), ("progress", "loss_scale"), **found[1])
        scale = Known(value=found[0], source=f"{_SCALER}.scale")
    return Progress(step=step, epochs=_NO_EPOCHS, batch_in_epoch=_batch(root), loss_scale=scale)


def _by_schedules(root: DictNode, schedules: tuple[Schedule, ...]) -> Iterator[Candidate]:
    """What the schedulers say of the updates where the optimizers count none."""
    processes = sum(_is_generators(str(key)) for key in root.keys) or 1
    for schedule in schedules:
        position = value_of(schedule.position)
        if not isinstance(position, int):
            continue
        yield Candidate(value=position, source=schedule.name, condition="it is stepped once by an update")
        if processes > 1 and not position % processes:
            condition = f"{processes} processes step it, each for itself"
            yield Candidate(value=position // processes, source=schedule.name, condition=condition)


def _batch(root: DictNode) -> Fact:
    for file in numbered(root, _LOADER, (".bin",)):
        fact = batch_of(root.get(file), (file,))
        if fact is not None:
            return fact
    states = root.get("random_states_0.pkl")
    counted = count_of(states.get("step")) if isinstance(states, DictNode) else None
    if counted is None or counted[0] <= 0:
        return NOT_RECORDED
    condition = "every batch of the loop runs within accumulate()"
    return Unknown(
        reason="accelerate's step counts backward passes inside accumulate() since the epoch began",
        candidates=(Candidate(value=counted[0], source="random_states_0.pkl.step", condition=condition),),
    )


register(Accelerate())
