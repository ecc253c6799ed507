"""What the variables of a name-based TensorFlow checkpoint are, from their names alone.

A key is the variable's op name without `:0`. Beside a variable `V` stand, of the same shape:
- `V/Adam` (m) and `V/Adam_1` (v), `V/Momentum`, `V/Adagrad`, `V/Adadelta` (`accum`, `accum_update`), `V/Ftrl`
  (`accum`, `linear`), `V/RMSProp` (`rms`, `mg` if centered, `momentum`): slots, in the order in which the
  optimizer makes them, `_N` from the second on; a scope in which they were made stands before `V`;
- `V/ExponentialMovingAverage`: an average that follows it;
- `V/biased`, `V/local_step`: the state of a batch normalization's zero-debiased average.
Beside the model stand `beta1_power` and `beta2_power` (of a second Adam `_1`) and `global_step`.

An optimizer that was given another name has slots of that name: with beta powers in the file, a pair `V/N`
and `V/N_1` is Adam's; others stay extra arrays, as do the slots of AdagradDA and ProximalAdagrad.
GradientDescent has none.

Source: tensorflow v2.21 `python/training/{slot_creator,optimizer,moving_averages}.py` and the classes' files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ckptconv.catalog.optimizers import Row, algorithms, row
from ckptconv.tensor import TensorRef

CLASSES: Mapping[str, Row] = {
    str(found.scope): found for name in algorithms() if (found := row(name, "tf1")) is not None
}
"""Default name of a class -> its row, whose slots stand in the order in which the class makes them."""

_OTHERS = frozenset({"AdagradDA", "ProximalAdagrad"})
"""Default names of classes that the catalog has no column for: their slots stay extra arrays."""
_AVERAGE = "ExponentialMovingAverage"
_DEBIASING = frozenset({"biased", "local_step"})
_NUMBERED = re.compile(r"(.*?)(?:_([1-9]\d{0,8}))?")
_POWER = re.compile(r"((?:.*/)?)beta([12])_power((?:_\d+)?)")
_STEP = "global_step"
_RATES = frozenset({"learning_rate", "lr"})


@dataclass(slots=True)
class Names:
    """The keys of a checkpoint, sorted."""

    params: dict[str, TensorRef] = field(default_factory=dict)
    """In natural order of their names: `dense_2` before `dense_10`."""
    slots: dict[str, dict[int, dict[str, str]]] = field(default_factory=dict)
    """Name of the optimizer -> number of the slot -> variable -> key."""
    adam: str | None = None
    """The optimizer that the beta powers belong to."""
    powers: list[tuple[str, str]] = field(default_factory=list)
    """Keys of beta1_power and beta2_power, per Adam."""
    global_step: str | None = None
    averages: list[str] = field(default_factory=list)
    foreign: dict[str, int] = field(default_factory=dict)
    """Name that looks like an optimizer's and is not in the table -> variables that have a slot of it."""


def numbered(name: str) -> tuple[str, int]:
    """A name without its counter, and the counter: 0 for the first."""
    found = _NUMBERED.fullmatch(name)
    assert found is not None
    return found[1], int(found[2] or 0)


def slots_of(scope: str, count: int) -> tuple[str, tuple[str, ...]]:
    """Algorithm of a class, and what its slots are by their numbers, where a variable has `count` of them.

    A class that was given another name is Adam. No slots: of several optimizers of a class that makes two or
    three, nothing tells which are whose.
    """
    known = CLASSES.get(scope, CLASSES["Adam"])
    every = tuple(known.slots)
    plain = tuple(slot for slot in every if slot not in known.slot_conditions)
    if count > len(every) > len(plain):
        return known.algorithm, ()
    return known.algorithm, plain if count <= len(plain) else every


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts the counters of names as numbers."""
    return tuple(numbered(part) for part in name.split("/"))


def sort_out(tensors: Mapping[str, TensorRef]) -> Names:
    """What each key is; those that stand nowhere in the result are extra arrays."""
    names = Names()
    names.powers = _powers(tensors)
    names.global_step = _global_step(tensors)
    beside = {key: owner for key in tensors if (owner := _owner(key, tensors)) is not None}
    adam_like = _adam_like(beside, tensors) if names.powers else frozenset()
    taken = {key for pair in names.powers for key in pair} | {names.global_step}
    for key, owner in beside.items():
        name, number = numbered(key.rpartition("/")[2])
        if owner in beside:
            taken.add(key)  # beside a slot or an average: an average of it, or a name that repeats
        elif name == _AVERAGE:
            names.averages.append(key)
            taken.add(key)
        elif name in CLASSES or name in adam_like:
            names.slots.setdefault(name, {}).setdefault(number, {})[owner] = key
            taken.add(key)
        elif tensors[key].shape == tensors[owner].shape:
            names.foreign[name] = names.foreign.get(name, 0) + 1
            taken.add(key)
        elif name in _DEBIASING:
            taken.add(key)
    adams = [name for name in names.slots if name == "Adam" or name in adam_like]
    names.adam = adams[0] if len(adams) == 1 else None
    for key in sorted(tensors, key=natural):
        if key not in taken and _is_param(key, tensors[key]):
            names.params[key] = tensors[key]
    return names


def _owner(key: str, tensors: Mapping[str, TensorRef]) -> str | None:
    """The variable that a key stands beside: its own name less the last part, and less leading scopes."""
    base, _, last = key.rpartition("/")
    name, _ = numbered(last)
    known = name in CLASSES or name in _OTHERS or name == _AVERAGE
    while base:
        if base in tensors and (tensors[base].shape == tensors[key].shape or name in _DEBIASING):
            return base
        if not known:
            return None
        base = base.partition("/")[2]
    return None


def _adam_like(beside: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> frozenset[str]:
    """Names that every variable which has one has twice, as Adam's slots."""
    numbers: dict[str, dict[str, set[int]]] = {}
    for key, owner in beside.items():
        name, number = numbered(key.rpartition("/")[2])
        free = name not in CLASSES and name not in _OTHERS and name != _AVERAGE and owner not in beside
        if free and tensors[key].shape == tensors[owner].shape:
            numbers.setdefault(name, {}).setdefault(owner, set()).add(number)
    return frozenset(name for name, by in numbers.items() if all(found == {0, 1} for found in by.values()))


def _powers(tensors: Mapping[str, TensorRef]) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key, tensor in tensors.items():
        match = _POWER.fullmatch(key)
        if match and tensor.shape == () and tensor.dtype.name == "float32":
            found.setdefault((match[1], match[3]), {})[match[2]] = key
    return [(pair["1"], pair["2"]) for pair in found.values() if len(pair) == 2]


def _global_step(tensors: Mapping[str, TensorRef]) -> str | None:
    """The counter: at the root, or the only one in a scope."""

    def counts(key: str) -> bool:
        return tensors[key].shape == () and tensors[key].dtype.kind in ("int", "uint")

    if _STEP in tensors:
        return _STEP if counts(_STEP) else None
    scoped = [key for key in tensors if key.endswith(f"/{_STEP}") and counts(key)]
    return scoped[0] if len(scoped) == 1 else None


def _is_param(key: str, tensor: TensorRef) -> bool:
    if tensor.dtype.kind not in ("float", "complex"):
        return False
    return tensor.shape != () or key.rpartition("/")[2] not in (*_RATES, "beta1_power", "beta2_power")


def parents(params: Mapping[str, TensorRef]) -> Iterator[tuple[str, dict[str, TensorRef]]]:
    """Scope -> its variables by the last part of their names."""
    grouped: dict[str, dict[str, TensorRef]] = {}
    for key, tensor in params.items():
        scope, _, leaf = key.rpartition("/")
        grouped.setdefault(scope, {})[leaf] = tensor
    yield from grouped.items()
