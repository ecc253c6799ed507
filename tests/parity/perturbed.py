"""The catalog with one claim of it changed, and every such change that the tables allow.

The kinds: the `sign` of a slot, the `form` of a class (where epsilon stands, what a buffer of momentum is,
how weights decay), the order of two `slots`, the order of two `betas`, an `amount` of a transition, a `step`
off by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any

from ckptconv.catalog import completion, loading, optimizer_rows, transitions
from ckptconv.catalog.optimizer_rows import FRAMEWORKS, Row, algorithms, row
from tests.parity.matrix import Case, cases, pairs

Change = Callable[[dict[str, Any]], None]
KINDS = ("sign", "form", "slots", "betas", "amount", "step")
TOO_SMALL = {"epsilon_1"}
"""Points of which the number is below the square of every gradient (1e-30): where it stands moves nothing."""
_CACHES = (optimizer_rows._tables, transitions._family, completion.hyperparameter_names)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One wrong claim."""

    algorithm: str
    kind: str
    what: str
    changes: Mapping[str, Change]
    """Name of a table -> what is changed in it."""
    framework: str | None = None
    """Whose row it is in; None where it is between rows."""
    slots: frozenset[str] = frozenset()
    """Slots that it is about: a run without them does not read it."""

    def __str__(self) -> str:
        return "-".join((self.algorithm, self.framework or "all", self.kind, self.what))

    def places(self) -> Iterator[tuple[Case, str, str]]:
        """Where it may show: each case that has the slots, from the framework and to it."""
        for case in cases().values():
            if case.algorithm != self.algorithm:
                continue
            for source, target in pairs(case):
                named = self.framework or source
                known = row(case.algorithm, named)
                assert known is not None
                if named in (source, target) and self.slots <= {*known.slots_present(case.hypers)}:
                    yield case, source, target


@contextmanager
def claiming(claim: Claim) -> Iterator[None]:
    """The catalog says something else."""
    original = loading.load

    def load(path: str) -> loading.Record:
        record = original(path)
        change = claim.changes.get(path.removeprefix("optimizers/").removesuffix(".json"))
        if change is not None:
            change(record._data)
        return record

    optimizer_rows.load = transitions.load = load  # type: ignore[attr-defined]
    try:
        _forget()
        yield
    finally:
        optimizer_rows.load = transitions.load = original  # type: ignore[attr-defined]
        _forget()


def _forget() -> None:
    for cached in _CACHES:
        cached.cache_clear()


def crossing() -> tuple[str, ...]:
    """Algorithms with a case that goes from one framework to another."""
    found = {case.algorithm for case in cases().values() if any(a != b for a, b in pairs(case))}
    return tuple(sorted(found))


def claims() -> Iterator[Claim]:
    """Every wrong claim about an algorithm that crosses, but for the steps."""
    for algorithm in crossing():
        rows = [known for framework in FRAMEWORKS if (known := row(algorithm, framework)) is not None]
        for known in rows:
            yield from _signs(known)
            yield from _forms(known)
            yield from _slots(known)
            yield from _betas(known)
            yield from _part(known)
            yield from _neutrals(known)
        if rows[0].family == algorithm:
            yield from _amounts(algorithm)


def _tried(known: Row) -> set[str]:
    """Slots, in the parameter's shape, of which some case has values."""
    mine = [case for case in cases().values() if case.algorithm == known.algorithm]
    present = {slot for case in mine for slot in known.slots_present(case.hypers)}
    return {slot for slot in present if known.slot_shapes.get(slot) != "scalar"}


def _rows_of(family: str) -> Iterator[Row]:
    for algorithm in algorithms():
        for framework in FRAMEWORKS:
            known = row(algorithm, framework)
            if known is not None and known.family == family:
                yield known


def _forms_of(known: Row) -> Iterator[tuple[str, str]]:
    """(point, form) of a class, whatever it is told."""
    for form in (known.base_form, *known.switches.values(), *known.form_when.values()):
        yield from form.items()


def _signs(known: Row) -> Iterator[Claim]:
    def form(data: dict[str, Any]) -> None:
        data["frameworks"][known.framework]["form"]["sign"] = "turned"

    of_part = {known.part.told_by} if known.part is not None else set()  # its row claims that
    for slot in sorted(_tried(known) - of_part):

        def transition(data: dict[str, Any], slot: str = slot) -> None:
            turned = {"verdict": "exact", "slots": {slot: {"scale": {"coefficient": -1}}}}
            data.setdefault("transitions", {})["sign: None <-> turned"] = turned

        yield _claim(known, "sign", slot, form, {known.family: transition}, {slot})


def _forms(known: Row) -> Iterator[Claim]:
    known_forms = {form for relative in _rows_of(known.family) for form in _forms_of(relative)}
    decays = any(c.algorithm == known.algorithm and c.hypers.get("weight_decay") for c in cases().values())
    for point, value in known.base_form.items():
        if point in TOO_SMALL or (point == "weight_decay" and not decays):
            continue
        for other in sorted(form for at, form in known_forms if at == point and form != value):

            def change(data: dict[str, Any], point: str = point, other: str = other) -> None:
                data["frameworks"][known.framework]["form"][point] = other

            yield _claim(known, "form", f"{point} {other}", change)
    for kind in ("switches", "form_when"):
        for name, points in getattr(known, kind).items():
            if points.keys() == {"weight_decay"} and not decays:
                continue

            def forget(data: dict[str, Any], kind: str = kind, name: str = name) -> None:
                del data["frameworks"][known.framework][kind][name]

            yield _claim(known, "form", f"without {name}", forget)


def _slots(known: Row) -> Iterator[Claim]:
    for one, other in combinations(sorted(_tried(known)), 2):

        def change(data: dict[str, Any], one: str = one, other: str = other) -> None:
            slots = data["frameworks"][known.framework]["slots"]
            if known.interleaved:  # in their file they have no names but an order
                names = {one: other, other: one}
                data["frameworks"][known.framework]["slots"] = {
                    name: slots[name] for name in (names.get(slot, slot) for slot in slots)
                }
            else:
                for name in ("key", "variable"):
                    if name in slots[one]:
                        slots[one][name], slots[other][name] = slots[other][name], slots[one][name]

        yield _claim(
            known, "slots", f"{one} {other}", change, dict.fromkeys(_twins(known), change), {one, other}
        )


def _twins(known: Row) -> Iterator[str]:
    """Algorithms with the same keys: where a file does not tell which, it is read by the first one's row."""
    for algorithm in algorithms():
        other = row(algorithm, known.framework)
        if other is not None and algorithm != known.algorithm and known.slots.items() <= other.slots.items():
            yield algorithm


def _betas(known: Row) -> Iterator[Claim]:
    for one, other in (("beta_1", "beta_2"), ("adam_beta_1", "adam_beta_2")):
        if not {one, other} <= known.hyperparameters.keys():
            continue

        def change(data: dict[str, Any], one: str = one, other: str = other) -> None:
            own = data["frameworks"][known.framework]["hyperparameters"]
            own[one], own[other] = own[other], own[one]

        yield _claim(known, "betas", f"{one} {other}", change)


def _part(known: Row) -> Iterator[Claim]:
    """What a class of two algorithms says of the other one: its slots in another order."""
    if known.part is None:
        return
    one, other = known.part.slots

    def slots(data: dict[str, Any]) -> None:
        own = data["frameworks"][known.framework]["part"]["slots"]
        own[one], own[other] = own[other], own[one]

    yield _claim(known, "slots", f"{known.part.algorithm}'s", slots)


def _neutrals(known: Row) -> Iterator[Claim]:
    """What a class behaves as if it were told, with another value."""
    table: Any = loading.load(f"optimizers/{known.algorithm}.json")._data
    for name, value in table["frameworks"][known.framework].get("neutral", {}).items():

        def change(data: dict[str, Any], name: str = name, value: float = value) -> None:
            data["frameworks"][known.framework]["neutral"][name] = value / 2

        yield _claim(known, "amount", f"half {name}", change)


def _amounts(family: str) -> Iterator[Claim]:
    """Each amount of each transition with one factor too few, a slot's with another sign, too."""
    forms = {form for known in _rows_of(family) for form in _forms_of(known)}
    table: Any = loading.load(f"optimizers/{family}.json")._data
    for name, data in table.get("transitions", {}).items():
        point, before, _, after = name.replace(":", "").split()
        if not {(point, before), (point, after)} <= forms:
            continue  # a class of TensorFlow 1's
        amounts = [("slots", slot, kind) for slot, change in data.get("slots", {}).items() for kind in change]
        amounts += [("settings", hyperparameter) for hyperparameter in data.get("settings", {})]
        for path in amounts:
            amount = data
            for key in path:
                amount = amount[key]
            for what, wrong in _wrong(amount, signed=path[0] == "slots"):

                def change(
                    table: dict[str, Any],
                    path: tuple[str, ...] = path,
                    wrong: Mapping[str, float] = wrong,
                    name: str = name,
                ) -> None:
                    inner = table["transitions"][name]
                    for key in path[:-1]:
                        inner = inner[key]
                    inner[path[-1]] = wrong

                yield Claim(
                    algorithm=family,
                    kind="amount",
                    what=f"{name} {path[1]} {what}",
                    changes={family: change},
                    slots=frozenset(path[1:2]) if path[0] == "slots" else frozenset(),
                )


def _wrong(amount: Mapping[str, float], *, signed: bool) -> Iterator[tuple[str, dict[str, float]]]:
    if signed:
        yield "turned", {**amount, "coefficient": -amount.get("coefficient", 1)}
    for factor in amount:
        yield f"without {factor}", {name: power for name, power in amount.items() if name != factor}


def _claim(
    known: Row,
    kind: str,
    what: str,
    change: Change,
    more: Mapping[str, Change] = MappingProxyType({}),
    slots: Set[str] = frozenset(),
) -> Claim:
    changes: dict[str, Change] = dict(more)
    also = changes.get(known.algorithm)

    def both(data: dict[str, Any]) -> None:
        change(data)
        if also is not None:
            also(data)

    changes[known.algorithm] = both
    return Claim(
        algorithm=known.algorithm,
        framework=known.framework,
        kind=kind,
        what=what,
        changes=changes,
        slots=frozenset(slots),
    )
