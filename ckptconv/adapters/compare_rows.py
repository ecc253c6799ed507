"""The rows of a comparison: what a layer gives out in both models, in one order of axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptconv.adapters.compare_axes import Order, fitting, model_orders, orders
from ckptconv.adapters.compare_layers import Match, is_around
from ckptconv.adapters.compare_runs import Output, Outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutput:
    """One call of a layer in both models."""

    torch: str
    """Path of the module; empty for the model itself."""
    keras: str
    call: int = 0
    """Which of its calls, from 0."""
    shape: tuple[int, ...]
    """Of torch's output."""
    keras_shape: tuple[int, ...]
    max_abs: float = np.inf
    """Infinite where the outputs have shapes that no order of axes brings together."""
    max_rel: float = np.inf
    """The largest difference over the largest value of the Keras layer's output."""
    differs: bool
    untold: str = ""
    """Why the outputs were not compared; empty where they were."""

    def __str__(self) -> str:
        name = f"{self.torch or '(output)'} | {self.keras or '(output)'}"
        name += f" (call {self.call + 1})" if self.call else ""
        if self.untold:
            return f"{name}  {self.untold}"
        state = "differs" if self.differs else "equal"
        if self.max_abs == np.inf and self.shape != self.keras_shape:
            return f"{name}  {state}: {list(self.shape)} and {list(self.keras_shape)}"
        return (
            f"{name}  {list(self.keras_shape)}  {state}: max abs {self.max_abs:.3g}, rel {self.max_rel:.3g}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputComparison:
    """Every matched layer of two models on one input, in the order in which the torch model runs them."""

    rows: tuple[LayerOutput, ...]
    """The models' own outputs are the last ones."""
    tolerance: float

    @property
    def first(self) -> LayerOutput | None:
        """The first layer whose output differs; None where none does."""
        return next((row for row in self.rows if row.differs), None)

    @property
    def equal(self) -> bool:
        """Whether the models' own outputs were compared, and no output differs."""
        own = [row for row in self.rows if not row.torch and not row.keras]
        return bool(own) and not any(row.untold for row in own) and self.first is None

    def __str__(self) -> str:
        compared = sum(not row.untold for row in self.rows)
        head = f"{compared} of {len(self.rows)} outputs compared, within {self.tolerance:g}: "
        if self.first is not None:
            head += f"the first that differs is {self.first.torch or 'the model'} of torch"
            head += f", {self.first.keras or 'the model'} of Keras"
        else:
            head += "equal" if self.equal else "none differs, but the models' own outputs were not compared"
        return "\n".join([head, *(f"{'>' if row.differs else ' '} {row}" for row in self.rows)])


class Comparison:
    """Makes rows of outputs."""

    def __init__(self, tolerance: float, sequence_first: bool) -> None:
        self._tolerance, self._sequence_first = tolerance, sequence_first

    def of(self, one: Match, ours: Outputs, theirs: Outputs) -> Iterator[LayerOutput]:
        """Every call of what has run last, on both sides."""
        path = max(one.modules, key=lambda path: ours.last.get(path, 0))
        name = max(one.layers, key=lambda name: theirs.last.get(name, 0))
        module, layer = one.modules[path], one.layers[name]
        shown = name if name.endswith(layer.name) else f"{name} ({layer.name})"
        mine, its = ours.calls.get(path, []), theirs.calls.get(name, [])
        if len(mine) != len(its):
            untold = f"is called {len(mine)} times in torch and {len(its)} times in Keras"
            shape = mine[0].shape if mine else ()
            yield LayerOutput(
                torch=path, keras=shown, shape=shape, keras_shape=(), differs=False, untold=untold
            )
            return
        inner = getattr(layer, "layer", layer)  # of a TimeDistributed
        activation = None if is_around(inner) else getattr(inner, "activation", None)
        for call, (first, second) in enumerate(zip(mine, its, strict=True)):
            may = tuple(orders(module, layer, first.ndim, sequence_first=self._sequence_first))
            yield self._row(path, shown, call, first, second, may, activation)

    def of_models(self, ours: Outputs, theirs: Outputs) -> Iterator[LayerOutput]:
        """The models' own outputs."""
        if len(ours.whole) != len(theirs.whole):
            untold = f"torch gives out {len(ours.whole)} arrays and Keras {len(theirs.whole)}"
            yield LayerOutput(torch="", keras="", shape=(), keras_shape=(), differs=False, untold=untold)
            return
        for call, (first, second) in enumerate(zip(ours.whole, theirs.whole, strict=True)):
            may = tuple(model_orders(first.ndim, sequence_first=self._sequence_first))
            yield self._row("", "", call, first, second, may, None)

    def _row(
        self,
        path: str,
        name: str,
        call: int,
        first: Output,
        second: Output,
        may: Sequence[Order],
        activation: Any,
    ) -> LayerOutput:
        found = fitting(may, first.shape, second.shape)
        apart, largest, untold = np.inf, 1.0, ""
        if len(found) > 1:
            untold = "axes of equal size may stand in more than one order: give a batch whose sizes differ"
        elif found:
            (order,) = found
            mine = first.transpose(order).reshape(second.shape)
            if callable(activation):  # of a module and the function after it Keras makes one layer
                mine = np.asarray(activation(mine))
            apart, largest = _apart(mine, second)
        return LayerOutput(
            torch=path,
            keras=name,
            call=call,
            shape=first.shape,
            keras_shape=second.shape,
            max_abs=apart,
            max_rel=apart / largest if largest else apart,
            differs=not untold and not apart <= self._tolerance * largest,
            untold=untold,
        )


def _apart(first: Output, second: Output) -> tuple[float, float]:
    """The largest difference and the largest value of the second; what is not finite must be the same."""
    wide = np.complex128 if "c" in (first.dtype.kind, second.dtype.kind) else np.float64
    ours, theirs = first.astype(wide), second.astype(wide)
    if not ours.size:
        return 0.0, 0.0
    with np.errstate(all="ignore"):
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        apart = np.where(same, 0.0, np.abs(ours - theirs))
        finite = np.abs(theirs)[np.isfinite(theirs)]
    return float(np.where(np.isnan(apart), np.inf, apart).max()), float(finite.max()) if finite.size else 0.0
