"""Which parameter of the source is which of the target, and what happens to its axes on the way.

Source and template are compared module by module: first by name, then by their order, and only where one
assignment alone is possible. A layout operation follows from named axes on both sides; where two
operations fit and nothing declares which, that is a problem and not a guess.

What is matched by order is taken in the order of declaration on both sides. Two models that declare layers of
equal shape in different orders, and do not name them alike, cannot be told from two that agree: the report
says `matched by structure` of every such parameter.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from ckptconv.catalog import layers
from ckptconv.catalog.axes import element_order
from ckptconv.document import Checkpoint, Evidence, Param
from ckptconv.errors import Problem
from ckptconv.ops import Permute
from ckptconv.tensor import MissingTensor, Op, TensorRef

NameEvidence = Literal["name", "structure", "alias"]

ASSUMED_LAYOUT = "assumed-layout"
"""The loss code that lets a framework's convention decide a layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One target parameter and the source parameter that makes it."""

    source: str
    target: str
    ops: tuple[Op, ...]
    matched_by: NameEvidence
    layout: Evidence
    """Why the axes are known: the weaker one of both sides' evidence."""
    reading: layers.Candidate | None = None
    """What the target's parameter is taken for, where the catalog has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A parameter of the source that the template ties to another one: one array stands for both."""

    source: str
    kept: str
    """The parameter of the source whose values stand for both."""
    equal: bool
    """Whether both, and what optimizers hold for them, are equal bit for bit: nothing is lost then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """Every target parameter with its one producer, and what has no partner."""

    pairs: tuple[Pair, ...]
    target_only: tuple[str, ...]
    """Parameters that only the target's framework has; the template's values stay."""
    source_only: tuple[str, ...]
    """Parameters that only the source's framework has, or aliases of others."""
    merged: tuple[Merge, ...] = ()
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """Parameters that stand under one name, by the last part of their names."""

    name: tuple[str, ...]
    params: tuple[Param, ...]
    framework: str

    @property
    def label(self) -> str:
        return ".".join(self.name) or "(root)"

    @property
    def is_alias(self) -> bool:
        """Whether all of it shares memory with other parameters."""
        return all(param.tied_to is not None for param in self.params)


class _Way(NamedTuple):
    """How the axes of one parameter become those of another."""

    ops: tuple[Op, ...]
    reading: layers.Candidate | None
    """What the target's is taken for."""
    text: str
    """The reading of the side that has more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """How one module becomes another: per target parameter its source, its operation and the evidence."""

    pairs: tuple[tuple[Param, Param, _Way, Evidence], ...]
    ambiguous: tuple[Problem, ...]
    target_only: tuple[Param, ...]
    source_only: tuple[Param, ...]


def match(source: Checkpoint, template: Checkpoint, *, frameworks: tuple[str, str]) -> Cover:
    """Find the producer of every parameter of the template.

    `frameworks` are the catalog columns of source and template. Ambiguous layouts are reported as
    `layout-ambiguous` beside the pair that the convention would give, so that a caller who allows
    `assumed-layout` can go on with it.
    """
    sources = _modules(source.params, frameworks[0])
    targets = _modules(template.params, frameworks[1])
    fits = _fits(sources, targets)
    chosen = _by_name(sources, targets, fits)
    by_name = set(chosen)
    problems: list[Problem] = []
    if not all(_may_be_left(target) for j, target in enumerate(targets) if j not in chosen):
        found = _by_order(sources, targets, chosen, fits)
        if isinstance(found, Problem):
            # Not one partner is known: leaving all behind is no loss that a caller may allow.
            if found.code == "param-unmatched" and not chosen:
                found = replace(found, code="template-mismatch")
            problems.append(found)
        else:
            chosen.update(found)
    cover = _collect(source, template, targets, chosen, by_name, fits, problems)
    if _image_layout(frameworks[0]) == _image_layout(frameworks[1]):
        return cover
    return replace(cover, problems=(*cover.problems, *_behind_flatten(cover, template)))


Fits = Callable[[int, int], _Fit | None]
"""How the source module of an index makes the target module of another; None where it cannot."""


def _fits(sources: Sequence[_Module], targets: Sequence[_Module]) -> Fits:
    @cache
    def fits(i: int, j: int) -> _Fit | None:
        return fitting(sources[i], targets[j])

    return fits


def _image_layout(framework: str) -> str:
    """Where a framework's images have their channels."""
    return "channels-first" if framework == "torch" else "channels-last"


def _behind_flatten(cover: Cover, template: Checkpoint) -> Iterator[Problem]:
    """Dense layers whose rows may be the flattened positions of an image, in another order on each side.

    Suspicious is an input width that is a proper multiple of an earlier convolution's channels and that no
    earlier layer gives out.
    """
    channels: list[tuple[str, int]] = []
    widths: set[int] = set()
    for pair in cover.pairs:
        reading, shape = pair.reading, template.params[pair.target].tensor.shape
        if reading is None or len(shape) < 2:
            continue
        sizes = dict(zip(reading.axes, shape, strict=True))
        width = sizes.get("in")
        if reading.kind == "dense" and width is not None and width not in widths:
            behind = [(name, n) for name, n in channels if width > n > 1 and width % n == 0]
            if behind:
                name, n = behind[-1]
                yield Problem(
                    code="flatten-layout",
                    loc=("params", pair.target),
                    message=f"'{pair.target}' takes {width} inputs, {width // n} times the {n} channels of "
                    f"'{name}': behind a flatten its rows are in another order in the other framework",
                    hint="Pool instead of flattening, or --allow flatten-layout if no image is flattened.",
                )
        out = _outputs(sizes)
        if "conv" in reading.kind and out is not None and reading.kind != "gpt2_conv1d":
            channels.append((pair.target, out))
        if out is not None:
            widths.add(out)


def _outputs(sizes: Mapping[str, int]) -> int | None:
    """How many features a layer gives out, from the sizes of its kernel's axes."""
    if "multiplier" in sizes:
        return sizes["in"] * sizes["multiplier"]
    return next((sizes[axis] for axis in ("out", "features", "in*multiplier") if axis in sizes), None)


def _collect(
    source: Checkpoint,
    template: Checkpoint,
    targets: Sequence[_Module],
    chosen: Mapping[int, int],
    by_name: set[int],
    fits: Fits,
    problems: list[Problem],
) -> Cover:
    pairs: list[Pair] = []
    target_only: list[str] = []
    consumed: set[str] = set()
    source_only: list[str] = []
    in_order = not problems  # else what has no partner is a consequence of the problem that is known already
    for j, target in enumerate(targets):
        if j not in chosen:
            aliases = [p for p in target.params if p.tied_to is not None]
            free = [p for p in target.params if layers.is_framework_only(p.role)]
            lacking = [p for p in target.params if p not in aliases and p not in free]
            target_only += [p.name for p in free]
            problems += [_unmatched(p, source.params, "source") for p in lacking if in_order]
            continue
        fit = fits(chosen[j], j)
        assert fit is not None
        evidence: NameEvidence = "name" if j in by_name else "structure"
        for made_from, made, way, layout in fit.pairs:
            pairs.append(
                Pair(
                    source=made_from.name,
                    target=made.name,
                    ops=way.ops,
                    matched_by=evidence,
                    layout=layout,
                    reading=way.reading,
                )
            )
            consumed.add(made_from.name)
        problems += fit.ambiguous
        target_only += [p.name for p in fit.target_only]
        source_only += [p.name for p in fit.source_only]
        consumed |= {p.name for p in fit.source_only}
    pairs += _aliases(template, pairs, problems)
    problems += _untied(source, template, pairs)
    pairs, merged = _tied(source, template, pairs)
    problems += (_tie_problem(merge) for merge in merged if not merge.equal)
    produced = {pair.target for pair in pairs}
    for name, param in source.params.items():
        if name in consumed:
            continue
        if param.tied_to is not None or layers.is_framework_only(param.role):
            source_only.append(name)
        elif in_order:
            problems.append(_unmatched(param, template.params, "template"))
    order = {name: i for i, name in enumerate(template.params)}
    pairs.sort(key=lambda pair: order[pair.target])
    return Cover(
        pairs=tuple(pairs),
        target_only=tuple(name for name in target_only if name not in produced),
        source_only=tuple(source_only),
        merged=merged,
        problems=tuple(problems),
    )


def _aliases(template: Checkpoint, pairs: Sequence[Pair], problems: list[Problem]) -> Iterator[Pair]:
    """Tied parameters of the template: made like the one that they are tied to."""
    by_target = {pair.target: pair for pair in pairs}
    for name, param in template.params.items():
        if param.tied_to is None or name in by_target:
            continue
        first = by_target.get(param.tied_to)
        if first is None:
            problems.append(
                Problem(
                    code="param-unmatched",
                    loc=("params", name),
                    message=f"'{name}' is tied to '{param.tied_to}', which has no producer",
                    hint="Check that the template is of the same model.",
                )
            )
            continue
        yield Pair(source=first.source, target=name, ops=first.ops, matched_by="alias", layout=first.layout)


def _untied(source: Checkpoint, template: Checkpoint, pairs: Sequence[Pair]) -> Iterator[Problem]:
    """Parameters that share their memory in the source alone."""
    partners: dict[str, list[Pair]] = {}
    for pair in pairs:
        partners.setdefault(source.params[pair.source].tied_to or pair.source, []).append(pair)
    for name, made in partners.items():
        groups = {template.params[pair.target].tied_to or pair.target for pair in made}
        if len(groups) > 1:
            yield Problem(
                code="tie-mismatch",
                loc=("params", name),
                message=f"'{name}' is one parameter in the source and {len(groups)} in the template "
                f"({', '.join(sorted(groups))}): they would be trained apart",
                hint="Tie them in the template, or --allow tie-mismatch to give each of them its values.",
            )


def _tied(
    source: Checkpoint, template: Checkpoint, pairs: Sequence[Pair]
) -> tuple[list[Pair], tuple[Merge, ...]]:
    """The pairs where what the template ties has one producer, and the parameters that have lost their place.

    I/O: reads parameters that the template alone ties, and their slots.
    """
    by_target = {pair.target: pair for pair in pairs}
    made: list[Pair] = []
    merged: list[Merge] = []
    for pair in pairs:
        first = by_target.get(template.params[pair.target].tied_to or pair.target, pair)
        ours, kept = (source.params[p.source].tied_to or p.source for p in (pair, first))
        if ours == kept:
            made.append(pair)
            continue
        made.append(replace(first, target=pair.target, matched_by="alias"))
        merged.append(Merge(source=pair.source, kept=first.source, equal=_are_equal(source, ours, kept)))
    return made, tuple(merged)


def _are_equal(source: Checkpoint, name: str, other: str) -> bool:
    """Whether two parameters and all that optimizers hold for them are equal, bit for bit."""
    pairs = [(source.params[name].tensor, source.params[other].tensor)]
    for optimizer in source.optimizers:
        if optimizer.param_steps.get(name) != optimizer.param_steps.get(other):
            return False
        for by_param in optimizer.slots.values():
            if (name in by_param) != (other in by_param):
                return False
            if name in by_param:
                pairs.append((by_param[name], by_param[other]))
    if any(isinstance(tensor, MissingTensor) for pair in pairs for tensor in pair):
        return False
    return all(a.spec == b.spec and _digest(a) == _digest(b) for a, b in pairs)


def _digest(tensor: TensorRef) -> bytes:
    digest = hashlib.sha256()
    for window in tensor.windows():
        digest.update(window.data)
    return digest.digest()


def _tie_problem(merge: Merge) -> Problem:
    return Problem(
        code="tie-mismatch",
        loc=("params", merge.source),
        message=f"'{merge.source}' and '{merge.kept}' are one parameter in the template and two in the "
        "source, with different values or optimizer state",
        hint=f"Use a template that does not tie them, or --allow tie-mismatch to keep '{merge.kept}' alone.",
    )


def _modules(params: Mapping[str, Param], framework: str) -> list[_Module]:
    grouped: dict[tuple[str, ...], list[Param]] = {}
    for name, param in params.items():
        grouped.setdefault(_parts(name)[:-1], []).append(param)
    return [_Module(name=key, params=tuple(group), framework=framework) for key, group in grouped.items()]


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[./]", name) if part)


def _normalized(modules: Sequence[_Module]) -> list[tuple[str, ...]]:
    """Names without the parts that all modules of a side begin with."""
    names = [module.name for module in modules]
    common = 0
    if len(names) > 1:
        shortest = min(len(name) for name in names)
        while common < shortest and len({name[common] for name in names}) == 1:
            common += 1
    return [tuple(part.lower().lstrip("_") for part in name[common:]) for name in names]


def _by_name(sources: Sequence[_Module], targets: Sequence[_Module], fits: Fits) -> dict[int, int]:
    """Target index -> source index of modules with the same name and shapes that fit.

    A number is a name only where all modules have partners of the same name: `2` of one side may be the
    second layer of a list, and of the other the third.
    """
    by_source: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(_normalized(sources)):
        by_source.setdefault(name, []).append(i)
    names = _normalized(targets)
    uses = Counter(names)
    chosen: dict[int, int] = {}
    for j, name in enumerate(names):
        partners = by_source.get(name, [])
        if len(partners) == 1 and uses[name] == 1 and fits(partners[0], j):
            chosen[j] = partners[0]
    taken = set(chosen.values())
    left_s = [module for i, module in enumerate(sources) if i not in taken]
    left_t = [module for j, module in enumerate(targets) if j not in chosen]
    if all(_may_be_left(module) for module in (*left_s, *left_t)):
        return chosen
    return {j: i for j, i in chosen.items() if not any(part.isdecimal() for part in names[j])}


def _by_order(
    sources: Sequence[_Module], targets: Sequence[_Module], anchors: Mapping[int, int], made: Fits
) -> dict[int, int] | Problem:
    """Assign all modules in their order, where exactly one assignment is possible.

    Modules that are matched by name (`anchors`) keep their partners. Modules that are aliases, or that only
    their framework has, may be left out; no other may.
    """
    owners = {i: j for j, i in anchors.items()}

    def fits(i: int, j: int) -> bool:
        if i in owners or j in anchors:
            return anchors.get(j) == i
        return made(i, j) is not None

    s_free = [i not in owners and _may_be_left(module) for i, module in enumerate(sources)]
    t_free = [j not in anchors and _may_be_left(module) for j, module in enumerate(targets)]
    n, m = len(sources), len(targets)
    # ways[a][b]: assignments of the modules from a and b on, counted up to 2. Only a narrow band can be
    # reached: the two orders part by no more than the modules that may be left out.
    band = max(sum(s_free), sum(t_free)) + abs(n - m)
    ways = [dict[int, int]() for _ in range(n + 1)]
    reachable: dict[tuple[int, int], bool] = {}
    for a in range(n, -1, -1):
        for b in range(min(m, a + band), max(-1, a - band - 1), -1):
            if (a, b) == (n, m):
                ways[a][b] = 1
                continue
            total = 0
            if a < n and b < m and ways[a + 1].get(b + 1):
                reachable[a, b] = fits(a, b)
                total += ways[a + 1][b + 1] if reachable[a, b] else 0
            if a < n and s_free[a]:
                total += ways[a + 1].get(b, 0)
            if b < m and t_free[b] and not (a < n and s_free[a]):
                total += ways[a].get(b + 1, 0)
            ways[a][b] = min(total, 2)
    if not ways[0].get(0):
        return _no_order(sources, targets, anchors, fits)
    if ways[0][0] > 1:
        rest = [j for j in range(m) if j not in anchors]
        labels = ", ".join(targets[j].label for j in rest[:5])
        return Problem(
            code="param-unmatched",
            loc=("params", targets[rest[0]].params[0].name),
            message=f"more than one assignment fits the modules {labels}",
            hint="Give both sides the same module names.",
        )
    chosen = {}
    a = b = 0
    while (a, b) != (n, m):
        if reachable.get((a, b)) and ways[a + 1][b + 1]:
            chosen[b] = a
            a, b = a + 1, b + 1
        elif a < n and s_free[a] and ways[a + 1].get(b):
            a += 1
        else:
            b += 1
    return chosen


def _may_be_left(module: _Module) -> bool:
    return module.is_alias or all(layers.is_framework_only(param.role) for param in module.params)


def _no_order(
    sources: Sequence[_Module],
    targets: Sequence[_Module],
    anchors: Mapping[int, int],
    fits: Callable[[int, int], bool],
) -> Problem:
    """The first place where the two orders part, in words."""
    taken = set(anchors.values())
    rest_s = [i for i in range(len(sources)) if i not in taken]
    rest_t = [j for j in range(len(targets)) if j not in anchors]
    a = 0
    while a < min(len(rest_s), len(rest_t)) and fits(rest_s[a], rest_t[a]):
        a += 1
    if a < min(len(rest_s), len(rest_t)):
        left, right = sources[rest_s[a]], targets[rest_t[a]]
        return Problem(
            code="shape-mismatch",
            loc=("params", right.params[0].name),
            message=f"the template's module '{right.label}' {_shapes(right)} comes where the source has "
            f"'{left.label}' {_shapes(left)}: no layout makes one the other",
            hint="Use a template of the same architecture, its layers declared in the same order or named "
            "alike.",
        )
    if a == len(rest_s) == len(rest_t):
        right = targets[rest_t[0]]
        return Problem(
            code="param-unmatched",
            loc=("params", right.params[0].name),
            message="some modules have the same names on both sides, but stand in another order than the "
            "others",
            hint="Name all modules alike on both sides.",
        )
    extra, side = (sources[rest_s[a]], "source") if a < len(rest_s) else (targets[rest_t[a]], "template")
    other = "template" if side == "source" else "source"
    return Problem(
        code="param-unmatched",
        loc=("params", extra.params[0].name),
        message=f"'{extra.label}' {_shapes(extra)} of the {side} has no partner in the {other} "
        f"({len(sources)} modules in the source, {len(targets)} in the template)",
        hint="Use a template of the same model.",
    )


def _shapes(module: _Module) -> str:
    parts = (f"{_parts(p.name)[-1]} {list(p.tensor.shape)}" for p in module.params)
    return "(" + ", ".join(parts) + ")"


def fitting(source: _Module, target: _Module) -> _Fit | None:
    """How the source module makes the target module, or None where it cannot."""
    readings_s = {p.name: _readings(p, source) for p in source.params}
    readings_t = {p.name: _readings(p, target) for p in target.params}
    pairs: list[tuple[Param, Param, _Way, Evidence]] = []
    ambiguous: list[Problem] = []
    target_only: list[Param] = []
    used: set[str] = set()
    for made in target.params:
        options: list[tuple[Param, _Way]] = []
        for candidate in source.params:
            if candidate.name in used:
                continue
            for way in _layouts(
                candidate,
                readings_s[candidate.name],
                made,
                readings_t[made.name],
                same_framework=source.framework == target.framework,
            ):
                options.append((candidate, way))
        names = list(dict.fromkeys(option[0].name for option in options))
        if not names:
            if layers.is_framework_only(made.role):
                target_only.append(made)
                continue
            return None
        if len(names) > 1:
            same = [option for option in options if _leaf(option[0]) == _leaf(made)]
            if len({option[0].name for option in same}) != 1:
                return None
            options = same
        made_from, way = options[0]
        if len({element_order(option[1].ops, made_from.tensor.shape) for option in options}) > 1:
            open_side = "source" if len(readings_s[made_from.name]) != 1 else "target"
            ambiguous.append(_ambiguous(made_from, made, open_side, [option[1].text for option in options]))
            evidence: Evidence = "assumed"
        else:
            evidence = _weaker(made_from, made)
        pairs.append((made_from, made, way, evidence))
        used.add(made_from.name)
    left = [p for p in source.params if p.name not in used]
    if any(not layers.is_framework_only(p.role) and p.tied_to is None for p in left):
        return None
    return _Fit(
        pairs=tuple(pairs),
        ambiguous=tuple(ambiguous),
        target_only=tuple(target_only),
        source_only=tuple(left),
    )


def _readings(param: Param, module: _Module) -> tuple[layers.Candidate, ...]:
    """What the parameter may be: what is declared, else every catalog row that fits its name and rank."""
    if param.evidence in ("declared", "named") and param.axes is not None:
        return (layers.Candidate(kind=param.layer, role=param.role, axes=param.axes),)
    if param.candidates:
        return tuple(layers.Candidate(c.layer, c.role, c.axes) for c in param.candidates)
    siblings = {_parts(other.name)[-1]: other.tensor.shape for other in module.params}
    return layers.candidates(module.framework, _parts(param.name)[-1], param.tensor.shape, siblings)


def _layouts(
    source: Param,
    readings_s: Sequence[layers.Candidate],
    target: Param,
    readings_t: Sequence[layers.Candidate],
    *,
    same_framework: bool,
) -> Iterator[_Way]:
    """Each way in which the source's axes can be brought into the target's order, with its name."""
    before, after = source.tensor.shape, target.tensor.shape
    for reading_t in readings_t:
        for reading_s in readings_s:
            if reading_s.role != reading_t.role or not layers.same_layer(reading_s.kind, reading_t.kind):
                continue
            if same_framework and len(readings_s) > 1 and reading_s.kind != reading_t.kind:
                continue  # one framework's file and another one's of the same model: the same class
            ops = layers.layout_ops(reading_s.axes, before, reading_t.axes, after)
            if ops is not None:
                told = reading_s if len(readings_s) > 1 else reading_t
                text = f"{told.kind} ({', '.join(told.axes)})"
                yield _Way(_moving(ops, before, after), reading_t, text)
    if not readings_s and not readings_t and before == after and _leaf(source) == _leaf(target):
        yield _Way((), None, "the same axes")
        sizes = [size for size in before if size > 1]
        if not same_framework and len(set(sizes)) < len(sizes):
            yield _Way((_UNKNOWN_ORDER,), None, "axes of equal size in another order")


_UNKNOWN_ORDER = Permute(())
"""Stands for an order of axes that cannot be told; never applied, since it makes a layout ambiguous."""


def _leaf(param: Param) -> str:
    return _parts(param.name)[-1].lstrip("_")


def _moving(ops: tuple[Op, ...], before: tuple[int, ...], after: tuple[int, ...]) -> tuple[Op, ...]:
    """The ops, none where the bytes stay where they are: axes with one element are moved for nothing."""
    still = before == after and element_order(ops, before) == element_order((), before)
    return () if still else ops


_STRENGTH: tuple[Evidence, ...] = ("declared", "named")


def _weaker(source: Param, target: Param) -> Evidence:
    """Both sides' own evidence; where one has none, the other's kind and the shape tell its axes."""
    if {source.evidence, target.evidence} <= {"declared", "named"}:
        return max(source.evidence, target.evidence, key=_STRENGTH.index)
    return "matched"


def _ambiguous(source: Param, target: Param, side: str, readings: Sequence[str]) -> Problem:
    """`side`: whose axes are not known, `source` or `target`."""
    param, option = (source, "--source-spec") if side == "source" else (target, "--template")
    return Problem(
        code="layout-ambiguous",
        loc=("params", param.name),
        message=f"'{param.name}' {list(param.tensor.shape)} of the {side} may be "
        f"{' or '.join(dict.fromkeys(readings))}, and the shape does not tell which",
        hint=f"Pass {option} with a skeleton of the {side} model (describe()), "
        f"or --allow {ASSUMED_LAYOUT} to take the first reading.",
    )


def _unmatched(param: Param, others: Mapping[str, Param], side: str) -> Problem:
    close = difflib.get_close_matches(param.name, list(others), n=1)
    return Problem(
        code="param-unmatched",
        loc=("params", param.name),
        message=f"'{param.name}' {list(param.tensor.shape)} has no partner in the {side}"
        + (f" (did you mean '{close[0]}'?)" if close else ""),
        hint="Use a template of the same model.",
    )
