"""Live Keras objects, Keras 3 on TensorFlow or tf_keras: describe them, capture them, restore into them.

TensorFlow itself writes and reads: objects go through `tf.train.Checkpoint(model=, optimizer=)`, so what is
captured is what a file would hold, and what is restored passes `assert_consumed()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from ckptconv import convert as conversion
from ckptconv.adapters.live import Spill, declared, skeleton, with_optimizer, with_progress
from ckptconv.catalog import layers
from ckptconv.detect import PathLike, detect_dialect, read_raw
from ckptconv.dialects.graph_document import graph_of
from ckptconv.document import Checkpoint, Value
from ckptconv.errors import MappingError, missing_extra
from ckptconv.rawtree import Lifted, children
from ckptconv.report import Report


class Model(Protocol):
    """A Keras model, as far as it is used here."""

    built: bool
    name: str


class KerasOptimizer(Protocol):
    """A Keras optimizer, as far as it is used here."""

    def get_config(self) -> dict[str, object]: ...


def describe(model: Model, optimizer: KerasOptimizer | None = None) -> Checkpoint:
    """A skeleton of built live objects: names, layer kinds and axes, class and hyperparameters.

    It serves as `template` or `source_spec`; `ckptconv.skeleton.write_skeleton` makes a JSON file of it.
    I/O: a temporary TensorFlow checkpoint, removed again.
    Raises: template-unbuilt.
    """
    captured, _ = _captured(model, optimizer)
    return skeleton(captured)


def capture(
    model: Model, optimizer: KerasOptimizer | None = None, *, progress: Mapping[str, Value] | None = None
) -> Checkpoint:
    """The state of live objects as a document; `progress` gives the counters that they do not hold.

    I/O: a temporary TensorFlow checkpoint that lives as long as the document's tensors.
    Raises: template-unbuilt, usage for an unknown progress field.
    """
    captured, _ = _captured(model, optimizer)
    return with_progress(captured, progress, "capture")


def restore(
    source: PathLike | Checkpoint,
    model: Model,
    optimizer: KerasOptimizer | None = None,
    *,
    source_spec: PathLike | Checkpoint | None = None,
    set_: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
) -> Report:
    """Put a checkpoint of any framework into built live objects, in place; the report says what became of each item.

    Raises: as `ckptconv.convert`, and template-unbuilt; nothing is changed then.
    """
    template, spill = _captured(model, optimizer)
    target = spill.path / "restored"
    report = conversion.convert(
        source, target, template=template, source_spec=source_spec, set_=set_, allow=allow
    )
    _checkpoint(model, optimizer).read(str(target)).assert_consumed()  # type: ignore[attr-defined]
    return replace(report, target=model.name)


def _captured(model: Model, optimizer: KerasOptimizer | None) -> tuple[Checkpoint, Spill]:
    """The objects' document, with what only the live objects tell: kinds of layers, class, hyperparameters."""
    if not model.built:
        raise MappingError.of(
            "template-unbuilt",
            f"the model '{model.name}' has no variables yet",
            "Call model.build(input_shape), or the model once on a batch.",
            loc=("model",),
        )
    root = _checkpoint(model, optimizer)
    spill = Spill()
    path = spill.path / "captured"
    root.write(str(path))  # type: ignore[attr-defined]
    raw = read_raw(path, "tensorflow")
    dialect, _ = detect_dialect(raw)
    checkpoint = dialect.lift(raw)
    framework = dialect.framework or "keras3"
    lives = dict(_lives(raw, root))
    checkpoint = declared(checkpoint, dict(_layouts(checkpoint, raw, lives, framework)), {})
    if optimizer is not None:
        checkpoint = with_optimizer(
            checkpoint, type(optimizer).__name__, optimizer.get_config(), "describe"
        )
    return checkpoint, spill


def _checkpoint(model: Model, optimizer: KerasOptimizer | None) -> object:
    tf = _tensorflow()
    return tf.train.Checkpoint(model=model) if optimizer is None else tf.train.Checkpoint(model=model, optimizer=optimizer)


def _lives(raw, root) -> Iterator[tuple[int, object]]:  # type: ignore[no-untyped-def]
    """Node of the written graph -> the live object that it was written for, along the names of edges."""
    tf = _tensorflow()
    view = tf.train.TrackableView(root)
    graph = graph_of(raw)
    assert graph is not None
    pending, seen = [(0, root)], {0}
    while pending:
        node, live = pending.pop()
        yield node, live
        live_children = view.children(live)
        for edge, child in graph.children[node]:
            if child not in seen and edge in live_children:
                seen.add(child)
                pending.append((child, live_children[edge]))


def _layouts(checkpoint, raw, lives, framework):  # type: ignore[no-untyped-def]
    """(parameter name, (kind, role, axes)) of every variable whose layer's class the catalog knows."""
    graph = graph_of(raw)
    assert checkpoint.residue is not None
    names = {
        step: node.to[1]
        for step, node in children(checkpoint.residue.root)
        if isinstance(node, Lifted) and node.to[0] == "param"
    }
    for node, live in lives.items():
        kind = layers.kind_of_class(framework, type(live), live)
        if kind is None:
            continue
        for edge, child in graph.children[node]:
            if child not in graph.variables:
                continue
            name = names.get(graph.variables[child].key)
            shape = checkpoint.params[name].tensor.shape if name else ()
            layout = layers.declared(framework, kind, edge, shape) if name else None
            if layout is not None:
                yield name, (kind, *layout)


def _tensorflow():  # type: ignore[no-untyped-def]
    try:
        import tensorflow
    except ImportError as error:
        raise missing_extra("tensorflow", "tensorflow", "ckptconv.keras") from error
    return tensorflow
