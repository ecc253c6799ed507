"""The dictionary that a PyTorch training loop saves: a plain loop's, or that of a dialect in the table.

    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, path)

Where models, optimizers and schedulers stand tells `torch_survey`, what counters count `torch_progress` for
a plain loop and `torch_counters` for a dialect of `torch_table`. Several models or optimizers keep their own
names. Generators and loaders are kept as blocks. Everything else stays in the residue, its tensors among the
extras; objects that are no plain values (a Namespace, a whole module) are descriptions there. The embedded
note stands under the key `ckptconv` as a string. Writing needs such a dictionary as template: nothing else
tells the target's keys. Refused: state_dicts with a name twice, groups that contradict themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import PurePath

from ckptconv.catalog.schedule_source import with_epochs
from ckptconv.dialects import torch_keys
from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.residue import Lifter, fill
from ckptconv.dialects.torch_averages import with_averages
from ckptconv.dialects.torch_counters import read_counters, settle_counters
from ckptconv.dialects.torch_fresh import plain_dictionary
from ckptconv.dialects.torch_groups import GroupRule
from ckptconv.dialects.torch_lower import rebuild_state, settle
from ckptconv.dialects.torch_modules import Module, is_module, lift_module
from ckptconv.dialects.torch_note import lift_note, note_of, with_note
from ckptconv.dialects.torch_objects import named_code, refuse_repeated_keys
from ckptconv.dialects.torch_optimizer import lift_optimizer
from ckptconv.dialects.torch_progress import read_progress
from ckptconv.dialects.torch_rows import Row
from ckptconv.dialects.torch_scaler import lift_scaling
from ckptconv.dialects.torch_scheduler import lift_schedule
from ckptconv.dialects.torch_survey import Survey, is_rng, loose, same_owner, scalers, survey, words
from ckptconv.dialects.torch_table import ROWS
from ckptconv.dialects.torch_values import dotted, lift_rest, own_residue, places, with_layouts
from ckptconv.document import (
    Block,
    Checkpoint,
    Optimizer,
    Param,
    Progress,
    Provenance,
    Residue,
    Schedule,
)
from ckptconv.errors import CkptError, FormatError, MappingError, Problem
from ckptconv.formats.torch_folder import DIRECTORY
from ckptconv.rawtree import DictNode, Lifted, Node, Path, RawTree, at, transform
from ckptconv.tensor import TensorRef


class TrainingDictionary:
    """A training dictionary whose conventions a row of the table says."""

    format = "pytorch"
    framework: str | None = "torch"
    needs_template = True
    save_counter: str | None = None

    def __init__(self, row: Row | None) -> None:
        self._row = row
        self.name = "plain" if row is None else row.name
        self.summary = _PLAIN if row is None else row.summary

    def detect(self, raw: RawTree) -> Detection | None:
        """By the keys that the row names."""
        if self._row is None or not isinstance(raw.root, DictNode) or raw.root.kind == DIRECTORY:
            return None
        signature = self._row.signature
        if not signature.holds(raw.root, PurePath(raw.location).name):
            return None
        return Detection(
            score=signature.score, evidence=f"{self._row.producer}: {signature}".replace("`", "'")
        )

    def lift(self, raw: RawTree) -> Checkpoint:
        """The training run. I/O: reads 0-d counters. Raises: duplicate-key, corrupt-file, unknown-dialect."""
        root = raw.root
        if not isinstance(root, DictNode):
            raise FormatError.of(
                "unknown-dialect", "the file holds no dictionary", "See: ckptconv inspect --raw.", loc=()
            )
        refuse_repeated_keys(root)
        found, lifter = survey(root, self._row), Lifter(root)
        modules = _lift_models(root, found.models, lifter)
        params = {name: param for module in modules for name, param in module.params.items()}
        rule = self._row.rule if self._row is not None else None
        optimizers, odd = _lift_optimizers(root, found.optimizers, modules, lifter, rule)
        progress, optimizers, odd_progress = self._progress(raw, root, optimizers, lifter)
        schedules, odd_schedules = _lift_schedules(root, found.schedulers, optimizers, lifter)
        unit = self._row.schedule_unit if self._row is not None else "unknown"
        if unit != "unknown":
            schedules, odd_schedules = tuple(replace(s, unit=unit) for s in schedules), ()
        scaling = lift_scaling(scalers(root, self._row), lifter)
        extras = lift_rest(root, lifter, {k: v for module in modules for k, v in module.parts.items()})
        checkpoint = Checkpoint(
            progress=progress,
            params=trained(params, optimizers),
            optimizers=optimizers,
            schedules=tuple(with_epochs(schedule, progress) for schedule in schedules),
            loss_scaling=scaling,
            rng=blocks(root, extras, is_rng),
            data=blocks(root, extras, lambda key: key in torch_keys.DATA),
            extras=extras,
            described=tuple(block for module in modules for block in module.described),
            residue=Residue(
                format=self.format, dialect=self.name, root=lifter.residue(), attributes=raw.attributes
            ),
            provenance=provenance(
                raw, self.name, self.detect(raw), producer=self._row.producer if self._row else None
            ),
            oddities=(*odd, *odd_schedules, *odd_progress, *named_code(root)),
        )
        return lift_note(with_averages(checkpoint), root)

    def _progress(
        self, raw: RawTree, root: DictNode, optimizers: tuple[Optimizer, ...], lifter: Lifter
    ) -> tuple[Progress, tuple[Optimizer, ...], tuple[str, ...]]:
        if self._row is not None:
            return read_counters(root, self._row, optimizers, lifter, PurePath(raw.location).name)
        progress, oddities = read_progress(root, optimizers, lifter)
        return progress, optimizers, oddities

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The template's dictionary (or the run's own) with the document's values."""
        root = own_residue(checkpoint, self.name)
        residue = checkpoint.residue
        if not isinstance(root, DictNode) or residue is None:
            raise MappingError.of(
                "template-required",
                "a PyTorch training dictionary needs a template: its keys are the loop's own",
                "Pass --template with a checkpoint of the target's loop, or --to pytorch:state-dict.",
                loc=("residue",),
            )
        settled = settle(checkpoint, root)
        followed = settle_counters(settled, root, self._row)
        filled = filled_with(followed, survey(root, self._row).optimizers, settled)
        return RawTree(format=self.format, root=filled, attributes=residue.attributes)

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """None: an optimizer that was never stepped has its groups."""
        return ()

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`torch.load`, and `load_state_dict` of everything that stands in the dictionary."""
        root = own_residue(checkpoint, self.name)
        found = survey(root, self._row) if isinstance(root, DictNode) else Survey((), (), ())
        objects = ", weights_only=False" if isinstance(root, DictNode) and named_code(root) else ""
        lines = ["import torch", "", f"checkpoint = torch.load({target!r}{objects})"]
        for paths, only in (
            (found.models, "model"),
            (found.optimizers, "optimizer"),
            (found.schedulers, "scheduler"),
        ):
            for path in paths:
                variable = only if len(paths) == 1 else re.sub(r"\W", "_", dotted(path))
                keys = "".join(f"[{step!r}]" for step in path)
                whole = root is not None and is_module(at(root, path))
                lines.append(
                    f"{variable} = checkpoint{keys}"
                    if whole
                    else f"{variable}.load_state_dict(checkpoint{keys})"
                )
        return "\n".join(lines)


class Plain(TrainingDictionary):
    """The training dictionary of a plain loop, which has no row: its keys are anybody's."""

    def __init__(self) -> None:
        super().__init__(None)

    def detect(self, raw: RawTree) -> Detection | None:
        """By entries that are a model or an optimizer; a last resort where there are only tensors."""
        if not isinstance(raw.root, DictNode) or raw.root.kind == DIRECTORY:
            return None
        found = survey(raw.root)
        keys = [dotted(path) or "the whole file" for path in (*found.models, *found.optimizers)]
        if found.optimizers:
            return Detection(score=60, evidence=f"a training dictionary: {', '.join(keys)}")
        if () in found.models:
            return Detection(score=10, evidence="a dictionary with tensors in it")
        if found.models:
            return Detection(score=50, evidence=f"a dictionary with a model: {', '.join(keys)}")
        return None


_PLAIN = "dictionary of a plain training loop: model, optimizer, scheduler, counters"

_PRODUCERS = {
    "legacy": "PyTorch before 1.6, or a later one asked for its format",
    "tar": "PyTorch 0.1.9 or before",
    "torchscript": "PyTorch, torch.jit.save",
}


def provenance(
    raw: RawTree, dialect: str, evidence: Detection | None, *, producer: str | None = None
) -> Provenance:
    """What a PyTorch file tells of its origin."""
    return Provenance(
        format=raw.format,
        dialect=dialect,
        evidence=evidence.evidence if evidence is not None else "",
        source=PurePath(raw.location).name,
        producer=producer or _PRODUCERS.get(str(raw.attributes.get("container")), "PyTorch"),
    )


def trained(params: Mapping[str, Param], optimizers: tuple[Optimizer, ...]) -> dict[str, Param]:
    """The parameters, those that an optimizer is known to hold marked as trained."""
    held = {name for o in optimizers if o.param_order != "unknown" for name in o.params}
    return {
        name: replace(param, trainable=True) if name in held and param.trainable is None else param
        for name, param in params.items()
    }


def _lift_models(root: DictNode, paths: tuple[Path, ...], lifter: Lifter) -> tuple[Module, ...]:
    """The models: the only one, or only one under a usual key, has bare names, others their key before."""
    usual = [path for path in paths if path and path[-1] in torch_keys.MODEL]
    bare = paths[0] if len(paths) == 1 else usual[0] if len(usual) == 1 else None
    for prefixed in (bare, None):
        seen: dict[object, str] = {}
        modules = []
        for path in paths:
            node = loose(root) if path == () else at(root, path)
            prefix = "" if path == prefixed else f"{dotted(path)}."
            modules.append(lift_module(node, path, lifter, prefix=prefix, seen=seen))
        if len({name for m in modules for name in m.params}) == sum(len(m.params) for m in modules):
            break
    return tuple(modules)


def _lift_optimizers(
    root: DictNode,
    paths: tuple[Path, ...],
    modules: tuple[Module, ...],
    lifter: Lifter,
    rule: Callable[[DictNode], GroupRule | None] | None,
) -> tuple[tuple[Optimizer, ...], tuple[str, ...]]:
    optimizers: list[Optimizer] = []
    oddities: list[str] = []
    for path, name in zip(paths, unit_names(paths, "optimizer"), strict=True):
        mine = [m for m in modules if len(modules) > 1 and same_owner(m.key, path)] or list(modules)
        raw_names = {raw: param for m in mine for raw, param in m.raw_names.items()}
        sets: list[Mapping[str, Param]] = [m.params for m in mine]
        if len(mine) > 1:
            sets.append({n: p for m in mine for n, p in m.params.items()})
        node = at(root, path)
        assert isinstance(node, DictNode)
        told = rule(node) if rule is not None else None
        optimizer, odd = lift_optimizer(node, path, name, tuple(sets), raw_names, lifter, told)
        optimizers.append(optimizer)
        oddities += odd
    return tuple(optimizers), tuple(oddities)


def _lift_schedules(
    root: DictNode, paths: tuple[Path, ...], optimizers: tuple[Optimizer, ...], lifter: Lifter
) -> tuple[tuple[Schedule, ...], tuple[str, ...]]:
    schedules: list[Schedule] = []
    oddities: list[str] = []
    for path, name in zip(paths, unit_names(paths, "scheduler"), strict=True):
        node = at(root, path)
        assert isinstance(node, DictNode)
        owners = [o for o in optimizers if len(optimizers) == 1 or same_owner((o.name,), path)]
        schedule, odd = lift_schedule(node, path, name, owners[0] if len(owners) == 1 else None, lifter)
        schedules.append(schedule)
        oddities += odd
    return tuple(schedules), tuple(oddities)


def unit_names(paths: tuple[Path, ...], only: str) -> tuple[str, ...]:
    """The name of the only one, or each one's own."""
    return (only,) if len(paths) == 1 else tuple(dotted(path) for path in paths)


def blocks(
    root: DictNode, extras: Mapping[str, TensorRef], chosen: Callable[[str], bool]
) -> tuple[Block, ...]:
    """The entries under chosen keys, one block for each of those in a dictionary."""
    found: list[Block] = []
    for key, node in root.items:
        if not isinstance(key, str) or not chosen(key):
            continue
        inner = [k for k in node.keys if isinstance(k, str)] if isinstance(node, DictNode) else []
        for name in [f"{key}/{k}" for k in inner] or [key]:
            tensors = tuple(t for t in extras if t == name or t.startswith(f"{name}/"))
            found.append(Block(name=name, library=_library(name, tensors, extras), tensors=tensors))
    return tuple(found)


def _library(name: str, tensors: tuple[str, ...], extras: Mapping[str, TensorRef]) -> str:
    said = words((name,))
    for word, library in torch_keys.LIBRARIES:
        if word in said and not (word == "random" and "state" not in said):
            return library
    lengths = {extras[t].spec.nbytes for t in tensors}
    return "torch-cpu" if lengths == {torch_keys.TORCH_CPU_RNG_NBYTES} else "unknown"


def filled_with(root: DictNode, paths: tuple[Path, ...], settled: Checkpoint) -> DictNode:
    """A residue with the values and the note of a document; `paths`: where its optimizers stand.

    Raises: what `rebuild_state` and `fill` raise, all at once.
    """
    problems: list[CkptError] = []
    for path, name in zip(paths, unit_names(paths, "optimizer"), strict=True):
        try:
            root = _rebuilt(root, path, settled.optimizer(name))
        except KeyError:
            continue  # fill() names every value that the document lacks
        except CkptError as error:
            problems.append(error)
    if problems:
        raise MappingError(*(problem for error in problems for problem in error.problems))
    filled = with_layouts(fill(root, settled), root)
    assert isinstance(filled, DictNode)
    return with_note(filled, note_of(settled, root))


def _rebuilt(root: DictNode, path: Path, optimizer: Optimizer) -> DictNode:
    """The residue with the state entries of the optimizer at `path` as the document has them."""

    layouts = {
        str(lifted.to[1]): {"strides": lifted.encoding["strides"]}
        for _, lifted in places(root)
        if lifted.to[0] == "param" and "strides" in lifted.encoding
    }

    def change(here: Path, node: Node) -> Node:
        if here != path or not isinstance(node, DictNode):
            return node
        return rebuild_state(node, optimizer, path, layouts)

    result = transform(root, change)
    assert isinstance(result, DictNode)
    return result


def _fresh(source: Checkpoint) -> Checkpoint | None:
    """The template that a run of torch's is for itself. Its counters are ours: of what is completed."""
    raw = plain_dictionary(source)
    if raw is None:
        return None
    template = Plain().lift(raw)
    assert template.residue is not None

    def count(_: Path, node: Node) -> Node:
        if not isinstance(node, Lifted) or "raw" not in node.encoding:
            return node
        return Lifted(to=node.to, encoding={"plus": 0})

    return replace(template, residue=replace(template.residue, root=transform(template.residue.root, count)))


register(Plain(), fresh=_fresh)
for _row in ROWS:
    register(TrainingDictionary(_row))
