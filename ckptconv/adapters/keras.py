"""Live Keras objects, Keras 3 on TensorFlow or tf_keras: describe them, capture them, restore into them.

TensorFlow itself writes and reads: objects go through `tf.train.Checkpoint(model=, optimizer=)`, so what is
captured is what a file would hold, and what is restored passes `assert_consumed()`. The optimizer of a
compiled model is a part of the model; it is taken where no other is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Protocol

from ckptconv import supply
from ckptconv.adapters.keras_callback import Plateau, curve_of_callback
from ckptconv.adapters.keras_exact import follows_momentum, rules_of, stock_class
from ckptconv.adapters.keras_flow import run_of
from ckptconv.adapters.keras_table import table_of
from ckptconv.adapters.live import (
    DESCRIBED,
    Spill,
    declared,
    of_class,
    restored,
    texts,
    unbuilt,
    undone,
    with_progress,
    with_run,
    writing,
)
from ckptconv.catalog import layers
from ckptconv.catalog.schedule_config import from_keras_config
from ckptconv.catalog.schedule_rates import rate_alone
from ckptconv.catalog.schedule_source import beside_it, described_as
from ckptconv.catalog.schedules import CUSTOM
from ckptconv.conversion import convert
from ckptconv.detect import PathLike, detect_dialect, read_raw
from ckptconv.dialects.base import Dialect
from ckptconv.dialects.graph_bundle import graph_of
from ckptconv.dialects.object_paths import Graph
from ckptconv.document import Checkpoint, Value, module_of
from ckptconv.errors import CkptError, MappingError, missing_extra
from ckptconv.mapping_file import MappingLike
from ckptconv.rawtree import Lifted, RawTree, children
from ckptconv.report import Report
from ckptconv.skeleton import skeleton_of

MODEL, OPTIMIZER = "model", "optimizer"


class Variable(Protocol):
    """A variable of a model."""


class Model(Protocol):
    """A Keras model, as far as it is used here."""

    @property
    def name(self) -> str: ...

    @property
    def built(self) -> bool: ...

    @property
    def trainable_variables(self) -> Sequence[Variable]: ...

    def __call__(self, inputs: object, *, training: bool) -> object: ...


class Layer(Protocol):
    """A Keras layer, as far as it is used here."""

    @property
    def name(self) -> str: ...

    def _flatten_layers(self) -> Iterable[Layer]: ...


class KerasOptimizer(Protocol):
    """A Keras optimizer, as far as it is used here."""

    def get_config(self) -> dict[str, object]: ...


class _Status(Protocol):
    def assert_consumed(self) -> object: ...


class _Root(Protocol):
    """A `tf.train.Checkpoint`."""

    def write(self, file_prefix: str) -> str: ...

    def read(self, save_path: str) -> _Status: ...


def describe(
    model: Model,
    optimizer: KerasOptimizer | None = None,
    *,
    inputs: object = None,
    callback: Plateau | None = None,
    remaining: int | None = None,
) -> Checkpoint:
    """A skeleton of built live objects: names, layer kinds and axes, class, hyperparameters, schedule.

    It serves as `template` or `source_spec`; `ckptconv.write_skeleton` makes a JSON file of it.
    `inputs`: a batch in the structure that the model takes, so that layers are matched by what they take and
    give; the model is traced with its shapes and types, not run.
    `callback`: the `ReduceLROnPlateau` of the run, whose state is in no file. `remaining`: for a schedule of
    a class of one's own, how many of its next rates to note.
    I/O: a temporary TensorFlow checkpoint, removed again.
    Raises: template-unbuilt; usage where the model is compiled with another optimizer; usage,
    unsupported-feature for a callback or a schedule that tells nothing.
    """
    captured = _captured(model, optimizer, Spill(), inputs)
    return skeleton_of(_scheduled(captured, _optimizer_of(model, optimizer), callback, remaining))


def capture(
    model: Model,
    optimizer: KerasOptimizer | None = None,
    *,
    progress: Mapping[str, Value] | None = None,
    callback: Plateau | None = None,
    remaining: int | None = None,
) -> Checkpoint:
    """The state of live objects as a document; `progress` gives the counters that they do not hold.

    `callback`, `remaining`: as for `describe`.
    I/O: a temporary TensorFlow checkpoint that lives as long as the document's tensors.
    Raises: as `describe`; usage for an unknown progress field; target-unwritable.
    """
    captured = _captured(model, optimizer, Spill())
    scheduled = _scheduled(captured, _optimizer_of(model, optimizer), callback, remaining)
    return with_progress(scheduled, progress)


def _scheduled(
    checkpoint: Checkpoint,
    optimizer: KerasOptimizer | None,
    callback: Plateau | None,
    remaining: int | None,
) -> Checkpoint:
    """The document with what a callback keeps, and with a table of rates that nothing else tells."""
    if callback is not None:
        checkpoint = beside_it(checkpoint, curve_of_callback(callback), DESCRIBED)
    if remaining is None or optimizer is None or [s.family for s in checkpoint.schedules] != [CUSTOM]:
        return checkpoint
    told = table_of(_inner(optimizer), remaining)
    return described_as(checkpoint, told.curve, told.base, DESCRIBED)


def restore(
    source: PathLike | Checkpoint,
    model: Model,
    optimizer: KerasOptimizer | None = None,
    *,
    source_spec: PathLike | Checkpoint | None = None,
    mapping: MappingLike | None = None,
    set_: Mapping[str, Value] | None = None,
    allow: Sequence[str] = (),
) -> Report:
    """Put a checkpoint of any framework into built live objects, in place; the report accounts for all of it.

    I/O: two temporary TensorFlow checkpoints.
    Raises: as `ckptconv.convert` and `describe`; nothing is changed then.
    """
    spill = Spill()
    template = _captured(model, optimizer, spill)
    target = spill.path / "restored"
    report = convert(
        source,
        target,
        template=template,
        source_spec=source_spec,
        mapping=mapping,
        set_=texts(set_),
        allow=allow,
    )

    def read(path: Path) -> None:
        _root(model, optimizer).read(str(path)).assert_consumed()

    undone(lambda: read(target), lambda: read(_written_at(spill)))
    return restored(report, model.name, _with_rate(template, _optimizer_of(model, optimizer)))


def _with_rate(template: Checkpoint, optimizer: KerasOptimizer | None) -> Checkpoint:
    """The document of before with the learning rate of now: of what restoring changes, the only argument."""
    rate = None if optimizer is None else _inner(optimizer).get_config().get("learning_rate")
    return supply.set_fields(template, {"learning_rate": rate}) if isinstance(rate, float) else template


def _inner(optimizer: KerasOptimizer) -> KerasOptimizer:
    """The optimizer itself, not the `LossScaleOptimizer` around it."""
    inner: KerasOptimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return inner


def _written_at(spill: Spill) -> Path:
    return spill.path / "captured"


def layers_of(model: Model, inputs: object = None) -> tuple[Checkpoint, dict[str, Layer]]:
    """The document of a built model as `describe` makes it, and the layer that holds each parameter.

    I/O, Raises: as `describe`.
    """
    checkpoint, live, _ = _lifted(model, None, Spill(), inputs)
    return checkpoint, dict(live.holders())


def _captured(
    model: Model, optimizer: KerasOptimizer | None, spill: Spill, inputs: object = None
) -> Checkpoint:
    """The objects' document, with what only they tell: kinds of layers, flags, class, hyperparameters."""
    optimizer = _optimizer_of(model, optimizer)
    checkpoint, _, dialect = _lifted(model, optimizer, spill, inputs)
    if problems := dialect.template_problems(checkpoint):
        raise MappingError(*problems)
    framework = dialect.framework or "keras3"
    if optimizer is None:
        return checkpoint
    inner = _inner(optimizer)
    package = "keras" if framework == "keras3" else "tf_keras"
    config = inner.get_config()
    checkpoint = of_class(checkpoint, stock_class(inner), package, config, rules_of(inner))
    follows = from_keras_config(config.get("learning_rate"))
    if follows is None:
        custom = (replace(schedule, family=CUSTOM) for schedule in checkpoint.schedules)
        return replace(checkpoint, schedules=tuple(custom))
    curve = follows.curve if follows_momentum(inner) else rate_alone(follows.curve)
    return described_as(checkpoint, curve, follows.base, DESCRIBED, follows.named)


def _lifted(
    model: Model, optimizer: KerasOptimizer | None, spill: Spill, inputs: object
) -> tuple[Checkpoint, _Live, Dialect]:
    """What TensorFlow writes of the objects, with kinds of layers, flags, and what a run tells."""
    if not model.built:
        hint = "Run model.build(input_shape), or the model once on a batch."
        raise unbuilt(MODEL, f"the model '{model.name}' has no variables yet", hint)
    tf = _tensorflow()
    root = _root(model, optimizer)
    with writing("model", tf.errors.OpError):
        root.write(str(_written_at(spill)))
    raw = read_raw(_written_at(spill), "tensorflow")
    dialect, _ = detect_dialect(raw)
    checkpoint = dialect.lift(raw)
    spill.keep_for(checkpoint)
    live = _Live(raw, checkpoint, root)
    framework = dialect.framework or "keras3"
    checkpoint = declared(checkpoint, dict(live.layouts(framework)), dict(live.trainable(model)))
    checkpoint = replace(checkpoint, layer_settings=dict(live.settings(framework)))
    if inputs is not None:
        checkpoint = with_run(checkpoint, run_of(model, inputs, dict(live.handles())))
    return checkpoint, live, dialect


def _optimizer_of(model: Model, optimizer: KerasOptimizer | None) -> KerasOptimizer | None:
    """The given optimizer, or the one that the model is compiled with.

    Raises: usage where both are there and differ: the file would hold two.
    """
    compiled: KerasOptimizer | None = getattr(model, "optimizer", None)
    if optimizer is None or compiled is None or optimizer is compiled:
        return optimizer or compiled
    raise CkptError.of(
        "usage",
        f"the model '{model.name}' is compiled with another optimizer ({type(compiled).__name__}) "
        f"than the one given ({type(optimizer).__name__})",
        "Pass model.optimizer, or do not compile the model.",
        loc=(OPTIMIZER,),
    )


def _root(model: Model, optimizer: KerasOptimizer | None) -> _Root:
    """What a training script saves; with the counter that `tf.train.Checkpoint.restore` asks for."""
    parts = {MODEL: model, OPTIMIZER: _optimizer_of(model, optimizer)}
    there = {key: part for key, part in parts.items() if part is not None}
    tf = _tensorflow()
    try:
        root = tf.train.Checkpoint(**there)
    except ValueError as error:
        raise CkptError.of(
            "unsupported-feature",
            f"TensorFlow does not know how to save {' and '.join(there)}: {error}",
            "Run Keras on TensorFlow: KERAS_BACKEND=tensorflow.",
            loc=(MODEL,),
        ) from error
    root.save_counter  # noqa: B018  makes the variable
    found: _Root = root
    return found


class _Live:
    """Which live object each node of a written graph was made of."""

    def __init__(self, raw: RawTree, checkpoint: Checkpoint, root: _Root) -> None:
        graph = graph_of(raw)
        assert graph is not None  # TensorFlow wrote it just now
        self._graph: Graph = graph
        self._names = _param_names(checkpoint)
        self._objects = dict(self._walk(root))

    def _walk(self, root: _Root) -> Iterator[tuple[int, object]]:
        """Along the edges, which have the same names on both sides."""
        view = _tensorflow().train.TrackableView(root)
        pending: list[tuple[int, object]] = [(0, root)]
        seen = {0}
        while pending:
            node, live = pending.pop()
            yield node, live
            parts = view.children(live)
            for edge, child in self._graph.children[node]:
                if child not in seen and edge in parts:
                    seen.add(child)
                    pending.append((child, parts[edge]))

    def _name(self, node: int) -> str | None:
        variable = self._graph.variables.get(node)
        return None if variable is None else self._names.get(variable.key)

    def layouts(self, framework: str) -> Iterator[tuple[str, tuple[str, str, tuple[str, ...]]]]:
        """What each variable is, as far as the catalog knows its layer's class."""
        for node, live in self._objects.items():
            kind = layers.kind_of_class(framework, type(live), live)
            if kind is None:
                continue
            for edge, child in self._graph.children[node]:
                name = self._name(child)
                shape = tuple(getattr(self._objects.get(child), "shape", ()))
                layout = layers.declared(framework, kind, edge, shape)
                if name is not None and layout is not None:
                    yield name, (kind, *layout)

    def settings(self, framework: str) -> Iterator[tuple[str, Mapping[str, float]]]:
        """What each layer computes with beside its variables, as far as the catalog knows its class."""
        for node, live in self._objects.items():
            kind = layers.kind_of_class(framework, type(live), live)
            found = layers.told_settings(framework, kind or "", partial(getattr, live))
            names = (self._name(child) for _, child in self._graph.children[node])
            name = next((name for name in names if name is not None), None)
            if found and name is not None:
                yield module_of(name), found

    def handles(self) -> Iterator[tuple[int, str]]:
        """The id of each parameter's handle, and its name in the document."""
        for node, live in self._objects.items():
            name = self._name(node)
            if name is not None:
                yield id(live.handle), name  # type: ignore[attr-defined]  # a variable

    def holders(self) -> Iterator[tuple[str, Layer]]:
        """Each parameter and the layer that it is an attribute of."""
        for node, live in self._objects.items():
            if not callable(getattr(live, "call", None)):
                continue
            for _, child in self._graph.children[node]:
                name = self._name(child)
                if name is not None:
                    yield name, live  # type: ignore[misc]  # it can be called

    def trainable(self, model: Model) -> Iterator[tuple[str, bool]]:
        """Whether each parameter is trained."""
        trained = {id(variable) for variable in model.trainable_variables}
        for node, live in self._objects.items():
            name = self._name(node)
            if name is not None:
                yield name, id(live) in trained


def _param_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Key of the bundle -> name of the parameter that stands there."""
    root = checkpoint.residue.root if checkpoint.residue is not None else None
    return {
        str(key): str(node.to[1])
        for key, node in children(root)
        if isinstance(node, Lifted) and node.to[0] == "param"
    }


def _tensorflow() -> ModuleType:
    try:
        import tensorflow
    except ImportError as error:
        raise missing_extra("tensorflow", "tensorflow", "ckptconv.keras") from error
    module: ModuleType = tensorflow
    return module
