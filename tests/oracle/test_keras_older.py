"""Object graphs of Keras 3 before 3.10: another edge for the counter, slot lists that are saved empty.

A graph of today's TensorFlow and Keras with what those versions save otherwise; files of the versions
themselves are among the fixtures (`keras-3.3-amsgrad`, `keras-3.6-nadam`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import ckptconv  # noqa: E402
from ckptconv.catalog.optimizer_rows import algorithms, row  # noqa: E402
from ckptconv.detect import detect_dialect, read_raw  # noqa: E402
from ckptconv.document import value_of  # noqa: E402
from ckptconv.formats.object_graph import OBJECT_GRAPH_KEY, ObjectGraph  # noqa: E402
from ckptconv.formats.string_tensor import of_strings, read_strings  # noqa: E402
from ckptconv.rawtree import DictNode, RawTree  # noqa: E402
from tests.support.keras_zoo import ZOO, check, compiled, state, stored  # noqa: E402

ARGUMENTS = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.9}}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, ARGUMENTS.get(name, {})) for name in algorithms() if row(name, "keras3") is not None),
    ("adam", {"amsgrad": True}),
    ("adam", {"use_ema": True}),
    ("rmsprop", {}),
    ("rmsprop", {"centered": True}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
]


def made(name: str, arguments: dict[str, Any], step: int = 3) -> Any:
    known = row(name, "keras3")
    assert known is not None
    make = getattr(keras.optimizers, known.class_name.rpartition(".")[2])
    return compiled(keras, ZOO["mlp"](keras), make(0.01, **arguments), step)


def as_before(raw: RawTree, optimizer: str, *, first: bool) -> RawTree:
    """The tree with the optimizer's graph as older versions save it; `first`: as those up to 3.4."""
    root = raw.root
    assert isinstance(root, DictNode)
    items = dict(root.items)
    graph = ObjectGraph.parse(read_strings(items[OBJECT_GRAPH_KEY], ())[0])
    node = graph.find((optimizer,))
    assert node is not None
    nodes, edges = list(graph.nodes), graph.nodes[node].children
    for edge in edges:
        if edge.name.startswith("_model_variables") or edge.name in ("_variables", "_trainable_variables"):
            continue
        if nodes[edge.node].children:
            nodes[edge.node] = replace(nodes[edge.node], children=())
    if first:
        renamed = tuple(e._replace(name="iterations") if e.name == "_iterations" else e for e in edges)
        nodes[node] = replace(nodes[node], children=renamed)
    items[OBJECT_GRAPH_KEY] = of_strings([ObjectGraph(nodes=tuple(nodes)).serialize()])
    return replace(raw, root=replace(root, items=tuple(items.items())))


@pytest.mark.parametrize("first", [True, False], ids=["3.3", "3.6"])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_slots_that_no_list_names(name: str, arguments: dict[str, Any], first: bool, tmp_path: Path) -> None:
    model = made(name, arguments)
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "run"))
    raw = as_before(read_raw(saved), "optimizer", first=first)
    dialect, _ = detect_dialect(raw)
    run = dialect.lift(raw)
    (own,) = run.optimizers
    assert (dialect.name, own.algorithm, value_of(run.progress.step)) == ("keras3", name, 3)
    slots = {slot: by for slot, by in own.slots.items() if slot != "moving_average"}
    check(replace(run, optimizers=(replace(own, slots=slots),)), model)
    assert slots
    assert ("moving_average" in own.slots) is ("use_ema" in arguments)


def test_a_file_of_keras_3_3_goes_on_in_todays(tmp_path: Path) -> None:
    """The counter under another edge: today's Keras restores it by its number among the variables alone."""
    case = Path(__file__).resolve().parents[2] / "fixtures/keras3/keras-3.3-amsgrad/artifact/ckpt-1"
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(4), layers.Dense(2)]
    )
    compiled(keras, model, keras.optimizers.Adam(0.01, amsgrad=True), step=0)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    ckptconv.convert(case, tmp_path / "out-1", template=checkpoint.save(str(tmp_path / "fresh")))
    for variable in (*stored(model.variables), *state(model.optimizer)):
        variable.assign(np.full(tuple(variable.shape), -1))
    checkpoint.restore(str(tmp_path / "out-1")).assert_consumed()
    assert int(model.optimizer.iterations) == 4
    assert float(model.optimizer.learning_rate) == pytest.approx(0.003)
    run = ckptconv.open(case)
    check(run, model)
    # Keras 3.3's own bundle back from today's: the edge and the empty lists are the template's
    ckptconv.convert(tmp_path / "out-1", tmp_path / "back-1", template=case)
    again = ckptconv.open(tmp_path / "back-1")
    assert value_of(again.progress.step) == 4
    check(again, model)
