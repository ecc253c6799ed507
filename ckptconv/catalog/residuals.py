"""How large a difference between two update rules is on a given state, in one streaming pass.

Every formula is the relative difference of the next update of one element, from what the state holds now.
The next update's second moment is at least beta_2 times the present one (rho times, b2 times; an accumulator
only grows), and the formulas fall with it, so that the figure is a bound of that update for every element
whose second moment is not 0. An element with 0 has had no gradient yet and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptconv.catalog.transitions import Transition
from ckptconv.tensor import MissingTensor, TensorRef, blocks

_BINS = 1 << 16
_BATCH = 1 << 17
"""Elements that are worked on at once."""
_PANEL_NBYTES = 4 << 20
Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Slots = Mapping[str, Mapping[str, TensorRef]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """What has to be known to state a difference: pass it on to `measure`."""

    formula: str
    """Key of `FORMULAS`."""
    slot: str
    """Canonical slot whose values decide."""
    minus: str | None = None
    """Canonical slot whose square is taken off them (centered RMSprop)."""
    values: Mapping[str, float]
    """Hyperparameters, with `step`."""

    @classmethod
    def of(
        cls,
        transition: Transition,
        values: Mapping[str, float],
        step: object,
        held: Set[str],
        *,
        amsgrad: bool = False,
    ) -> Residual | None:
        """The residual of a transition; None where something that its formula needs is not known.

        `held`: the slots that cross. A mean gradient among them is taken off the second moment: the run is
        centered.
        """
        name = f"{transition.measure}: {transition.before} -> {transition.after}"
        formula = FORMULAS[name]
        have = dict(values)
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 63:
            have["step"] = float(step)
        if any(need not in have for need in formula.needs):
            return None
        if not 0 <= have.get("beta_2", 0) < 1 or have["epsilon"] < 0:
            return None
        slot = "max_second_moment" if amsgrad else formula.slot
        return cls(
            formula=name, slot=slot, minus=formula.minus if formula.minus in held else None, values=have
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """A relative difference, per element."""

    slot: str
    minus: str | None = None
    needs: tuple[str, ...]
    error: Callable[[Floats, Mapping[str, float]], Floats]


def _correction(values: Mapping[str, float]) -> float:
    """sqrt(1 - beta_2^t) of the next update."""
    beta_2 = values["beta_2"]
    return math.sqrt(-math.expm1((values["step"] + 1) * math.log(beta_2))) if beta_2 > 0 else 1.0


def _beside_root(v: Floats, values: Mapping[str, float]) -> Floats:
    epsilon, c = values["epsilon"], _correction(values)
    return np.asarray(epsilon * (1 - c) / (np.sqrt(values["beta_2"] * v) + epsilon))


def _beside_raw_root(v: Floats, values: Mapping[str, float]) -> Floats:
    epsilon, c = values["epsilon"], _correction(values)
    return np.asarray(epsilon * (1 - c) / (np.sqrt(values["beta_2"] * v) + epsilon * c))


def _over_norm(u: Floats, values: Mapping[str, float]) -> Floats:
    return np.asarray(values["epsilon"] / (values["beta_2"] * u))


def _squared(s: Floats, values: Mapping[str, float]) -> Floats:
    return np.asarray(values["epsilon"] / np.sqrt(s + values["epsilon"] ** 2))


def _none_left(s: Floats, values: Mapping[str, float]) -> Floats:
    return np.asarray(values["epsilon"] / np.sqrt(s))


def _out_of_root(v: Floats, values: Mapping[str, float]) -> Floats:
    v = v * values["rho"]
    return np.asarray(np.abs(np.sqrt(v + values["epsilon"]) / (np.sqrt(v) + values["fitted"]) - 1))


def _into_root(v: Floats, values: Mapping[str, float]) -> Floats:
    v = v * values["rho"]
    return np.asarray(np.abs((np.sqrt(v) + values["epsilon"]) / np.sqrt(v + values["epsilon"] ** 2) - 1))


_ADAM = ("epsilon", "beta_2", "step")
FORMULAS: Mapping[str, Formula] = {
    "bias-corrected: corrected -> raw": Formula(slot="second_moment", needs=_ADAM, error=_beside_root),
    "bias-corrected: raw -> corrected": Formula(slot="second_moment", needs=_ADAM, error=_beside_raw_root),
    "norm: in_max -> after_max": Formula(slot="second_moment", needs=("epsilon", "beta_2"), error=_over_norm),
    "norm: after_max -> in_max": Formula(slot="second_moment", needs=("epsilon", "beta_2"), error=_over_norm),
    "accumulated: outside -> inside": Formula(slot="accumulator", needs=("epsilon",), error=_squared),
    "accumulated: outside -> absent": Formula(slot="accumulator", needs=("epsilon",), error=_none_left),
    "root: inside -> outside": Formula(
        slot="second_moment", minus="average_gradient", needs=("epsilon", "rho", "fitted"), error=_out_of_root
    ),
    "root: outside -> inside": Formula(
        slot="second_moment", minus="average_gradient", needs=("epsilon", "rho"), error=_into_root
    ),
}


FITS: Mapping[str, Callable[[float, float], float]] = {
    "out-of-root": lambda v, epsilon: epsilon / (math.sqrt(v + epsilon) + math.sqrt(v)),
}
"""(median second moment, epsilon) -> the epsilon with which the other form takes the same step there.

`out-of-root`: sqrt(v + e) = sqrt(v) + e'. The other way round epsilon^2 is better than any fit: an epsilon
under the root that suits the median is too large for every smaller moment.
"""


def fitted(name: str, slots: Slots, epsilon: float) -> tuple[float, str]:
    """The target's epsilon for which the two rules agree at the median of the state, and why.

    I/O: reads the second moments once, in windows.
    """
    _, median = _spread(slots.get("second_moment", {}), slots.get("average_gradient", {}), lambda v: v)
    return FITS[name](
        median, epsilon
    ), f"epsilon {epsilon:.3g} fitted at the median second moment {median:.3g}"


def measure(slots: Slots, residual: Residual) -> tuple[float, float]:
    """Largest and median relative difference of the next update over the elements of a state.

    The median is that of a histogram over the upper 16 bits of the float32 value: its error is below 1 %.
    I/O: reads every tensor once, in windows.
    """
    minus = slots.get(residual.minus, {}) if residual.minus else {}
    formula = FORMULAS[residual.formula]
    return _spread(slots.get(residual.slot, {}), minus, lambda v: formula.error(v, residual.values))


def _spread(
    tensors: Mapping[str, TensorRef], minus: Mapping[str, TensorRef], of: Callable[[Floats], Floats]
) -> tuple[float, float]:
    """Largest and median value of a function over all elements that are above 0."""
    largest, counts = 0.0, np.zeros(_BINS, np.int64)
    for wide in _batches(_elements(tensors, minus)):
        with np.errstate(all="ignore"):
            values = of(wide)
        largest = max(largest, float(values.max()))
        clipped = np.clip(values, np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max)
        counts += np.bincount(clipped.astype(np.float32).view(np.uint32) >> 16, minlength=_BINS)
    total = int(counts.sum())
    if total == 0:
        return 0.0, 0.0
    middle = int(np.searchsorted(np.cumsum(counts), (total + 1) // 2))
    median = float(np.array((middle << 16) + (1 << 15), np.uint32).view(np.float32))
    return largest, min(median, largest)


def _elements(tensors: Mapping[str, TensorRef], minus: Mapping[str, TensorRef]) -> Iterator[Floats]:
    """All elements above 0, in pieces and in no order."""
    for name, tensor in tensors.items():
        if isinstance(tensor, MissingTensor):
            continue
        for wide in _differences(tensor, minus[name]) if name in minus else _values(tensor.as_it_lies()):
            yield wide[(wide > 0) & np.isfinite(wide)]


def _values(tensor: TensorRef) -> Iterator[Floats]:
    for window in tensor.windows(_BATCH * tensor.dtype.itemsize, _PANEL_NBYTES):
        yield window.view(tensor.dtype.numpy).astype(np.float64)


def _differences(tensor: TensorRef, other: TensorRef) -> Iterator[Floats]:
    """`tensor - other**2`. In blocks: the windows of two tensors need not hold the same elements."""
    for start, stop in blocks(tensor.shape, tensor.dtype.itemsize, _PANEL_NBYTES):
        wide = tensor.block(start, stop).astype(np.float64)
        yield (wide - other.block(start, stop).astype(np.float64) ** 2).reshape(-1)


def _batches(pieces: Iterable[Floats]) -> Iterator[Floats]:
    """The pieces, small ones put together: arithmetic on a few elements costs as much as on a thousand."""
    batch: list[Floats] = []
    room = _BATCH
    for piece in pieces:
        if piece.size:
            batch.append(piece)
            room -= piece.size
        if room <= 0:
            yield np.concatenate(batch)
            batch, room = [], _BATCH
    if batch:
        yield np.concatenate(batch)
