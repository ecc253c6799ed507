"""The neutral document: a run's progress, parameters, optimizers and schedules, in no framework's terms.

Everything is immutable and does no I/O. A document whose tensors are `MissingTensor` is a skeleton.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from ckptconv.rawtree import Node, Path, Scalar
from ckptconv.tensor import Array, MissingTensor, TensorRef

SCHEMA_VERSION = "1.0.0"

Value = bool | int | float | str | None | tuple["Value", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A value and where it comes from."""

    value: Value
    status: Literal["recorded", "derived", "supplied"] = "recorded"
    """`recorded` as stored; `derived` by `formula`; `supplied` by the caller or a skeleton."""
    source: str = ""
    """The source's own key, e.g. `optimizer/_iterations`; for supplied values who supplied it: `--set`,
    `template`, `source-spec`, `embedded note`."""
    formula: str | None = None
    """How a derived value follows from what is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One reading of an ambiguous record."""

    value: Value
    source: str
    condition: str
    """When this reading is the true one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """A value that the source does not tell."""

    reason: str
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """Proved not to be in use."""

    reason: str = ""


Fact = Known | Unknown | Absent


def value_of(fact: Fact | None) -> Value:
    """The value of a known fact, else None."""
    return fact.value if isinstance(fact, Known) else None


NOT_RECORDED = Unknown(reason="the source records none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the run has come. Every field is always there; none is ever a default."""

    step: Fact
    """Completed optimizer updates, of the optimizer named in `step_of` where there are several."""
    epochs: Fact = NOT_RECORDED
    """Completed epochs; may be fractional."""
    batch_in_epoch: Fact = NOT_RECORDED
    """Batches consumed since the epoch began."""
    micro_steps: Fact = NOT_RECORDED
    """Backward passes, counted over the whole run."""
    accumulation: Fact = NOT_RECORDED
    """Backward passes per update."""
    samples: Fact = NOT_RECORDED
    tokens: Fact = NOT_RECORDED
    skipped_steps: Fact = NOT_RECORDED
    """Updates skipped by loss scaling."""
    loss_scale: Fact = NOT_RECORDED
    """The loss scale of the next update."""


PROGRESS_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Progress))

Evidence = Literal["declared", "named", "matched", "assumed", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One reading of what a parameter is."""

    layer: str
    role: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One named array of the model, trainable or not; the key in `Checkpoint.params` is its name."""

    name: str
    tensor: TensorRef
    role: str = "unknown"
    """Canonical role, a key of `roles` in the layer catalog: `kernel`, `bias`, `embeddings`, `gamma`, `beta`,
    `moving_mean`, ...; `buffer`; or `unknown`."""
    layer: str = "unknown"
    """Kind of the layer, a key of `catalog/layers.json`, e.g. `dense`, `conv2d`."""
    axes: tuple[str, ...] | None = None
    """Named axes, e.g. `("out", "in")`; a merged axis is `"in*multiplier"`; None where unknown."""
    evidence: Evidence = "unknown"
    """Why the axes are what they are said to be."""
    candidates: tuple[Layout, ...] = ()
    """Every reading that fits, where the source's names leave more than one open."""
    trainable: bool | None = None
    """None where the source does not tell."""
    tied_to: str | None = None
    """Name of the parameter this one shares its memory with; the first of a tie group has None."""

    def read(self) -> Array:
        """The values, in C order. I/O: reads the whole tensor."""
        return self.tensor.read()


def module_of(name: str) -> str:
    """What a parameter's name begins with: all but its last part."""
    return name[: max(name.rfind("."), name.rfind("/"), 0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A parameter in a run of the model, and what the operation that uses it takes."""

    param: str
    after: tuple[str, ...] = ()
    """Parameters that made what the operation takes, with none between; those that reach it through another
    one are left out."""
    part: str = ""
    """What is done with the result, where it tells one of several alike from the others: `query`, `key` or
    `value` of an attention; of a fused projection all of them, in the order of its output's equal parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that are trained with the same hyperparameters."""

    params: tuple[str, ...]
    hyperparameters: Mapping[str, Fact] = field(default_factory=dict)
    """Canonical name -> value. `learning_rate` is that of the next update, the base rate is unscheduled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """One optimizer's state, by parameter name."""

    name: str
    """`optimizer`, or the source's name where there are several."""
    algorithm: str
    """Key of the catalog; `unknown` where the source does not tell."""
    algorithm_candidates: tuple[str, ...] = ()
    """The catalog entries that fit, where there is more than one."""
    framework: str
    """Column of the catalog that says how the slots are meant: `torch`, `keras3`, `tf_keras`, ..."""
    form: Mapping[str, str] = field(default_factory=dict)
    """Where update rules differ, e.g. `{"epsilon": "corrected", "momentum": "gradient"}`."""
    step: Fact
    """Completed updates of this optimizer."""
    param_steps: Mapping[str, int] = field(default_factory=dict)
    """Completed updates per parameter, where the source counts them so (all of them, equal or not)."""
    groups: tuple[Group, ...] = ()
    slots: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)
    """Canonical slot -> parameter name -> tensor, in the parameter's layout."""
    scalars: Mapping[str, Fact] = field(default_factory=dict)
    """Optimizer-wide numbers other than the step."""
    param_order: Literal["named", "declaration-order", "skeleton", "unknown"] = "unknown"
    """Evidence by which state was matched to parameter names."""

    @property
    def params(self) -> tuple[str, ...]:
        """Names of all its parameters, in group order."""
        return tuple(name for group in self.groups for name in group.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A learning-rate schedule and where it stands."""

    name: str
    family: str
    """`step`, `cosine`, ...; `unknown` where it cannot be told."""
    position: Fact
    unit: Literal["update", "epoch", "micro-step", "unknown"] = "unknown"
    parameters: Mapping[str, Fact] = field(default_factory=dict)
    optimizer: str = "optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """State that stays in its framework: a random generator's, a data loader's."""

    name: str
    """The source's key."""
    library: str
    """`torch-cpu`, `torch-cuda`, `numpy`, `python`, `tensorflow`, `unknown`."""
    tensors: tuple[str, ...] = ()
    """Names in `Checkpoint.extras` of its arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residue:
    """The source's tree with every lifted leaf replaced by `Lifted`: what makes the way back exact."""

    format: str
    dialect: str
    root: Node
    attributes: Mapping[str, Scalar | tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the document comes from. Holds no absolute path."""

    format: str = ""
    dialect: str = ""
    evidence: str = ""
    """Why this dialect was chosen."""
    source: str = ""
    """File or directory name, without its path."""
    producer: str = ""
    """Framework and version, as far as recorded."""
    supplied: tuple[tuple[str, str], ...] = ()
    """(field, who) of everything that was not in the source."""
    history: tuple[str, ...] = ()
    """Conversions this state has been through, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A training run at one moment."""

    progress: Progress
    params: Mapping[str, Param] = field(default_factory=dict)
    """In the source's order."""
    flow: tuple[Site, ...] = ()
    """The parameters in the order in which a run of the model uses them; empty where no run was seen."""
    layer_settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Module -> what it computes with beside its parameters, where it is told: `epsilon`, `momentum` (the
    share of the old average), as the layer catalog's `settings` have them."""
    optimizers: tuple[Optimizer, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    loss_scaling: Mapping[str, Fact] = field(default_factory=dict)
    """What a loss scaler keeps beside the scale: `growth_tracker`, `growth_interval`, ... of
    `catalog/wrappers.json`; empty where the run has none, or its file does not tell."""
    rng: tuple[Block, ...] = ()
    data: tuple[Block, ...] = ()
    extras: Mapping[str, TensorRef] = field(default_factory=dict)
    """Arrays that are neither parameters nor slots (generator states, averages), by the source's key."""
    described: tuple[Block, ...] = ()
    """Parameters that are no plain arrays (quantized, sparse, nested, of a class of their own): what each is
    as its library, its parts among the extras, its structure in the residue."""
    residue: Residue | None = None
    provenance: Provenance = Provenance()
    oddities: tuple[str, ...] = ()
    """What a reader of `inspect` should know, one sentence each."""
    extensions: Mapping[str, object] = field(default_factory=dict)

    @property
    def kind(self) -> Literal["training", "weights"]:
        return "training" if self.optimizers else "weights"

    def optimizer(self, name: str) -> Optimizer:
        """The optimizer of that name; KeyError where there is none."""
        for optimizer in self.optimizers:
            if optimizer.name == name:
                return optimizer
        raise KeyError(name)

    def schedule(self, name: str) -> Schedule:
        """The schedule of that name; KeyError where there is none."""
        for schedule in self.schedules:
            if schedule.name == name:
                return schedule
        raise KeyError(name)

    def lookup(self, address: Path) -> TensorRef | Value:
        """What stands at a `Lifted` address.

        Addresses: `("param", name)`, `("slot", optimizer, slot, param)`, `("param_step", optimizer, param)`,
        `("step", optimizer)`, `("hyperparameter", optimizer, group, name)`, `("scalar", optimizer, name)`,
        `("progress", field)`, `("loss_scaling", name)`, `("position", schedule)`,
        `("schedule", schedule, parameter)`, `("extra", key)`.
        A value is None where the fact is not known; KeyError where there is no such place.
        """
        match address:
            case ("param", str(name)):
                return self.params[name].tensor
            case ("slot", str(optimizer), str(slot), str(param)):
                return self.optimizer(optimizer).slots[slot][param]
            case ("param_step", str(optimizer), str(param)):
                return self.optimizer(optimizer).param_steps[param]
            case ("step", str(optimizer)):
                return value_of(self.optimizer(optimizer).step)
            case ("hyperparameter", str(optimizer), int(group), str(name)):
                return value_of(self.optimizer(optimizer).groups[group].hyperparameters[name])
            case ("scalar", str(optimizer), str(name)):
                return value_of(self.optimizer(optimizer).scalars[name])
            case ("progress", str(name)) if name in PROGRESS_FIELDS:
                return value_of(getattr(self.progress, name))
            case ("loss_scaling", str(name)):
                return value_of(self.loss_scaling[name])
            case ("position", str(schedule)):
                return value_of(self.schedule(schedule).position)
            case ("schedule", str(schedule), str(name)):
                return value_of(self.schedule(schedule).parameters[name])
            case ("extra", str(key)):
                return self.extras[key]
        raise KeyError(address)

    def tensors(self) -> Iterator[tuple[Path, TensorRef]]:
        """Every tensor with its `lookup` address; tied parameters once per name."""
        for name, param in self.params.items():
            yield ("param", name), param.tensor
        for optimizer in self.optimizers:
            for slot, by_param in optimizer.slots.items():
                for name, tensor in by_param.items():
                    yield ("slot", optimizer.name, slot, name), tensor
        for key, tensor in self.extras.items():
            yield ("extra", key), tensor

    @property
    def is_skeleton(self) -> bool:
        """Whether the document has names and shapes but no values."""
        return any(isinstance(tensor, MissingTensor) for _, tensor in self.tensors())
