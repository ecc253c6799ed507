"""The optimizer tables: per algorithm and framework the class, its slots, hyperparameters and form.

`data/optimizers/<algorithm>.json` holds one algorithm; this file reads it and recognises an algorithm by
the keys of its state. What the forms mean for a conversion is in `conversion.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from ckptconv.catalog.loading import Record, load, names
from ckptconv.catalog.parts import Part, read, row_of_part
from ckptconv.catalog.transitions import transitions
from ckptconv.document import Value

FRAMEWORKS = ("torch", "keras3", "tf_keras", "tf_keras_legacy")
"""Columns whose files tell the class, or come near it."""
Init = float | str
"""A number, the name of the hyperparameter that it is, or `param`: the parameter's own value."""
COLUMNS = (*FRAMEWORKS, "tf1")
"""All columns; `tf1` is `tf.compat.v1.train`, whose files name no class and hold no hyperparameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperRow:
    """One hyperparameter of a class."""

    argument: str | None
    """Name of the constructor's argument; None where a schedule sets it."""
    key: str | None
    """Key in the container (param group key, graph edge); None where the container does not hold it."""
    index: int | None = None
    """Position within the key's value, where several share a key (torch's `betas`)."""
    default: Value
    """Of the constructor; for texts and tests, never used in a conversion."""
    none: Value = None
    """What None in the container stands for."""
    optional: bool = False
    """Whether a container that holds hyperparameters may lack it."""

    @property
    def may_be_none(self) -> bool:
        """Whether a container may leave it to the class, and then has no place for a value."""
        return self.optional and self.argument is not None and self.default is None

    @property
    def stored(self) -> bool:
        """Whether the container holds it."""
        return self.key is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule that a helper gives a class; the setting of the helper's name tells of it and has its number."""

    call: str
    """The helper's call, its number in braces under the name of the hyperparameter that it stands for."""
    form: Mapping[str, str]
    """The point of the form that it changes, named as the hyperparameter: `epsilon`, `weight_decay`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One algorithm in one framework."""

    algorithm: str
    family: str
    """Algorithms of one family keep the same state and differ in form only."""
    framework: str
    class_name: str
    """E.g. `torch.optim.AdamW`."""
    source: str
    """Where the facts come from."""
    scope: str | None
    """Name the class gives itself by default, which begins its variables' names; None for torch."""
    step_key: str | None
    """Where the step stands; None where the class counts none (torch SGD)."""
    step_per_param: bool
    """Whether every parameter has its own step."""
    step_in_group: bool
    """Whether every group has its own, among its hyperparameters."""
    open_slots: bool
    """Whether a file may be given slots that the template's file does not hold (torch)."""
    slots: Mapping[str, str]
    """Canonical slot -> key in the state, name of the list edge, or slot name."""
    slot_variables: Mapping[str, str]
    """Canonical slot -> what names the slot's variables (`kernel_momentum`, `Adam/m/kernel`)."""
    slot_conditions: Mapping[str, str]
    """Canonical slot -> hyperparameter without which it does not exist."""
    slot_readers: Mapping[str, str]
    """Canonical slot -> hyperparameter without which the rule does not read it, though it may be there."""
    slot_inits: Mapping[str, Init]
    """Canonical slot -> its value before the first update."""
    hyperparameters: Mapping[str, HyperRow]
    neutral: Mapping[str, Value]
    """Canonical hyperparameter -> the value that equals not having it."""
    base_form: Mapping[str, str]
    switches: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Hyperparameter -> what its being true changes in the form; the target's code may choose it freely."""
    form_when: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Hyperparameter -> what its not being 0 changes in the form; its value comes from the run."""
    slot_shapes: Mapping[str, str] = field(default_factory=dict)
    """Canonical slot -> how its shape follows from the parameter's (`shape_of_slot`), where it is another."""
    scalars: Mapping[str, str] = field(default_factory=dict)
    """Canonical name -> key of a number that the optimizer keeps once, for all parameters."""
    scalar_inits: Mapping[str, float] = field(default_factory=dict)
    """Canonical name -> its value before the first update."""
    alone: str = ""
    """Why the state goes to no other framework, of an algorithm that one alone has."""
    whole_tensor: str = ""
    """What of an element's update depends on the whole tensor it is in; empty where nothing does."""
    equivalents: tuple[Mapping[str, Value], ...] = ()
    """Values of different hyperparameters that say the same: a class without one may have another."""
    settled: frozenset[str] = frozenset()
    """Hyperparameters that have had their whole effect on the state: a class without them lacks nothing."""
    lists: frozenset[str] = frozenset()
    """Slot lists that the container names even when they are empty."""
    interleaved: bool = False
    """Whether the lists are named and empty, and the slots stand in `_variables`, variable by variable."""
    part: Part | None = None
    """What else the class is, for some of its parameters."""
    placeholders: bool = False
    """Whether a parameter has a variable in place of a factor that it has not."""
    other_keys: frozenset[str] = frozenset()
    """Keys of state that belongs to no single parameter (LBFGS): it goes back to its own file only."""
    smallest: Mapping[str, float] = field(default_factory=dict)
    """Hyperparameter -> the smallest value that the class does not replace by its default."""
    after_restore: tuple[str, ...] = ()
    """Lines that the target's code must run, as what they set is saved nowhere; `{step}` is filled in."""
    rules: Mapping[str, Rule] = field(default_factory=dict)
    """Name of a helper -> the rule that it gives the class."""
    helpers: Mapping[str, str] = field(default_factory=dict)
    """Hyperparameter that the class lacks -> the call that gives it the source's."""
    required_keys: frozenset[str] = frozenset()
    foreign_keys: frozenset[str] = frozenset()
    telling_values: Mapping[str, Value] = field(default_factory=dict)

    def form(self, hyperparameters: Mapping[str, Value]) -> dict[str, str]:
        """The points where update rules differ, for these hyperparameters.

        `epsilon`: `corrected` (beside the bias-corrected root), `raw`, `outside` or `inside` the root,
        `in_max` or `after_max`; `momentum`: `gradient` (the learning rate is not in the buffer), `velocity`
        (it is, negated), `step` (it is); `weight_decay`: `coupled`, `decoupled`, `none`.
        """
        form = dict(self.base_form)
        for name, change in (*self.switches.items(), *self.form_when.items()):
            if hyperparameters.get(name):
                form.update(change)
        for name, rule in self.rules.items():
            if hyperparameters.get(name) is not None:
                form.update(rule.form)
        return form

    def helper(self, point: str, form: str) -> str:
        """The call that gives the class another form at a point; empty where there is none."""
        return next((rule.call for rule in self.rules.values() if rule.form.get(point) == form), "")

    def slots_present(self, hyperparameters: Mapping[str, Value]) -> tuple[str, ...]:
        """Canonical slots that exist under these hyperparameters; one that is not given counts as off."""
        return tuple(
            slot
            for slot in self.slots
            if slot not in self.slot_conditions or hyperparameters.get(self.slot_conditions[slot])
        )

    def slot_of(self, native: str) -> str | None:
        """Canonical name of a native slot key, None where the class has no such slot."""
        return next((slot for slot, key in self.slots.items() if key == native), None)

    def is_called(self, scope: str) -> bool:
        """Whether the class gives itself this name, under any version: `adam_w`, `adamw`, `adam_w_1`."""
        bare = re.sub(r"_\d+$", "", scope).replace("_", "").lower()
        return bool(bare) and self.scope is not None and self.scope.replace("_", "").lower() == bare

    def accepts(self, slots: frozenset[str], keys: Mapping[str, Value]) -> bool:
        """Whether the class could have written a state with these slots and hyperparameters."""
        if not slots <= {*self.slots.values(), *self.scalars.values(), *self.other_keys}:
            return False
        sparing = self.slot_conditions.keys() | {
            s for s, kind in self.slot_shapes.items() if kind != "scalar"
        }
        lasting = {key for slot, key in self.slots.items() if slot not in sparing}
        lasting.update(self.scalars.values(), self.lists)
        if slots and not lasting <= slots:
            return False
        if keys and (not self.required_keys <= set(keys) or self.foreign_keys & set(keys)):
            return False
        if not slots and lasting and not (keys and self.required_keys):
            return False
        return all(key not in keys or keys[key] == value for key, value in self.telling_values.items())


@cache
def _tables() -> Mapping[str, Mapping[str, Row]]:
    return {name: _algorithm(load(f"optimizers/{name}.json"), name) for name in names("optimizers")}


def _algorithm(record: Record, name: str) -> Mapping[str, Row]:
    if record.text("algorithm") != name:
        raise ValueError(f"{record.where}: the algorithm is not named as its file")
    record.text("update"), record.text("source")
    family, alone = record.text("family"), record.text("alone", "")
    whole_tensor = record.text("whole_tensor", "")
    inits: dict[str, Init] = {}
    for slot, entry in record.records("slots"):
        entry.text("definition")
        inits[slot] = _init(entry)
        entry.close()
    known, neutral, settled = set(), {}, set()
    for hyperparameter, entry in record.records("hyperparameters"):
        entry.text("definition")
        known.add(hyperparameter)
        if entry.has("neutral"):
            neutral[hyperparameter] = entry.scalar("neutral")
        if entry.flag("settled", False):
            settled.add(hyperparameter)
        entry.close()
    transitions(record)
    same = record.record("equivalents") if record.has("equivalents") else None
    equivalents = tuple(same.scalar_map(key) for key in same.keys) if same is not None else ()
    rows = {}
    for framework, entry in record.records("frameworks"):
        if framework not in COLUMNS:
            raise ValueError(f"{entry.where}: unknown framework")
        row = _row(entry, name, family, framework, inits, neutral)
        row = replace(row, alone=alone, whole_tensor=whole_tensor)
        row = replace(row, settled=frozenset(settled), equivalents=equivalents)
        named = {init for init in row.slot_inits.values() if isinstance(init, str)} - {"param"}
        if not {*row.hyperparameters, *named} <= known or not {*row.slots, *row.scalars} <= set(inits):
            raise ValueError(f"{entry.where}: a slot or hyperparameter is not defined")
        rows[framework] = row
    record.close()
    return rows


def _row(
    record: Record,
    algorithm: str,
    family: str,
    framework: str,
    inits: Mapping[str, Init],
    neutral: Mapping[str, Value],
) -> Row:
    slots, variables, conditions, readers, shapes, own_inits = {}, {}, {}, {}, {}, {}
    for slot, entry in record.records("slots"):
        slots[slot] = entry.text("key")
        variable, condition = entry.optional_text("variable"), entry.optional_text("when")
        if variable is not None:
            variables[slot] = variable
        if condition is not None:
            conditions[slot] = readers[slot] = condition
        if entry.has("read_when"):
            readers[slot] = entry.text("read_when")
        if entry.has("shape"):
            shapes[slot] = entry.text("shape")
        if entry.has("init"):
            own_inits[slot] = _init(entry)
        entry.close()
    hyperparameters = {}
    for name, entry in record.records("hyperparameters"):
        hyperparameters[name] = HyperRow(
            argument=entry.optional_text("argument"),
            key=entry.optional_text("key"),
            index=entry.optional_int("index"),
            default=entry.scalar("default"),
            none=entry.scalar("none") if entry.has("none") else None,
            optional=entry.flag("optional", False),
        )
        entry.close()
    row = Row(
        algorithm=algorithm,
        family=family,
        framework=framework,
        class_name=record.text("class"),
        source=record.text("source"),
        scope=record.optional_text("scope"),
        step_key=record.optional_text("step"),
        step_per_param=record.flag("step_per_param", False),
        step_in_group=record.flag("step_in_group", False),
        open_slots=record.flag("open_slots", False),
        slots=slots,
        slot_variables=variables,
        slot_conditions=conditions,
        slot_readers=readers,
        slot_inits={slot: inits[slot] for slot in slots} | own_inits,
        hyperparameters=hyperparameters,
        neutral={**neutral, **record.scalar_map("neutral")},
        base_form=record.text_map("form"),
        switches=_changes(record, "switches"),
        form_when=_changes(record, "form_when"),
        slot_shapes=shapes,
        scalars=(scalars := record.text_map("scalars")),
        scalar_inits={name: float(inits[name]) for name in scalars},
        lists=frozenset(record.texts("lists")),
        interleaved=record.flag("interleaved", False),
        part=read(record),
        placeholders=record.flag("placeholders", False),
        other_keys=frozenset(record.texts("other_keys")),
        smallest=record.number_map("smallest"),
        after_restore=record.texts("after_restore"),
        rules={
            name: Rule(call=entry.text("call"), form=entry.text_map("form"))
            for name, entry in record.records("rules")
        },
        helpers=record.text_map("helpers"),
        required_keys=frozenset(record.texts("required_keys")),
        foreign_keys=frozenset(record.texts("foreign_keys")),
        telling_values=record.scalar_map("telling_values"),
    )
    record.close()
    return row


def _init(record: Record) -> Init:
    return record.text("init") if isinstance(record.scalar("init"), str) else record.number("init")


def _changes(record: Record, key: str) -> Mapping[str, Mapping[str, str]]:
    """Hyperparameter -> points of the form that it changes."""
    if not record.has(key):
        return {}
    inner = record.record(key)
    return {name: inner.text_map(name) for name in inner.keys}


def algorithms() -> tuple[str, ...]:
    """Names of the algorithms in the catalog."""
    return tuple(_tables())


def rows_of_framework(framework: str) -> tuple[Row, ...]:
    """All rows of a framework."""
    return tuple(table[framework] for table in _tables().values() if framework in table)


def row(algorithm: str, framework: str) -> Row | None:
    """The table row, also of a class's part (`muon.adamw`); None where the framework has no such class."""
    name, _, part = algorithm.partition(".")
    found = _tables().get(name, {}).get(framework)
    return row_of_part(found, part, row(part, framework)) if found is not None and part else found


def shape_of_slot(kind: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a slot of a parameter, None where the parameter has no such slot.

    `param`: the parameter's; `part`: too, of some parameters; `scalar`: one number; `rows`: without the last
    axis and `columns`: without the one before it, of matrices, or `kept_rows` and `kept_columns`: with size 1
    in its place; `vectors`: the parameter's, of what is no matrix.
    """
    matrix = len(shape) >= 2
    match kind:
        case "scalar":
            return ()
        case "rows":
            return shape[:-1] if matrix else None
        case "columns":
            return (*shape[:-2], shape[-1]) if matrix else None
        case "kept_rows":
            return (*shape[:-1], 1) if matrix else None
        case "kept_columns":
            return (*shape[:-2], 1, shape[-1]) if matrix else None
        case "vectors":
            return None if matrix else shape
    return shape


def relatives(one: Row) -> tuple[Row, ...]:
    """The other classes of the same family and framework."""
    rows = (table.get(one.framework) for table in _tables().values())
    return tuple(r for r in rows if r is not None and r.family == one.family and r.algorithm != one.algorithm)


def infer(
    framework: str, slots: frozenset[str], hyperparameters: Mapping[str, Value], scope: str | None = None
) -> tuple[str, ...]:
    """The algorithms that could have written a state with these keys: none is "not in the catalog".

    `slots`: native keys of the state (torch, without the step), names of the slot lists (Keras 3, tf_keras;
    also empty ones), slot names (legacy). `hyperparameters`: the whole param group without `params`, or the
    stored scalars by edge. `scope`: the first part of the optimizer's variables' names, where they have one;
    it settles what the keys leave open.
    """
    fits = [table[framework] for table in _tables().values() if framework in table]
    fits = [candidate for candidate in fits if candidate.accepts(slots, hyperparameters)]
    named = tuple(one.algorithm for one in fits if scope is not None and one.is_called(scope))
    return named or tuple(one.algorithm for one in fits)
