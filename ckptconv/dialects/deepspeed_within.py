"""A DeepSpeed folder in that of a trainer: `global_step<N>/` of the Trainer, `pytorch_model/` of accelerate.

The trainer keeps its counters, a schedule of its own and generators; DeepSpeed the model, the optimizer and
the counters of its engine. Such a folder is one run: what is DeepSpeed's is read by its dialect, and stands
in the residue under the folder's name as that dialect has it. Of several such folders the one is the run's
that the file `latest` names; the others stay what they are. `--select <folder>` takes DeepSpeed's part alone.
Source: transformers 5.24 `trainer.py` `_save_optimizer_and_scheduler`; accelerate 1.15 `accelerator.py`
`save_state`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ckptconv.dialects.deepspeed import DeepSpeed
from ckptconv.dialects.deepspeed_places import scattered
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_counters import settle_counters
from ckptconv.dialects.torch_folder_parts import lift_copies
from ckptconv.dialects.torch_lower import is_carried
from ckptconv.dialects.torch_optimizer import is_optimizer
from ckptconv.dialects.torch_plain import filled_with
from ckptconv.dialects.torch_table import DEEPSPEED
from ckptconv.document import Block, Checkpoint, Fact, Optimizer, Param, Progress, Residue, Schedule
from ckptconv.errors import CkptError, FormatError
from ckptconv.formats.torch_folder import DIRECTORY
from ckptconv.rawtree import DictNode, Node, Path, RawTree
from ckptconv.tensor import TensorRef

TAG = "deepspeed"
"""Attribute of the residue: the folder's name."""

_LATEST = "latest"
_MODEL = re.compile(r"([^/]+)/[^/]*mp_rank_\d+_model_states\.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What DeepSpeed left in a trainer's folder."""

    tag: str
    run: Checkpoint
    beside: DictNode
    """The trainer's folder without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Model and optimizers of a trainer's folder, whoever wrote them."""

    params: Mapping[str, Param]
    optimizers: tuple[Optimizer, ...]
    extras: Mapping[str, TensorRef]
    described: tuple[Block, ...]
    oddities: tuple[str, ...]
    progress: Progress | None = None
    """What the engine counts."""
    schedules: tuple[Schedule, ...] = ()
    loss_scaling: Mapping[str, Fact] = field(default_factory=dict)
    engine: Engine | None = None

    @classmethod
    def of_engine(cls, engine: Engine, root: DictNode, lifter: Lifter) -> Held:
        """The engine's part of the run; weights that the trainer exported beside it are copies."""
        run = engine.run
        copies = lift_copies(root, engine.tag, run.params, lifter)
        said = (
            f"Model, optimizer and loss scale are those of '{engine.tag}', DeepSpeed's part of the folder; "
            f"--select {engine.tag} takes it alone."
        )
        return cls(
            params=run.params,
            optimizers=run.optimizers,
            extras=run.extras,
            described=run.described,
            oddities=(said, *copies, *run.oddities),
            progress=run.progress,
            schedules=run.schedules,
            loss_scaling=run.loss_scaling,
            engine=engine,
        )

    def residue(self, rest: Node, raw: RawTree, dialect: str) -> Residue:
        """The residue of the folder: what is left of the trainer's files, and the engine's under its name."""
        attributes = dict(raw.attributes)
        if self.engine is not None and isinstance(rest, DictNode) and self.engine.run.residue is not None:
            rest = replace(rest, items=(*rest.items, (self.engine.tag, self.engine.run.residue.root)))
            attributes[TAG] = self.engine.tag
        return Residue(format=raw.format, dialect=dialect, root=rest, attributes=attributes)


def engine_in(root: DictNode, raw: RawTree) -> Engine | None:
    """DeepSpeed's part of a trainer's folder; None where there is none. I/O: reads 0-d counters, `latest`.

    Raises: checkpoint-ambiguous, and what the dialect raises.
    """
    tag = _tag(root)
    if tag is None:
        return None
    begin = f"{tag}/"
    inner: list[tuple[Node, Node]] = []
    outer: list[tuple[Node, Node]] = []
    for name, node in root.items:
        if isinstance(name, str) and name.startswith(begin):
            inner.append((name.removeprefix(begin), node))
        else:
            outer.append((name, node))
    part = RawTree(
        format=raw.format, root=DictNode(items=tuple(inner), kind=DIRECTORY), location=raw.location
    )
    try:
        run = DeepSpeed().lift(part)
    except CkptError as error:
        raise type(error)(*(replace(p, loc=(tag, *p.loc)) for p in error.problems)) from None
    return Engine(tag=tag, run=run, beside=replace(root, items=tuple(outer)))


def _tag(root: DictNode) -> str | None:
    tags = {told[1] for name in root.keys if isinstance(name, str) and (told := _MODEL.fullmatch(name))}
    if len(tags) < 2:
        return next(iter(tags), None)
    named = root.get(_LATEST)
    latest = (
        named.read().tobytes().decode("utf-8", "replace").strip() if isinstance(named, TensorRef) else None
    )
    if latest in tags:
        return latest
    listed = ", ".join(sorted(tags)[:20])
    raise FormatError.of(
        "checkpoint-ambiguous",
        f"DeepSpeed left {len(tags)} folders here, and '{_LATEST}' names none of them: {listed}",
        "Pass --select with one of them, it is read alone, or copy 'latest' again.",
        loc=(_LATEST,),
    )


def lowered(root: Node, paths: tuple[Path, ...], checkpoint: Checkpoint, residue: Residue) -> DictNode:
    """The folder's tree with the values and the note of a document, DeepSpeed's files as they are written.

    `root`: the residue's; `paths`: where the optimizers of the trainer's own files stand.
    Raises: see `filled_with`, `settle_counters`, `scattered`.
    """
    assert isinstance(root, DictNode)
    tag = residue.attributes.get(TAG)
    if not isinstance(tag, str) or not isinstance(node := root.get(tag), DictNode):
        return filled_with(root, paths, checkpoint)
    paths = (*paths, (tag, "optimizer")) if is_optimizer(node.get("optimizer")) else paths
    settled = settle_counters(checkpoint, node, DEEPSPEED)
    followed = replace(root, items=tuple((k, settled if k == tag else v) for k, v in root.items))
    filled = filled_with(followed, paths, checkpoint)
    items: list[tuple[Node, Node]] = []
    for name, part in filled.items:
        if name == tag and isinstance(part, DictNode):
            files = scattered(part, carried=is_carried(checkpoint, root))
            items += [(f"{tag}/{file}", states) for file, states in files.items if isinstance(file, str)]
        else:
            items.append((name, part))
    return replace(filled, items=tuple(items))
