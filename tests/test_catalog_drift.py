"""The optimizer and schedule tables against the installed classes: arguments, defaults, keys of the state."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import numpy as np
import pytest

from ckptconv.catalog import optimizers, schedules
from ckptconv.catalog.optimizer_rows import Row
from ckptconv.catalog.wrappers import wrappers

TORCH = [name for name in optimizers.algorithms() if optimizers.row(name, "torch")]
KERAS = [
    (framework, name)
    for framework in optimizers.FRAMEWORKS[1:]
    for name in optimizers.algorithms()
    if optimizers.row(name, framework)
]
ON = {"momentum": 0.9, "amsgrad": True, "centered": True}
"""What makes every slot of a class exist."""


MOVED = {("nadam", "momentum_product"), ("asgd", "average")}
"""Slots that the first update changes whatever the gradient is."""


def class_of(row: Row) -> Any:
    module, _, name = row.class_name.rpartition(".")
    pytest.importorskip(module.partition(".")[0])
    return getattr(importlib.import_module(module), name)


def row_of(algorithm: str, framework: str) -> Row:
    row = optimizers.row(algorithm, framework)
    assert row is not None
    return row


def check_arguments(row: Row, cls: Any) -> None:
    parameters = inspect.signature(cls).parameters
    for name, entry in row.hyperparameters.items():
        if entry.argument is None:
            continue
        if entry.argument in ("decay", "schedule_decay"):  # taken from **kwargs by the legacy classes
            assert cls(**{entry.argument: 0.25}).get_config()["decay"] == 0.25
            continue
        default = parameters[entry.argument].default
        assert (default if entry.index is None else default[entry.index]) == entry.default, name


def arguments(row: Row) -> dict[str, Any]:
    """The class with all its slots."""
    return {ON_NAME: value for ON_NAME, value in ON.items() if ON_NAME in row.slot_conditions.values()}


@pytest.mark.parametrize("algorithm", TORCH)
def test_torch(algorithm: str) -> None:
    torch = pytest.importorskip("torch")
    row = row_of(algorithm, "torch")
    cls = class_of(row)
    check_arguments(row, cls)
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = cls([weight], **arguments(row))
    weight.grad = torch.full((2, 3), 0.5)
    if algorithm == "schedule_free_adamw":
        optimizer.train()
    if algorithm == "sparse_adam":
        weight.grad = weight.grad.to_sparse()
    optimizer.step((lambda: torch.tensor(1.0)) if algorithm == "lbfgs" else None)
    state = optimizer.state_dict()
    (group,), (slots,) = state["param_groups"], state["state"].values()
    for name, entry in row.hyperparameters.items():
        if entry.optional:
            continue
        assert entry.key in group, name
        assert entry.index is None or len(group[entry.key]) > entry.index
    due = {key for slot, key in row.slots.items() if row.slot_shapes.get(slot) != "vectors"}
    step = {row.step_key} if row.step_key and not row.step_in_group else set()
    assert row.step_key in group if row.step_in_group else True
    assert due | step == set(slots) - row.other_keys
    assert row.other_keys <= {*slots, "al"}
    for slot, key in row.slots.items():
        if key in slots:
            kind = row.slot_shapes.get(slot, "param")
            assert optimizers.shape_of_slot(kind, (2, 3)) == tuple(slots[key].shape), slot
    keys = {key: value for key, value in group.items() if key != "params"}
    assert optimizers.infer("torch", frozenset(set(slots) - {row.step_key}), keys) == (algorithm,)


def test_torch_ships_nothing_that_the_catalog_lacks() -> None:
    torch = pytest.importorskip("torch")
    known = {row_of(name, "torch").class_name for name in TORCH}
    found = {
        f"torch.optim.{name}"
        for name in dir(torch.optim)
        if isinstance(cls := getattr(torch.optim, name), type)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
    }
    assert found == {name for name in known if name.startswith("torch.")}


def steps_done(framework: str, optimizer: Any) -> tuple[Any, Any]:
    """One update of one variable: the variable, and the module that has `Checkpoint`."""
    tf = pytest.importorskip("tensorflow")
    if framework == "keras3":
        keras = pytest.importorskip("keras")
        variable = keras.Variable(np.ones((2, 3), np.float32), name="kernel")
        optimizer.apply([tf.fill((2, 3), 0.5)], [variable])
    else:
        variable = tf.Variable(np.ones((2, 3), np.float32), name="kernel")
        optimizer.apply_gradients([(tf.fill((2, 3), 0.5), variable)])
    return variable, tf


@pytest.mark.parametrize(("framework", "algorithm"), KERAS)
def test_keras(framework: str, algorithm: str, tmp_path: Any) -> None:
    row = row_of(algorithm, framework)
    pytest.importorskip("tensorflow")
    cls = class_of(row)
    check_arguments(row, cls)
    optimizer = cls(**arguments(row))
    variable, tf = steps_done(framework, optimizer)
    path = tf.train.Checkpoint(optimizer=optimizer, v=variable).write(str(tmp_path / "c"))
    keys = [name for name, _ in tf.train.list_variables(path)]
    stored = {m[1] for key in keys if (m := re.match(r"optimizer/(\w+)/\.ATTRIBUTES", key))}
    assert row.step_key in stored
    known = {entry.key for entry in row.hyperparameters.values() if entry.key} | set(row.scalars.values())
    assert known == stored - {row.step_key}
    if framework == "tf_keras_legacy":
        assert set(row.slots.values()) == set(optimizer.get_slot_names())
        names = [v.name for v in optimizer.variables()[1:] if not v.name.endswith("momentum_cache:0")]
        found = {name.rpartition("/")[2].partition(":")[0] for name in names}
        scopes = {name.partition("/")[0] for name in names}
    else:
        lists = {
            slot: [v for v in getattr(optimizer, edge) if v is not None] for slot, edge in row.slots.items()
        }
        for slot, entries in lists.items():
            kind = row.slot_shapes.get(slot, "param")
            due = optimizers.shape_of_slot(kind, (2, 3))
            assert kind in ("part", "vectors") or [tuple(v.shape) for v in entries] == [due], slot
        if framework == "keras3":
            names = [v.path for entries in lists.values() for v in entries]
            found = {name.partition("kernel_")[2] for name in names} - {""}
            scopes = {re.sub(r"_\d+$", "", name.partition("/")[0]) for name in names}
        else:
            names = [v.name for entries in lists.values() for v in entries]
            found = {name.split("/")[-2] for name in names}
            scopes = {optimizer.name}
    assert found == {v for s, v in row.slot_variables.items() if row.slot_shapes.get(s) != "part"}
    assert scopes == {row.scope}
    edges = frozenset({*row.slots.values(), *row.scalars.values()})
    assert optimizers.infer(framework, edges, dict.fromkeys(stored, 0.0), row.scope) == (algorithm,)


def first_value(row: Row, slot: str, param: float) -> object:
    """What the table says of a slot before the first update, of a class with its default arguments."""
    init = row.slot_inits[slot]
    if isinstance(init, str):
        return param if init == "param" else row.hyperparameters[init].default
    return init


@pytest.mark.parametrize(("framework", "algorithm"), KERAS)
def test_a_slot_begins_as_the_table_says(framework: str, algorithm: str) -> None:
    tf = pytest.importorskip("tensorflow")
    row = row_of(algorithm, framework)
    optimizer = class_of(row)(**arguments(row))
    value = np.full((2, 3), 0.75, np.float32)
    variable = pytest.importorskip("keras").Variable(value) if framework == "keras3" else tf.Variable(value)
    if framework == "tf_keras_legacy":
        optimizer._create_all_weights([variable])
        slots = {slot: optimizer.get_slot(variable, key) for slot, key in row.slots.items()}
    else:
        optimizer.build([variable])
        slots = {slot: getattr(optimizer, key)[0] for slot, key in row.slots.items()}
    for slot, held in slots.items():
        if held is not None:
            np.testing.assert_allclose(held.numpy(), first_value(row, slot, 0.75), rtol=1e-6)


@pytest.mark.parametrize("algorithm", TORCH)
def test_a_torch_slot_begins_as_the_table_says(algorithm: str) -> None:
    """Without a gradient to speak of, what the first update leaves is what it began with."""
    torch = pytest.importorskip("torch")
    row = row_of(algorithm, "torch")
    if algorithm == "lbfgs":
        return  # its state is no parameter's
    weight = torch.nn.Parameter(torch.full((2, 3), 0.75))
    weight.grad = torch.zeros(2, 3)
    if algorithm == "sparse_adam":
        weight.grad = weight.grad.to_sparse()
    decay = {"weight_decay": 0.0} if "weight_decay" in row.hyperparameters else {}
    optimizer = class_of(row)([weight], **arguments(row), **decay)
    if algorithm == "schedule_free_adamw":
        optimizer.train()
    optimizer.step()
    (state,) = optimizer.state.values()
    for slot, key in row.slots.items():
        if key in state and (algorithm, slot) not in MOVED:
            np.testing.assert_allclose(
                torch.as_tensor(state[key]).numpy(), first_value(row, slot, 0.75), rtol=1e-6, atol=2e-8
            )


@pytest.mark.parametrize("framework", optimizers.FRAMEWORKS[1:])
def test_keras_ships_nothing_that_the_catalog_lacks(framework: str) -> None:
    pytest.importorskip("tensorflow")
    ours = {row.class_name for name in optimizers.algorithms() if (row := optimizers.row(name, framework))}
    module_name = row_of("adam", framework).class_name.rpartition(".")[0]
    pytest.importorskip(module_name.partition(".")[0])
    module = importlib.import_module(module_name)
    base = module.Optimizer
    found = {
        f"{module_name}.{name}"
        for name in dir(module)
        if isinstance(cls := getattr(module, name), type) and issubclass(cls, base) and cls is not base
    }
    wrappers = {f"{module_name}.{name}" for name in ("LossScaleOptimizer", "MultiOptimizer")}
    assert found - wrappers == ours


@pytest.mark.parametrize("name", schedules.families())
def test_schedules(name: str) -> None:
    torch = pytest.importorskip("torch")
    family = schedules.family(name)
    assert family is not None
    arguments: list[dict[str, Any]] = [
        {},
        {"step_size": 2},
        {"milestones": [2, 3]},
        {"gamma": 0.9},
        {"T_max": 5},
        {"T_0": 5},
        {"lr_lambda": lambda epoch: 1.0},
        {"base_lr": 0.1, "max_lr": 1.0},
        {"max_lr": 1.0, "total_steps": 10},
        {"swa_lr": 0.1},
    ]
    for path in family.classes:
        module, _, cls_name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), cls_name)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
        parts = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
        made = None
        for more in [*arguments, {"schedulers": parts}, {"schedulers": parts, "milestones": [3]}]:
            try:
                made = cls(**more) if cls_name == "ChainedScheduler" else cls(optimizer, **more)
                break
            except TypeError:
                continue
        assert made is not None, path
        assert schedules.infer(made.state_dict().keys()) == name


@pytest.mark.parametrize("framework", ["torch", "keras3", "tf_keras", "tf_keras_legacy"])
def test_what_stands_around_an_optimizer_is_called_so(framework: str) -> None:
    """Scalers and their arguments, state keys of torch's, and the arguments of Keras' optimizers."""
    table = wrappers(framework)
    assert table is not None
    package, *parts = table.scaler.class_name.split(".")
    scaler: Any = pytest.importorskip(package)
    for part in parts:
        scaler = getattr(scaler, part)
    if framework == "torch":
        assert set(scaler("cpu").state_dict()) == set(table.scaler.keys.values())
        assert set(table.scaler.arguments.values()) <= set(inspect.signature(scaler).parameters)
        return
    optimizers = importlib.import_module(package).optimizers
    optimizer = (optimizers.legacy if framework == "tf_keras_legacy" else optimizers).SGD(0.1)
    wrapped = scaler(optimizer, **dict.fromkeys(table.scaler.arguments.values(), 4))
    config = wrapped.get_config()
    assert set(table.scaler.arguments.values()) <= config.keys()
    for setting, argument in table.arguments.items():
        value = {"ema_momentum": 0.5}.get(setting, 1)
        more = {"use_ema": True} if setting.startswith("ema_") else {}
        assert getattr(type(optimizer)(0.1, **{argument: value}, **more), argument) == value
