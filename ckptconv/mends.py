"""What to do about a checkpoint: the call that restores all of it, the commands that carry it elsewhere."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ckptconv.catalog.optimizers import row
from ckptconv.catalog.restores import KindOfFile, TemplateRecipe, frameworks, recipe_for
from ckptconv.dialects import torch_adapter
from ckptconv.dialects.torch_objects import NAMES_CODE
from ckptconv.document import Checkpoint, Known, Optimizer, Unknown, value_of
from ckptconv.formats.bundle_path import is_saved_model, locate
from ckptconv.rawtree import Lifted, walk
from ckptconv.rawtree import Path as Keys

_DESCRIBED = (
    "# in the program that wrote the checkpoint, with its model and optimizer:",
    'ckptconv.write_skeleton(ckptconv.{adapter}.describe(model, optimizer), "described.json")',
    "# in the program that goes on:",
)
_OF_TORCH = ("pytorch", "dcp", "safetensors")
"""Formats whose weights are laid out as PyTorch has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """Something to do about it: lines of Python, then a command, or one of both."""

    text: str
    code: tuple[str, ...] = ()
    command: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """The checkpoint as a command names it."""

    path: Path
    options: tuple[str, ...]

    def command(self, name: str, *arguments: str, more: Sequence[str] = ()) -> str:
        return shlex.join(("ckptconv", name, str(self.path), *arguments, *self.options, *more))


def options(format: str | None, dialect: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """What the caller said of the source, for a command that reads it once more."""
    said = () if format is None else ("--from", format if dialect is None else f"{format}:{dialect}")
    return (*said, *(part for name in names for part in ("--select", name)))


def mends(checkpoint: Checkpoint, kind: KindOfFile | None, named: Named) -> Iterator[Mend]:
    """The restoring call that brings everything back, conversions, and what else helps."""
    best = next((restore for restore in kind.restores if restore.whole), None) if kind else None
    if best is not None:
        call, words = best.call, _words(checkpoint, named.path)
        if any(said.startswith(NAMES_CODE) for said in checkpoint.oddities):
            call = call.replace("torch.load(PATH)", "torch.load(PATH, weights_only=False)")
        yield Mend(
            text=f"In {best.framework}, this brings all of it back:",
            code=tuple(_filled(line, words) for line in call.split("; ")),
        )
    if checkpoint.is_skeleton:
        return
    steps = (checkpoint.progress.step, *(o.step for o in checkpoint.optimizers if not o.param_steps))
    unknown = any(isinstance(step, Unknown) for step in steps)
    if len(checkpoint.optimizers) > 1:
        for position, optimizer in enumerate(checkpoint.optimizers):
            yield Mend(
                text=f"A conversion takes one optimizer at a time. For '{optimizer.name}':",
                command=named.command("doctor", more=("--select", f"optimizer:{position}")),
            )
        return
    for recipes in _recipes(checkpoint, kind):
        yield _conversion(recipes, checkpoint, named, unknown=unknown)
    if unknown and checkpoint.optimizers:
        setting, meaning = _told_step(checkpoint)
        yield Mend(
            text="To say it once and keep the result. "
            f"{meaning} A log, a file name, or updates per epoch times epochs may tell it:",
            command=named.command(
                "convert", f"{named.path.name}.neutral", more=("--to", "neutral", "--set", setting)
            ),
        )


def _filled(line: str, words: Mapping[str, str]) -> str:
    """A line of a call with what this checkpoint has in place of the words that stand for it."""
    return re.sub(r"\b[A-Z]{4,}\b", lambda match: words.get(match[0], match[0]), line)


def _words(checkpoint: Checkpoint, path: Path) -> dict[str, str]:
    """The paths that the framework's call takes, and the parts of a file that `torch.load` gives as `run`."""
    where = _restorable(checkpoint, path)
    words = {"PATH": where, "FOLDER": str(Path(where).parent), "NAME": Path(where).name}
    found = {word: json.dumps(text) for word, text in words.items()}
    leaves = walk(checkpoint.residue.root) if checkpoint.residue else ()
    for keys, leaf in leaves:
        if isinstance(leaf, Lifted) and leaf.to[0] == "param":
            found.setdefault("MODEL", _part(keys[:-1]))
        elif isinstance(leaf, Lifted) and leaf.to[0] == "hyperparameter" and "param_groups" in keys:
            found.setdefault("OPTIMIZER", _part(keys[: keys.index("param_groups")]))
    return found


def _part(keys: Keys) -> str:
    return "run" + "".join(f"[{json.dumps(key)}]" for key in keys)


def _recipes(checkpoint: Checkpoint, kind: KindOfFile | None) -> Iterator[tuple[TemplateRecipe, ...]]:
    """How the frameworks that a conversion is of use for make a template, those together that do it alike."""
    own = {optimizer.framework for optimizer in checkpoint.optimizers}
    others = tuple(name for name in frameworks() if own and name not in own)
    recipes = [recipe_for(name) for name in (others if kind is None else kind.goes_on_in)]
    if torch_adapter.is_in(checkpoint):  # no other framework has a place for it before it is merged
        recipes = [recipe for recipe in recipes if recipe.framework == "torch"]
    for _, alike in groupby(recipes, key=lambda recipe: (recipe.target, recipe.template, recipe.code)):
        yield tuple(alike)


def _restorable(checkpoint: Checkpoint, path: Path) -> str:
    """The path that the framework's call takes."""
    if checkpoint.provenance.format == "tensorflow" and not is_saved_model(path):
        return str(locate(path).prefix)
    return str(path)


def _conversion(
    recipes: tuple[TemplateRecipe, ...], checkpoint: Checkpoint, named: Named, *, unknown: bool
) -> Mend:
    """The lines and the command that carry the run, or its weights, into a framework."""
    recipe, labels = recipes[0], " or in ".join(recipe.label for recipe in recipes)
    code, arguments, notes = recipe.code, ["--template", recipe.template], []
    if untold := tuple(_untold(checkpoint, recipe.framework)):
        adapter = "pytorch" if checkpoint.provenance.format in _OF_TORCH else "keras"
        code = (*(line.format(adapter=adapter) for line in _DESCRIBED), *code)
        arguments += ["--source-spec", "described.json"]
        notes.append(f"The program that wrote the file has to describe {' and '.join(untold)}.")
    if recipe.framework == "torch" and any(len(o.groups) > 1 for o in checkpoint.optimizers):
        notes.append("Give the optimizer the groups of parameters that it had.")
    if any(map(_lacks_rate, checkpoint.optimizers)):
        arguments += ["--set", "learning_rate=RATE"]
        notes.append("RATE is the learning rate, which the file does not tell.")
    if classes := _classes(checkpoint):
        arguments += ["--set", "optimizer=CLASS"]
        notes.append(f"CLASS is the optimizer, which the file does not tell: {' or '.join(classes)}.")
    if unknown:
        setting, meaning = _told_step(checkpoint)
        arguments += ["--set", setting]
        notes.append(meaning)
    if recipe.framework != "torch" and any(map(_decays_in_the_gradient, checkpoint.optimizers)):
        arguments += ["--allow", "form-mismatch"]
        notes.append("Weight decay becomes a regularizer of the layers, as the conversion prints it.")
    if any("moving_average" in optimizer.slots for optimizer in checkpoint.optimizers):
        arguments += ["--allow", "state-dropped"]
        notes.append("Leave --allow state-dropped out if the new optimizer averages the weights, too.")
    if recipe.framework != "torch" and any(map(_has_several_rates, checkpoint.optimizers)):
        arguments += ["--allow", "groups-differ"]
        notes.append("Keras has one learning rate for all parameters: that of the first group is taken.")
    if checkpoint.schedules:
        arguments += ["--allow", "schedule-unsupported"]
        notes.append("Leave --allow schedule-unsupported out if the new optimizer follows the same schedule.")
    if not checkpoint.optimizers or any(map(_lacks_state, checkpoint.optimizers)):
        arguments += ["--allow", "slots-missing"]
        notes.append("The optimizer begins anew.")
    what = "To go on" if checkpoint.optimizers else "To use the weights"
    said = " ".join(("make a fresh model with its optimizer there, then convert.", *notes))
    command = named.command("convert", recipe.target, more=arguments)
    return Mend(
        text=f"{what} in {labels}, {said}",
        code=code,
        command=f"mkdir -p {recipe.directory} && {command}",
    )


def _untold(checkpoint: Checkpoint, framework: str) -> Iterator[str]:
    """What a conversion into a framework needs to know and the file does not tell."""
    if any(optimizer.param_order == "unknown" and optimizer.slots for optimizer in checkpoint.optimizers):
        yield "which state belongs to which weight"
    kernels = [p for p in checkpoint.params.values() if p.role == "kernel" and not p.axes]
    square = [p for p in kernels if len(p.tensor.shape) == 2 and p.tensor.shape[0] > 1]
    if checkpoint.provenance.format in _OF_TORCH and framework != "torch" and square:
        yield "which side of a square weight is its input"


def _lacks_state(optimizer: Optimizer) -> bool:
    """Whether it has counted updates and kept nothing of them that its rule needs."""
    known = row(optimizer.algorithm, optimizer.framework)
    keeps = known is not None and bool(known.slots_present({}))
    return keeps and not optimizer.slots and bool(value_of(optimizer.step))


def _lacks_rate(optimizer: Optimizer) -> bool:
    """Whether a momentum may have to be rescaled by a learning rate that is not there."""
    return "momentum" in optimizer.slots and not any(
        "learning_rate" in group.hyperparameters for group in optimizer.groups
    )


def _has_several_rates(optimizer: Optimizer) -> bool:
    rates = (value_of(group.hyperparameters.get("learning_rate")) for group in optimizer.groups)
    return len(set(rates)) > 1


def _decays_in_the_gradient(optimizer: Optimizer) -> bool:
    decays = (value_of(group.hyperparameters.get("weight_decay")) for group in optimizer.groups)
    return optimizer.form.get("weight_decay") == "coupled" and any(decays)


def _told_step(checkpoint: Checkpoint) -> tuple[str, str]:
    """How the caller says a step that the file does not tell, and what that means."""
    progress = checkpoint.progress
    if isinstance(progress.micro_steps, Known) and isinstance(progress.accumulation, Unknown):
        return "accumulation=B", "B is the number of batches per update (gradient_accumulation_steps)."
    facts = (progress.step, *(optimizer.step for optimizer in checkpoint.optimizers))
    hints = [hint for fact in facts if isinstance(fact, Unknown) for hint in fact.candidates]
    maybe = " or ".join(dict.fromkeys(f"{hint.value} ({hint.condition})" for hint in hints))
    return "step=N", f"N is the number of updates that were done{maybe and f', perhaps {maybe}'}."


def _classes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The optimizers that the state may be of, where it may be of several."""
    several = (o.algorithm_candidates for o in checkpoint.optimizers if len(o.algorithm_candidates) > 1)
    return next(several, ())
