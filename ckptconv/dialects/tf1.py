"""TensorFlow 1: checkpoints of `tf.compat.v1.train.Saver` and Estimators, by variable name, without a graph.

What each key is, is in `tf1_names`; what a layer is, in `tf1_layers`. The step is `global_step` where there
is one, else it follows from Adam's powers (`beta_powers`); the powers are rewritten with the step. Learning
rates, betas and epsilon are constants of the program and in no file.

Written: a template's keys, or those of the source itself; `Saver.restore` takes them in any order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptconv.catalog.optimizers import row, with_form
from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.beta_powers import beta_of, derive
from ckptconv.dialects.graph_bundle import graph_bytes
from ckptconv.dialects.graph_note import with_note
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.tf1_layers import readings
from ckptconv.dialects.tf1_lower import lower
from ckptconv.dialects.tf1_names import Names, slots_of, sort_out
from ckptconv.document import (
    Checkpoint,
    Fact,
    Group,
    Known,
    Optimizer,
    Param,
    Progress,
    Provenance,
    Residue,
    Unknown,
    Value,
    value_of,
)
from ckptconv.errors import Problem
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.tensor import TensorRef

_STATISTICS = frozenset({"moving_mean", "moving_variance"})
_PRODUCERS = {"v1": "TensorFlow, first checkpoint format (V1; written is V2)"}
_BETAS = ("beta_1", "beta_2")


class Tf1:
    """The dialect of name-based bundles."""

    name = "tf1"
    format = "tensorflow"
    framework: str | None = "tf1"
    summary = "TensorFlow 1: variables by name, of tf.compat.v1.train.Saver and Estimators"
    needs_template = True
    save_counter: str | None = None

    def detect(self, raw: RawTree) -> Detection | None:
        """Every bundle without an object graph."""
        if not isinstance(raw.root, DictNode) or graph_bytes(raw) is not None:
            return None
        return Detection(score=50, evidence=f"{len(raw.root.items)} variables by name, no object graph")

    def lift(self, raw: RawTree) -> Checkpoint:
        """The run. I/O: reads `global_step` and the powers."""
        detected = self.detect(raw)
        return _Lifting(raw).document(detected.evidence if detected else "named by the caller")

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The keys of the residue, with the document's values."""
        return lower(checkpoint, self.name)

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """A file without a variable."""
        if template.params:
            return ()
        return (
            Problem(
                code="template-unbuilt",
                loc=("template", "params"),
                message="the template holds no variables",
                hint="Build the graph, run tf.compat.v1.global_variables_initializer(), and save with "
                "tf.compat.v1.train.Saver().",
            ),
        )

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`Saver.restore` in a session."""
        return (
            "import tensorflow as tf\n\n"
            "saver = tf.compat.v1.train.Saver()  # in the graph of the model and its optimizer\n"
            "with tf.compat.v1.Session() as session:\n"
            f"    saver.restore(session, {target!r})"
        )


@dataclass(slots=True)
class _Lifting:
    """A name-based bundle while it is lifted."""

    raw: RawTree
    tensors: dict[str, TensorRef] = field(init=False)
    names: Names = field(init=False)
    lifter: Lifter = field(init=False)
    oddities: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert isinstance(self.raw.root, DictNode)
        self.tensors = {
            key: node
            for key, node in self.raw.root.items
            if isinstance(key, str) and isinstance(node, TensorRef)
        }
        self.names = sort_out(self.tensors)
        self.lifter = Lifter(self.raw.root)

    def document(self, evidence: str) -> Checkpoint:
        names = self.names
        run = self._global_step()
        params = self._params()
        optimizers = tuple(self._optimizer(scope, run) for scope in names.slots)
        optimizers = tuple(one for one in optimizers if one.groups[0].params)
        progress = Progress(step=self._step(run, optimizers))
        if names.averages:
            self.oddities.append(
                f"{len(names.averages)} moving averages of variables ({names.averages[0]}) stay extra arrays"
            )
        for name, count in names.foreign.items():
            self.oddities.append(
                f"{count} variables have one of their shape called '{name}' beside them: slots of an "
                "optimizer that the name does not tell; they stay as extra arrays"
            )
        extras = {key: tensor for key, tensor in self.tensors.items() if not self.lifter.has((key,))}
        for key in extras:
            self.lifter.take((key,), ("extra", key))
        checkpoint = Checkpoint(
            progress=progress,
            params=params,
            optimizers=optimizers,
            extras=extras,
            residue=Residue(
                format=self.raw.format,
                dialect=Tf1.name,
                root=self.lifter.residue(),
                attributes=self.raw.attributes,
            ),
            provenance=Provenance(
                format=self.raw.format,
                dialect=Tf1.name,
                evidence=evidence,
                source=self.raw.location.replace("\\", "/").rpartition("/")[2],
                producer=_PRODUCERS.get(str(self.raw.attributes.get("container")), ""),
            ),
            oddities=tuple(self.oddities),
        )
        return with_note(checkpoint, self.raw.note)

    def _params(self) -> dict[str, Param]:
        trained = {name for by in self.names.slots.values() for owners in by.values() for name in owners}
        read = readings(self.names.params)
        result = {}
        for name, tensor in self.names.params.items():
            reading = read[name]
            trainable = True if name in trained else False if reading.role in _STATISTICS else None
            result[name] = Param(
                name=name,
                tensor=tensor,
                role=reading.role,
                layer=reading.layer,
                axes=reading.axes,
                evidence=reading.evidence,
                candidates=reading.candidates,
                trainable=trainable,
            )
            self.lifter.take((name,), ("param", name))
        return result

    def _optimizer(self, scope: str, run: int | None) -> Optimizer:
        """The optimizer whose slots are called by its name."""
        by_number = self.names.slots[scope]
        algorithm, meanings = slots_of(scope, 1 + max(by_number))
        name = "optimizer" if len(self.names.slots) == 1 else scope
        slots: dict[str, dict[str, TensorRef]] = {}
        for number, slot in enumerate(meanings):
            for owner in self.names.params:
                key = by_number.get(number, {}).get(owner)
                if key is not None:
                    slots.setdefault(slot, {})[owner] = self.tensors[key]
                    self.lifter.take((key,), ("slot", name, slot, owner))
        if any(number >= len(meanings) for number in by_number):
            kept = "those of the first are its state, the others" if meanings else "nothing tells whose; they"
            self.oddities.append(
                f"variables have slots of more than one '{scope}': {kept} stay as extra arrays"
            )
        held = {owner for owners in slots.values() for owner in owners}
        step: Fact = Unknown(reason="the class keeps no step, and there is no global_step")
        if run is not None:
            step = Known(value=run, source=str(self.names.global_step))
        hyperparameters: Mapping[str, Fact] = {}
        if algorithm == "adam":
            step, hyperparameters = self._adam(scope, name, step)
        order = tuple(owner for owner in self.names.params if owner in held)
        optimizer = Optimizer(
            name=name,
            algorithm=algorithm,
            framework="tf1",
            step=step,
            groups=(Group(params=order, hyperparameters=hyperparameters),),
            slots=slots,
            param_order="named",
        )
        assert row(algorithm, "tf1") is not None
        return with_form(optimizer)

    def _adam(self, scope: str, name: str, run: Fact) -> tuple[Fact, Mapping[str, Fact]]:
        """Adam's own step and betas, from its powers; they follow the step from here on."""
        if scope != self.names.adam or not self.names.powers:
            return run, {}
        powers = [tuple((key, self._number(key)) for key in pair) for pair in self.names.powers]
        derived = [derive(first, second) for first, second in powers]
        values = {value_of(fact) for fact in derived}
        own: Fact = derived[0]
        if len(values) > 1:
            own = Unknown(
                reason=f"{len(powers)} pairs of beta powers tell different steps, "
                "and which variables each belongs to is not recorded"
            )
        step = self._agreed(run, own, powers[0][0][0])
        count = value_of(step)
        betas = [
            None if not isinstance(count, int) or len(values) > 1 else beta_of(power, count, beta)
            for beta, (_, power) in zip(_BETAS, powers[0], strict=True)
        ]
        if len(values) == 1:
            for pair in powers:
                for beta, value, (key, power) in zip(_BETAS, betas, pair, strict=True):
                    if math.isfinite(power):
                        self._take_power(key, name, power, beta, value, count)
        facts: dict[str, Fact] = {
            beta: Known(
                value=value,
                status="derived",
                source=key,
                formula=f"{key} = {beta}^(step + 1)",
            )
            for beta, value, (key, _) in zip(_BETAS, betas, powers[0], strict=True)
            if value is not None
        }
        return step, facts

    def _take_power(
        self, key: str, name: str, power: float, beta: str, value: float | None, step: Value
    ) -> None:
        assert step is None or isinstance(step, int)
        dtype = self.tensors[key].dtype.name
        self.lifter.take((key,), ("step", name), dtype=dtype, power=power, of=beta, beta=value, was=step)

    def _agreed(self, run: Fact, own: Fact, key: str) -> Fact:
        """What Adam has counted: the run's step, unless both of its powers tell another one."""
        if not isinstance(run, Known):
            return own
        if isinstance(own, Known) and own.value != run.value:
            self.oddities.append(
                f"'{self.names.global_step}' is {run.value}, Adam's powers tell {own.value} of its own"
            )
            return own
        seen = {c.value for c in own.candidates} if isinstance(own, Unknown) else set()
        if seen - {run.value}:
            self.oddities.append(
                f"'{self.names.global_step}' is {run.value}; of Adam's powers ('{key}') one alone would tell "
                f"{', '.join(map(str, sorted(seen, key=str)))}, which is not used"
            )
        return run

    def _step(self, run: int | None, optimizers: tuple[Optimizer, ...]) -> Fact:
        if run is not None:
            return Known(value=run, source=str(self.names.global_step))
        if len(optimizers) == 1:
            return optimizers[0].step
        reason = (
            "there are several optimizers, each with its own" if optimizers else "there is no global_step"
        )
        return Unknown(reason=reason)

    def _global_step(self) -> int | None:
        key = self.names.global_step
        if key is None:
            return None
        value = int(self.tensors[key].read().reshape(-1)[0])
        if value < 0:
            self.oddities.append(f"'{key}' is {value}: no count of updates; it stays as an extra array")
            self.names.global_step = None
            return None
        encoding: dict[str, str | int] = {"as": "tensor", "dtype": self.tensors[key].dtype.name, "was": value}
        self.lifter.take((key,), ("progress", "step"), **encoding)
        return value

    def _number(self, key: str) -> float:
        return float(self.tensors[key].read().reshape(-1)[0])


register(Tf1())
