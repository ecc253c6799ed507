"""What a conversion will do: the target's document and the account, before a tensor byte is read."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from ckptconv import dtypes, note
from ckptconv.account import Transfer
from ckptconv.compounds import lacking
from ckptconv.dialects.base import fills
from ckptconv.dialects.residue import scalar_tensor, untold
from ckptconv.document import Checkpoint, Param
from ckptconv.errors import CkptError, MappingError, Problem
from ckptconv.extras import kept_from_template, left_described, undescribable
from ckptconv.fitting import ASSUMED_LAYOUT
from ckptconv.formats.base import Format
from ckptconv.formats.table import FORMATS
from ckptconv.goal import Goal
from ckptconv.joining import together
from ckptconv.layer_settings import required
from ckptconv.mapping_file import MappingFile
from ckptconv.mapping_rules import Ruled, ruled
from ckptconv.matching import framework_of, matched
from ckptconv.ops import Cast
from ckptconv.rawtree import Lifted, Node, Opaque, Path, children, walk
from ckptconv.reparametrized import folded, unfoldable
from ckptconv.report import ALLOWABLE, Entry, place
from ckptconv.transfer import progress_entries, transfer

_PLAIN = (bool, int, float, str)


def allowed_codes(codes: Sequence[str]) -> frozenset[str]:
    """The losses that a caller allows. Raises: usage for a code that is none."""
    for code in codes:
        if code not in ALLOWABLE:
            close = difflib.get_close_matches(code, ALLOWABLE, n=1)
            raise CkptError.of(
                "usage",
                f"'{code}' is not a loss that can be allowed"
                + (f" (did you mean '{close[0]}'?)" if close else ""),
                "Codes: " + ", ".join(ALLOWABLE) + ".",
                loc=("--allow", code),
            )
    return frozenset(codes)


_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([A-Za-z]*)")
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def shard_nbytes(size: int | str | None, format_: Format) -> int | None:
    """The most tensor bytes of one file, as a caller gives it: a number, or a text such as `5GB` or `2GiB`.

    Raises: usage for anything else, and for a format that has no shards.
    """
    if size is None:
        return None
    loc = ("--shard-size", str(size))
    if not format_.shards:
        able = ", ".join(name for name, other in sorted(FORMATS.items()) if other.shards)
        message = f"a {format_.name} target is not written in shards"
        raise CkptError.of("usage", message, f"Leave it out; formats with shards: {able}.", loc=loc)
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is not None and match[2] in _UNITS:
        nbytes = Fraction(match[1]) * _UNITS[match[2]]
    else:
        nbytes = Fraction(size if isinstance(size, int) and not isinstance(size, bool) else 0)
    if nbytes < 1 or nbytes.denominator != 1:
        raise CkptError.of(
            "usage",
            f"{size!r:.80} is no number of bytes that a file can hold",
            "Give bytes, or a number with " + ", ".join(filter(None, _UNITS)) + ", as in 5GB.",
            loc=loc,
        )
    return int(nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the caller wants otherwise than the source has it."""

    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dtype: str | None = None
    allowed: frozenset[str] = frozenset()
    conventions: Mapping[str, str] = field(default_factory=dict)
    """How bare counters of the target are meant, see `supply.CONVENTIONS`."""
    shard_nbytes: int | None = None
    """Most tensor bytes of one file of the target; None writes a single one."""
    mapping: MappingFile | None = None
    """What the caller says of names and axes."""


def plan(checkpoint: Checkpoint, goal: Goal, wishes: Wishes) -> Transfer:
    """The target's document and the account; every problem that was found is in it."""
    kept, dropped = _selected(checkpoint, wishes.only, wishes.exclude)
    if wishes.dtype is not None:
        kept = _cast(kept, wishes.dtype)
    if goal.template is None and wishes.mapping is not None:
        message = (
            "a mapping file says which names of source and template belong together; there is no template"
        )
        raise CkptError.of("usage", message, "Pass --template as well.", loc=("--mapping",))
    if goal.template is None:
        result = _untemplated(kept, goal, wishes.allowed)
    elif unready := goal.dialect.template_problems(goal.template):
        result = Transfer(checkpoint=kept, ledger=(), problems=unready)
    else:
        result = _onto_template(kept, goal.template, goal, wishes)
    return replace(
        result, ledger=(*dropped, *result.ledger, *_left_in_residue(checkpoint, result.checkpoint))
    )


def _left_in_residue(source: Checkpoint, target: Checkpoint) -> Iterator[Entry]:
    """What of the source's file was not lifted and the target does not have, in the largest parts."""
    if source.residue is None or source.residue is target.residue:
        return
    pending: list[tuple[Path, Node]] = [((), source.residue.root)]
    while pending:
        path, node = pending.pop()
        if not any(isinstance(leaf, Lifted) for _, leaf in walk(node)):
            detail = node.name if isinstance(node, Opaque) else repr(node) if isinstance(node, _PLAIN) else ""
            yield Entry(item=("residue", *path), fate="left", detail=detail[:80])
        elif not isinstance(node, Lifted):
            pending += reversed([((*path, step), part) for step, part in children(node)])


def _onto_template(kept: Checkpoint, template: Checkpoint, goal: Goal, wishes: Wishes) -> Transfer:
    frameworks = (framework_of(kept), goal.dialect.framework or "torch")
    file, folding = kept, folded(kept, template, *frameworks)
    kept = folding.checkpoint
    lack = (
        *folding.problems,
        *unfoldable(template, *reversed(frameworks)),
        *lacking(kept, frameworks[1]),
        *lacking(template, frameworks[0]),
    )
    if refused := tuple(p for p in lack if _code_to_allow(p) not in wishes.allowed):
        return Transfer(checkpoint=kept, ledger=(), problems=refused)
    rules = ruled(wishes.mapping, kept, template, frameworks) if wishes.mapping is not None else Ruled()
    if refused := tuple(p for p in rules.problems if _code_to_allow(p) not in wishes.allowed):
        return Transfer(checkpoint=kept, ledger=(), problems=refused)
    found = matched(kept, template, frameworks, rules)
    unsolved = tuple(p for p in found.cover.problems if _code_to_allow(p) not in wishes.allowed)
    cover = replace(found.cover, problems=unsolved)
    result = transfer(
        found.source_pieces, found.target_pieces, cover, allow=wishes.allowed, conventions=wishes.conventions
    )
    result = replace(result, problems=(*unsolved, *result.problems))
    result = together(result, found.source, found.target, wishes.allowed)
    if result.problems:
        return result
    result = _numbered(result, goal)
    return replace(
        result,
        checkpoint=_with_note(result.checkpoint, kept),
        verdicts=tuple(folding.judged(one, file) for one in result.verdicts),
        ledger=tuple(folding.accounted(tuple(rules.accounted(result.ledger)), file)),
        target_requires=(
            *result.target_requires,
            *required(found.source_pieces, found.target_pieces, cover.pairs, frameworks[1]),
        ),
    )


def _numbered(result: Transfer, goal: Goal) -> Transfer:
    """The file's number as its name tells it: after `ckpt-9` a CheckpointManager writes `ckpt-10`."""
    key, name = goal.dialect.save_counter, goal.path.name
    number = re.search(r"-([0-9]{1,18})$", name)
    kept = kept_from_template(key) if key is not None else None
    if key is None or number is None or kept not in result.ledger:
        return result
    counter = result.checkpoint.extras[key]
    value = scalar_tensor(int(number[1]), counter.dtype.name, counter.shape)
    created = replace(kept, fate="created", detail=f"the number in the name '{name}'")
    return replace(
        result,
        checkpoint=replace(result.checkpoint, extras={**result.checkpoint.extras, key: value}),
        ledger=tuple(created if entry == kept else entry for entry in result.ledger),
    )


def _code_to_allow(problem: Problem) -> str:
    return ASSUMED_LAYOUT if problem.code == "layout-ambiguous" else problem.code


def _with_note(checkpoint: Checkpoint, source: Checkpoint) -> Checkpoint:
    text = note.write_note(replace(checkpoint, schedules=checkpoint.schedules or source.schedules))
    return replace(checkpoint, extensions={**checkpoint.extensions, note.EXTENSION: text})


def _untemplated(checkpoint: Checkpoint, goal: Goal, allowed: frozenset[str]) -> Transfer:
    """A target that takes its structure from the document: the way back, an archive, or weights."""
    residue = checkpoint.residue
    own = fills(goal.dialect, residue)
    everything = own or goal.format.name == "neutral"
    ledger = [
        Entry(item=address, fate="copied", target=place(address))
        for address, _ in checkpoint.tensors()
        if everything or address[0] == "param"
    ]
    if own and residue is not None:
        ledger += [
            Entry(
                item=("progress", name), fate="noted", detail="supplied; the target has no place of its own"
            )
            for name in untold(checkpoint, residue.root)
        ]
    problems: list[Problem] = []
    if not everything:
        if goal.dialect.needs_template:
            problems.append(
                Problem(
                    code="template-required",
                    loc=("--template",),
                    message=f"{goal.format.name}:{goal.dialect.name} takes its structure from a template",
                    hint="Build model and optimizer in the target's framework, save them once, pass that.",
                )
            )
        if "state-dropped" not in allowed:
            problems += undescribable(checkpoint)
        weights_only = goal.format.name == "safetensors"  # its choice is consent to leave the rest behind
        for optimizer in checkpoint.optimizers:
            if not problems and not weights_only and "state-dropped" not in allowed:
                problems.append(
                    Problem(
                        code="state-dropped",
                        loc=("optimizers", optimizer.name),
                        message=f"{goal.format.name}:{goal.dialect.name} holds no optimizer state, "
                        f"the source has that of '{optimizer.name}' ({optimizer.algorithm})",
                        hint="Pass a --template with an optimizer, or --allow state-dropped.",
                    )
                )
            for slot in optimizer.slots:
                ledger.append(
                    Entry(
                        item=("slot", optimizer.name, slot),
                        fate="left",
                        detail="the target holds weights only; progress and hyperparameters are in its note",
                        allowed_by="" if weights_only else "state-dropped",
                    )
                )
        ledger += left_described(checkpoint)
        ledger += [
            Entry(item=("extra", key), fate="left", detail="the target holds weights only")
            for key in checkpoint.extras
        ]
        ledger += progress_entries(replace(checkpoint, residue=None))
        checkpoint = _with_note(checkpoint, checkpoint)
        checkpoint = replace(checkpoint, residue=None)
    return Transfer(checkpoint=checkpoint, ledger=tuple(ledger), problems=tuple(problems))


def _selected(
    checkpoint: Checkpoint, only: Sequence[str], exclude: Sequence[str]
) -> tuple[Checkpoint, tuple[Entry, ...]]:
    """The document with the parameters that the globs leave, and their slots."""
    if not only and not exclude:
        return checkpoint, ()

    def wanted(name: str) -> bool:
        inside = not only or any(fnmatch.fnmatchcase(name, glob) for glob in only)
        return inside and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)

    for glob in (*only, *exclude):
        if not any(fnmatch.fnmatchcase(name, glob) for name in checkpoint.params):
            close = difflib.get_close_matches(glob, list(checkpoint.params), n=1)
            raise MappingError.of(
                "mapping-invalid",
                f"no parameter matches '{glob}'" + (f" (did you mean '{close[0]}'?)" if close else ""),
                "See the names with 'ckptconv inspect --tensors'.",
                loc=("--only" if glob in only else "--exclude", glob),
            )
    names = {name for name in checkpoint.params if wanted(name)}
    if not names:
        raise MappingError.of(
            "mapping-invalid",
            f"--only and --exclude leave none of the {len(checkpoint.params)} parameters",
            "See the names with 'ckptconv inspect --tensors'.",
            loc=("--exclude",) if exclude else ("--only",),
        )
    params = {
        name: replace(param, tied_to=param.tied_to if param.tied_to in names else None)
        for name, param in checkpoint.params.items()
        if name in names
    }
    optimizers = tuple(
        replace(
            optimizer,
            groups=tuple(
                replace(g, params=tuple(p for p in g.params if p in names)) for g in optimizer.groups
            ),
            slots={s: {n: t for n, t in by.items() if n in names} for s, by in optimizer.slots.items()},
            param_steps={n: s for n, s in optimizer.param_steps.items() if n in names},
        )
        for optimizer in checkpoint.optimizers
    )
    dropped = tuple(
        Entry(item=("param", name), fate="left", detail="not selected", allowed_by="--only/--exclude")
        for name in checkpoint.params
        if name not in names
    )
    return replace(checkpoint, params=params, optimizers=optimizers, residue=None), dropped


def _cast(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The document with its floating-point parameters in another dtype: the caller's word is the consent."""
    row = dtypes.BY_NAME.get(dtype)
    if row is None or row.kind != "float":
        names = [r.name for r in dtypes.ROWS if r.kind == "float"]
        close = difflib.get_close_matches(dtype, names, n=1)
        raise CkptError.of(
            "usage",
            f"'{dtype}' is not a floating-point dtype" + (f" (did you mean '{close[0]}'?)" if close else ""),
            "Dtypes: " + ", ".join(names) + ".",
            loc=("--dtype",),
        )

    def one(param: Param) -> Param:
        if param.tensor.dtype.kind != "float":
            return param
        return replace(param, tensor=param.tensor.apply(Cast(dtype)))

    return replace(checkpoint, params={name: one(param) for name, param in checkpoint.params.items()})
