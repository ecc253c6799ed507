"""The names of two checkpoints set against each other: a mapping file to start from, and what one covers.

draft_mapping(source, template) -> MappingFile
check_mapping(mapping, source, template) -> Coverage
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ckptconv.detect import PathLike
from ckptconv.document import Checkpoint
from ckptconv.errors import MappingError, Problem
from ckptconv.goal import document_of
from ckptconv.mapping_draft import draft
from ckptconv.mapping_file import MappingFile, MappingLike, Rule, axes_text, mapping_of
from ckptconv.mapping_rules import Ruled, ruled
from ckptconv.matching import Matching, framework_of, matched
from ckptconv.schema import problem_to_json
from ckptconv.spec import BY_TEMPLATE_SPEC, apply_spec
from ckptconv.strictjson import Json
from ckptconv.telling import Side, told


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """What one rule names in two checkpoints."""

    rule: Rule
    count: int
    """How often it applies: once for each number that completes its names."""
    axes: tuple[str, ...]
    """How the axes correspond, left and right; several where the catalog tells and they differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What a mapping file says of two checkpoints, and what is matched without it."""

    source_is_right: bool
    """Whether the source is the file's right side."""
    rules: tuple[Covered, ...]
    by_itself: tuple[tuple[str, str, str], ...]
    """Parameters of source and template that are matched without a rule, and by what."""
    source_only: tuple[str, ...]
    """Parameters that stay behind, by the mapping file or because only their framework has them."""
    template_only: tuple[str, ...]
    problems: tuple[Problem, ...]


def draft_mapping(
    source: PathLike | Checkpoint,
    template: PathLike | Checkpoint,
    *,
    mapping: MappingLike | None = None,
    source_spec: PathLike | Checkpoint | None = None,
    template_spec: PathLike | Checkpoint | None = None,
) -> MappingFile:
    """A mapping file for the two: all that is matched by itself as rules, the rest in `unmatched`.

    `mapping`: one that is begun; its rules stay as they are.
    Raises: what reading either checkpoint and the mapping file raises, mapping-invalid.
    """
    begun = None if mapping is None else mapping_of(mapping)
    found = _matched(source, template, source_spec, template_spec, begun)
    wrong = [problem for problem in found.rules.problems if problem.code != "param-unmatched"]
    if wrong:
        raise MappingError(*wrong)
    return draft(found, begun)


def check_mapping(
    mapping: MappingLike,
    source: PathLike | Checkpoint,
    template: PathLike | Checkpoint,
    *,
    source_spec: PathLike | Checkpoint | None = None,
    template_spec: PathLike | Checkpoint | None = None,
) -> Coverage:
    """What the mapping covers of the two; unused rules and names without a partner are in its problems."""
    rules = mapping_of(mapping)
    found = _matched(source, template, source_spec, template_spec, rules)
    return _coverage(found, rules)


def _matched(
    source: PathLike | Checkpoint,
    template: PathLike | Checkpoint,
    source_spec: PathLike | Checkpoint | None,
    template_spec: PathLike | Checkpoint | None,
    mapping: MappingFile | None,
) -> Matching:
    ours, theirs = document_of(source), document_of(template)
    if source_spec is not None:
        ours = apply_spec(ours, document_of(source_spec))
    if template_spec is not None:
        theirs = apply_spec(theirs, document_of(template_spec), BY_TEMPLATE_SPEC)
    frameworks = (framework_of(ours), framework_of(theirs))
    rules = ruled(mapping, ours, theirs, frameworks) if mapping is not None else Ruled()
    return matched(ours, theirs, frameworks, rules)


def _coverage(found: Matching, mapping: MappingFile) -> Coverage:
    rules, cover = found.rules, found.cover
    by_target = {pair.target: pair for pair in cover.pairs}
    axes: dict[int, list[str]] = {}
    for one in rules.told:
        pair = by_target.get(one.target)
        if pair is not None and pair.axes is not None:
            ours, theirs = pair.axes[::-1] if rules.is_reversed else pair.axes
            axes.setdefault(one.position, []).append(axes_text((ours, theirs)))
    covered = (
        Covered(
            rule=rule,
            count=len(rules.uses[k]) if k < len(rules.uses) else 0,
            axes=tuple(dict.fromkeys(axes.get(k, ()))),
        )
        for k, rule in enumerate(mapping.rules)
    )
    told_targets = {one.target for one in rules.told}
    judged = {problem.loc for problem in rules.problems}
    return Coverage(
        source_is_right=rules.is_reversed,
        rules=tuple(covered),
        by_itself=tuple(
            (found.source.file_name(pair.source), found.target.file_name(pair.target), pair.matched_by)
            for pair in cover.pairs
            if pair.target not in told_targets
        ),
        source_only=_names(found.source, (*sorted(rules.source_only), *cover.source_only)),
        template_only=_names(found.target, (*sorted(rules.target_only), *cover.target_only)),
        problems=(
            *rules.problems,
            *(
                problem
                for one in cover.problems
                if (problem := told(one, (found.source, found.target))).loc not in judged
            ),
        ),
    )


def _names(side: Side, pieces: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(side.file_name, pieces)))


def coverage_to_json(coverage: Coverage) -> dict[str, Json]:
    """The coverage as the command line prints it."""
    return {
        "source": "right" if coverage.source_is_right else "left",
        "rules": [
            {
                "left": [str(name) for name in one.rule.left],
                "right": [str(name) for name in one.rule.right],
                "line": one.rule.line,
                "applies": one.count,
                "axes": list(one.axes),
            }
            for one in coverage.rules
        ],
        "by_itself": [
            {"source": source, "template": target, "matched_by": why}
            for source, target, why in coverage.by_itself
        ],
        "source_only": list(coverage.source_only),
        "template_only": list(coverage.template_only),
        "problems": list(map(problem_to_json, coverage.problems)),
    }
