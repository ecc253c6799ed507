"""The checkpoint of a Lightning trainer (`*.ckpt`, a torch zip).

    {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops": {"fit_loop": {..}, ..},
     "callbacks": {..}, "optimizer_states": [..], "lr_schedulers": [..], "MixedPrecision": {..}?,
     "hparams_name", "hyper_parameters": {..}, ..}

Its counters and their conventions stand in `lightning_loops`. `save_weights_only` leaves callbacks,
optimizers and schedulers out. Several optimizers keep their order as names; which one a schedule moves is not
stored and told by its rates, where they tell. Callbacks, hyperparameters and what modules added are kept.
Lightning stores no random generator. Writing needs a file of the target's trainer (or the run's own) as
template. Refused: state_dicts with a name twice, groups that contradict themselves.
Source: Lightning 2.6.6 `trainer/connectors/checkpoint_connector.py` `dump_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.catalog.schedule_source import with_epochs
from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.lightning_loops import FIT, VERSION, read_loops, with_steps
from ckptconv.dialects.lightning_settle import settle_loops
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_averages import with_averages
from ckptconv.dialects.torch_lower import settle
from ckptconv.dialects.torch_modules import Module, lift_module
from ckptconv.dialects.torch_note import lift_note
from ckptconv.dialects.torch_objects import named_code, refuse_repeated_keys
from ckptconv.dialects.torch_optimizer import is_optimizer, lift_optimizer
from ckptconv.dialects.torch_plain import filled_with, provenance, trained, unit_names
from ckptconv.dialects.torch_scaler import lift_scaling
from ckptconv.dialects.torch_scheduler import is_scheduler, lift_schedule
from ckptconv.dialects.torch_survey import scalers
from ckptconv.dialects.torch_table import LIGHTNING
from ckptconv.dialects.torch_values import lift_rest, number_of, own_residue
from ckptconv.document import Block, Checkpoint, Optimizer, Residue, Schedule, value_of
from ckptconv.errors import FormatError, MappingError, Problem
from ckptconv.rawtree import DictNode, ListNode, Node, Path, RawTree, at
from ckptconv.tensor import TensorRef

_CURRENT = "current_model_state"
_LOADER: Path = (*FIT, "state_dict", "combined_loader")
"""States of loaders that can tell theirs."""


class Lightning:
    """One file of `Trainer.save_checkpoint` or `ModelCheckpoint`."""

    name = LIGHTNING.name
    format = "pytorch"
    framework: str | None = "torch"
    needs_template = True
    save_counter: str | None = None
    summary = LIGHTNING.summary

    def detect(self, raw: RawTree) -> Detection | None:
        """By the version that Lightning writes beside the model."""
        root = raw.root
        if not isinstance(root, DictNode) or not isinstance(root.get("state_dict"), DictNode):
            return None
        if not isinstance(version := root.get(VERSION), str):
            return None
        return Detection(
            score=LIGHTNING.signature.score, evidence=f"'{VERSION}' is {version[:20]}, beside state_dict"
        )

    def lift(self, raw: RawTree) -> Checkpoint:
        """The training run. I/O: reads 0-d counters. Raises: duplicate-key, corrupt-file, unknown-dialect."""
        root = raw.root
        key = _model(root) if isinstance(root, DictNode) else ""
        state = root.get(key) if isinstance(root, DictNode) else None
        if not isinstance(root, DictNode) or not isinstance(state, DictNode):
            raise FormatError.of(
                "unknown-dialect", "the file holds no state_dict", "See: ckptconv inspect --raw.", loc=()
            )
        refuse_repeated_keys(root)
        lifter = Lifter(root)
        module = lift_module(state, (key,), lifter)
        optimizers, odd = _optimizers(root, module, lifter)
        optimizers = with_steps(root, optimizers)
        schedules, odd_schedules = _schedules(root, optimizers, lifter)
        progress, odd_progress = read_loops(root, optimizers, schedules, lifter)
        schedules = tuple(with_epochs(schedule, progress) for schedule in schedules)
        scaling = lift_scaling(scalers(root, LIGHTNING), lifter)
        extras = lift_rest(root, lifter, module.parts)
        checkpoint = Checkpoint(
            progress=progress,
            params=trained(module.params, optimizers),
            optimizers=optimizers,
            schedules=schedules,
            loss_scaling=scaling,
            data=_loaders(root, extras),
            extras=extras,
            described=module.described,
            residue=Residue(
                format=self.format, dialect=self.name, root=lifter.residue(), attributes=raw.attributes
            ),
            provenance=provenance(raw, self.name, self.detect(raw), producer=_producer(root)),
            oddities=(
                *odd,
                *(text for s in schedules if s.unit == "unknown" for text in odd_schedules[s.name]),
                *odd_progress,
                *named_code(root),
            ),
        )
        return lift_note(with_averages(checkpoint), root)

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The template's file (or the run's own) with the document's values."""
        root = own_residue(checkpoint, self.name)
        residue = checkpoint.residue
        if not isinstance(root, DictNode) or residue is None:
            raise MappingError.of(
                "template-required",
                "a Lightning checkpoint needs a template: its loops and callbacks are the trainer's own",
                "Pass --template with a checkpoint of the target's trainer.",
                loc=("residue",),
            )
        settled, followed = settle_loops(settle(checkpoint, root), root)
        assert isinstance(followed, DictNode)
        filled = filled_with(followed, _paths(root, "optimizer_states"), settled)
        return RawTree(format=self.format, root=filled, attributes=residue.attributes)

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """None: an optimizer that was never stepped has its groups."""
        return ()

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`Trainer.fit` with the file, or `load_from_checkpoint` where there is no run to go on with."""
        if not checkpoint.optimizers:
            return f"model = MyModule.load_from_checkpoint({target!r})"
        return f"trainer.fit(model, ckpt_path={target!r})"


def _model(root: DictNode) -> str:
    """Where the trained weights stand: `WeightAveraging` puts the average of them into `state_dict`."""
    averaged = isinstance(root.get("averaging_state"), DictNode)
    return _CURRENT if averaged and isinstance(root.get(_CURRENT), DictNode) else "state_dict"


def _producer(root: DictNode) -> str:
    version = root.get(VERSION)
    return f"Lightning {version[:20]}" if isinstance(version, str) else "Lightning"


def _paths(root: DictNode, key: str) -> tuple[Path, ...]:
    """Where the optimizers' or schedulers' states stand."""
    states = root.get(key)
    told = is_optimizer if key == "optimizer_states" else is_scheduler
    items = states.items if isinstance(states, ListNode) else ()
    return tuple((key, position) for position, node in enumerate(items) if told(node))


def _optimizers(
    root: DictNode, module: Module, lifter: Lifter
) -> tuple[tuple[Optimizer, ...], tuple[str, ...]]:
    paths = _paths(root, "optimizer_states")
    optimizers: list[Optimizer] = []
    oddities: list[str] = []
    for path, name in zip(paths, unit_names(paths, "optimizer"), strict=True):
        node = at(root, path)
        assert isinstance(node, DictNode)
        optimizer, odd = lift_optimizer(node, path, name, (module.params,), module.raw_names, lifter)
        optimizers.append(optimizer)
        oddities += odd
    return tuple(optimizers), tuple(oddities)


def _schedules(
    root: DictNode, optimizers: tuple[Optimizer, ...], lifter: Lifter
) -> tuple[tuple[Schedule, ...], dict[str, tuple[str, ...]]]:
    """The schedules, and by their names what is odd while it is not known what they count."""
    paths = _paths(root, "lr_schedulers")
    schedules: list[Schedule] = []
    oddities: dict[str, tuple[str, ...]] = {}
    for path, name in zip(paths, unit_names(paths, "scheduler"), strict=True):
        node = at(root, path)
        assert isinstance(node, DictNode)
        owners = [o for o in optimizers if len(optimizers) == 1 or _has_rates(o, node)]
        schedule, odd = lift_schedule(node, path, name, owners[0] if len(owners) == 1 else None, lifter)
        schedules.append(schedule)
        if len(optimizers) > 1 and len(owners) != 1:
            odd = (*odd, f"Which of the {len(optimizers)} optimizers '{name}' moves, its rates do not tell.")
        oddities[name] = odd
    return tuple(schedules), oddities


def _has_rates(optimizer: Optimizer, node: DictNode) -> bool:
    """Whether a scheduler's rates are those of the optimizer's groups."""
    pairs: Mapping[str, str] = {"base_lrs": "base_learning_rate", "_last_lr": "learning_rate"}
    for key, name in pairs.items():
        rates = node.get(key)
        if not isinstance(rates, ListNode):
            continue
        listed = [found[0] if (found := number_of(rate)) is not None else None for rate in rates.items]
        if listed != [value_of(group.hyperparameters.get(name)) for group in optimizer.groups]:
            return False
    return True


def _loaders(root: DictNode, extras: Mapping[str, TensorRef]) -> tuple[Block, ...]:
    node: Node = root
    for step in _LOADER:
        node = node.get(step) if isinstance(node, DictNode) else None
    if not isinstance(node, (DictNode, ListNode)) or not node.items:
        return ()
    name = "/".join(map(str, _LOADER))
    return (
        Block(name=name, library="unknown", tensors=tuple(t for t in extras if t.startswith(f"{name}/"))),
    )


register(Lightning())
