"""Which parameter of the source is which of the target, and what happens to its axes on the way.

What a mapping file says comes first. The rest of source and template is compared module by module: by name,
then by what each takes and gives where both sides tell (`dataflow`), then by their order, and only where one
assignment alone is possible. A layout operation
follows from named axes on both sides; where two operations fit and nothing declares which, that is a problem
and not a guess.

What is matched by order is taken in the order of declaration on both sides. Two models that declare layers of
equal shape in different orders, and do not name them alike, cannot be told from two that agree: the report
says `matched by structure` of every such parameter. A file of TensorFlow 1 has no order of declaration:
there, what names and counters in names do not match has to fit one partner alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptconv.alignment import Fits, by_name, by_order, by_shape, fits_of, is_counted
from ckptconv.catalog import layers
from ckptconv.catalog.flatten import CHANNELS_FIRST
from ckptconv.dataflow import by_flow
from ckptconv.document import Checkpoint, Site
from ckptconv.errors import Problem
from ckptconv.fitting import Module, may_be_left, modules, parts
from ckptconv.mapping_rules import Ruled
from ckptconv.ties import Merge, NameEvidence, Pair, tie_problem, tied, untied
from ckptconv.told_layout import told_pair

_NO_RULES = Ruled()
_UNORDERED = frozenset({"tf1"})
"""Frameworks whose files do not keep the order in which the model declares its variables."""


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


def match(
    source: Checkpoint, template: Checkpoint, *, frameworks: tuple[str, str], ruled: Ruled = _NO_RULES
) -> Cover:
    """Find the producer of every parameter of the template.

    `frameworks` are the catalog columns of source and template, `ruled` is what a mapping file says.
    Ambiguous layouts are reported as `layout-ambiguous` beside the pair that the convention would give, so
    that a caller who allows `assumed-layout` can go on with it.
    """
    told, wrong = _told(source, template, frameworks, ruled)
    sources = modules(source.params, frameworks[0], ruled.sources)
    targets = modules(template.params, frameworks[1], ruled.targets)
    fits = fits_of(sources, targets)
    chosen = _rest_of_modules(sources, targets, ruled, fits)
    evidence: dict[int, NameEvidence] = dict.fromkeys(chosen, "mapping")
    free_s = [i for i in range(len(sources)) if i not in chosen.values()]
    free_t = [j for j in range(len(targets)) if j not in chosen]
    found, by, problems = _assigned(
        [sources[i] for i in free_s], [targets[j] for j in free_t], frameworks, (source.flow, template.flow)
    )
    chosen.update((free_t[j], free_s[i]) for j, i in found.items())
    evidence |= {free_t[j]: why for j, why in by.items()}
    if problems and not chosen and not told:
        # Not one partner is known: leaving all behind is no loss that a caller may allow.
        problems = [
            replace(p, code="template-mismatch") if p.code == "param-unmatched" else p for p in problems
        ]
    cover = _collect(source, template, targets, chosen, evidence, fits, told, ruled, problems)
    cover = replace(cover, problems=(*wrong, *cover.problems))
    if len({framework in CHANNELS_FIRST for framework in frameworks}) == 1:
        return cover
    return replace(cover, problems=(*cover.problems, *_behind_flatten(cover, template)))


def _assigned(
    sources: Sequence[Module],
    targets: Sequence[Module],
    frameworks: tuple[str, str],
    flows: tuple[Sequence[Site], Sequence[Site]],
) -> tuple[dict[int, int], dict[int, NameEvidence], list[Problem]]:
    """Target index -> source index of modules without a rule, and by what; what stands in the way."""
    fits = fits_of(sources, targets)
    chosen = by_name(sources, targets, fits)
    evidence: dict[int, NameEvidence] = dict.fromkeys(chosen, "name")
    if all(flows):
        flowing = by_flow(sources, targets, chosen, fits, flows)
        evidence |= dict.fromkeys(flowing.keys() - chosen.keys(), "flow")
        chosen.update(flowing)
    if all(may_be_left(target) for j, target in enumerate(targets) if j not in chosen):
        return chosen, evidence, []
    unordered = any(
        framework in _UNORDERED and not is_counted(side)
        for framework, side in zip(frameworks, (sources, targets), strict=True)
    )
    found = (by_shape if unordered else by_order)(sources, targets, chosen, fits)
    if isinstance(found, Problem):
        return chosen, evidence, [found]
    return found, evidence, []


def _told(
    source: Checkpoint, template: Checkpoint, frameworks: tuple[str, str], ruled: Ruled
) -> tuple[list[Pair], list[Problem]]:
    """The pairs of the mapping file's rules, and what is wrong with them."""
    if not ruled.told:
        return [], []
    homes = (_homes(source, frameworks[0]), _homes(template, frameworks[1]))
    found = [
        told_pair(
            one,
            (source.params[one.source], homes[0][parts(one.source)[:-1]]),
            (template.params[one.target], homes[1][parts(one.target)[:-1]]),
        )
        for one in ruled.told
    ]
    return (
        [pair for pair, _ in found if pair is not None],
        [problem for _, problem in found if problem is not None],
    )


def _homes(checkpoint: Checkpoint, framework: str) -> dict[tuple[str, ...], Module]:
    return {module.name: module for module in modules(checkpoint.params, framework)}


def _rest_of_modules(
    sources: Sequence[Module], targets: Sequence[Module], ruled: Ruled, fits: Fits
) -> dict[int, int]:
    """Target index -> source index of modules of which rules name a part: the rest goes the same way."""
    origin = {one.target: parts(one.source)[:-1] for one in ruled.told}
    index = {module.name: i for i, module in enumerate(sources) if module.beside}
    found: dict[int, int] = {}
    for j, target in enumerate(targets):
        origins = {origin[param.name] for param in target.beside if param.name in origin}
        i = index.get(next(iter(origins))) if len(origins) == 1 else None
        if i is not None and i not in found.values() and fits(i, j) is not None:
            found[j] = i
    return found


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
                    hint="Pass --source-spec or --template-spec with describe(model, inputs=batch) of either "
                    "model, which tells the image; or --allow flatten-layout if no image is flattened.",
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
    targets: Sequence[Module],
    chosen: Mapping[int, int],
    evidence: Mapping[int, NameEvidence],
    fits: Fits,
    told: Sequence[Pair],
    ruled: Ruled,
    problems: list[Problem],
) -> Cover:
    pairs = list(told)
    target_only: list[str] = []
    consumed = set(ruled.sources)
    source_only: list[str] = []
    for j, target in enumerate(targets):
        if j not in chosen:
            target_only += [p.name for p in target.params if layers.is_framework_only(p.role)]
            continue
        fit = fits(chosen[j], j)
        assert fit is not None
        for made_from, made, way, layout in fit.pairs:
            pairs.append(
                Pair(
                    source=made_from.name,
                    target=made.name,
                    ops=way.ops,
                    matched_by=evidence.get(j, "structure"),
                    layout=layout,
                    reading=way.reading,
                    axes=way.axes,
                )
            )
            consumed.add(made_from.name)
        problems += fit.ambiguous
        target_only += [p.name for p in fit.target_only]
        source_only += [p.name for p in fit.source_only]
        consumed |= {p.name for p in fit.source_only}
    pairs += _aliases(template, pairs, ruled, problems)
    problems += untied(source, template, pairs)
    pairs, merged = tied(source, template, pairs)
    problems += (tie_problem(merge) for merge in merged if not merge.equal)
    produced = {pair.target for pair in pairs}
    for name, param in source.params.items():
        if name in consumed:
            continue
        if param.tied_to is not None or layers.is_framework_only(param.role):
            source_only.append(name)
    order = {name: i for i, name in enumerate(template.params)}
    pairs.sort(key=lambda pair: order[pair.target])
    return Cover(
        pairs=tuple(pairs),
        target_only=tuple(name for name in target_only if name not in produced),
        source_only=tuple(source_only),
        merged=merged,
        problems=tuple(problems),
    )


def _aliases(
    template: Checkpoint, pairs: Sequence[Pair], ruled: Ruled, problems: list[Problem]
) -> Iterator[Pair]:
    """Tied parameters of the template: made like the one that they are tied to."""
    by_target = {pair.target: pair for pair in pairs}
    for name, param in template.params.items():
        if param.tied_to is None or name in by_target or name in ruled.target_only:
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
