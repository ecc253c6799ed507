"""What both adapters share: documents of live objects, and the files that their values lie in."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ckptconv import supply
from ckptconv.adapters.flow import Run
from ckptconv.catalog import completion, conversion
from ckptconv.catalog.flatten import flattened
from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Param, Value
from ckptconv.errors import CkptError, MappingError, Problem, TargetError
from ckptconv.report import Report
from ckptconv.source import FileSource

SPILL_PREFIX = "ckptconv-live-"

DESCRIBED = "describe"
CAPTURED = "capture"
"""Who supplied a fact, as the document says it."""

Layouts = Mapping[str, tuple[str, str, tuple[str, ...]]]
"""Parameter -> kind of its layer, its role, its axes."""


class Spill:
    """A temporary directory for what a framework writes and reads; it goes with the last who refers to it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=SPILL_PREFIX))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def keep_for(self, checkpoint: Checkpoint) -> None:
        """Let the directory live as long as the document's tensors can be read."""
        files = {
            extent.source
            for _, tensor in checkpoint.tensors()
            for extent in tensor.extents
            if isinstance(extent.source, FileSource)
        }
        for file in files:
            weakref.finalize(file, _let_go, self)


def _let_go(spill: Spill) -> None:
    """The last call that refers to a directory is its end."""


@contextlib.contextmanager
def writing(what: str, failure: type[Exception] = OSError) -> Iterator[None]:
    """What goes wrong while a framework writes live objects, as our errors; `failure` is the framework's own.

    Raises: unsupported-feature for what cannot be written, target-unwritable for where it cannot be.
    """
    try:
        yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CkptError.of(
            "unsupported-feature",
            f"the {what} cannot be written: {error}",
            "Leave out of its state what the framework's own save refuses.",
            loc=(what,),
        ) from error
    except (OSError, RuntimeError, failure) as error:
        raise TargetError.of(
            "target-unwritable",
            f"the {what} cannot be written to the temporary directory: {error}",
            "Make room there, or set TMPDIR to a larger place.",
            loc=(tempfile.gettempdir(),),
        ) from error


def with_progress(checkpoint: Checkpoint, progress: Mapping[str, Value] | None) -> Checkpoint:
    """The document with the counters that the caller of `capture` knows.

    Raises: usage for a counter that does not exist, or cannot have that value.
    """
    unknown = [name for name in progress or {} if name not in PROGRESS_FIELDS]
    if unknown:
        raise CkptError.of(
            "usage",
            f"progress has no field '{unknown[0]}'",
            "Fields: " + ", ".join(PROGRESS_FIELDS) + ".",
            loc=("progress", unknown[0]),
        )
    try:
        values = supply.settings(texts(progress))
    except CkptError as error:
        raise CkptError(*(_in_progress(problem) for problem in error.problems)) from None
    return supply.set_fields(checkpoint, values, who=CAPTURED)


def _in_progress(problem: Problem) -> Problem:
    return replace(
        problem, loc=("progress", *problem.loc[1:]), hint="Pass the count, as in progress={'epochs': 2}."
    )


def texts(values: Mapping[str, Value] | None) -> dict[str, str]:
    """Settings as `--set` has them."""
    return {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in (values or {}).items()
    }


def declared(checkpoint: Checkpoint, layouts: Layouts, trainable: Mapping[str, bool]) -> Checkpoint:
    """The document with kinds, axes and flags as the live layers declare them."""

    def one(param: Param) -> Param:
        flag = trainable.get(param.name, param.trainable)
        if param.name not in layouts:
            return replace(param, trainable=flag)
        layer, role, axes = layouts[param.name]
        return replace(
            param,
            trainable=flag,
            layer=layer,
            role=role,
            axes=axes,
            evidence="declared",
            candidates=(),
        )

    return replace(checkpoint, params={name: one(param) for name, param in checkpoint.params.items()})


def with_run(checkpoint: Checkpoint, run: Run) -> Checkpoint:
    """The document with what a run of the model tells: the flow, and the axes of flattened images."""
    params = {
        name: replace(param, axes=flattened(param.axes, param.tensor.shape, run.images.flat[name]))
        if param.axes is not None and name in run.images.flat
        else param
        for name, param in checkpoint.params.items()
    }
    return replace(checkpoint, params=params, flow=run.sites())


def of_class(
    checkpoint: Checkpoint,
    cls: type,
    package: str,
    arguments: Mapping[str, object],
    rules: Mapping[str, float],
) -> Checkpoint:
    """The document whose optimizer is of the live one's class, with its constructor's arguments.

    `rules`: numbers of the rules that helpers gave it. A class of another package may have a framework's name
    and another rule: its state alone tells it then.
    """
    if cls.__module__.partition(".")[0] != package:
        return checkpoint
    optimizers = tuple(
        completion.with_arguments(optimizer, cls.__name__, arguments, rules, DESCRIBED)
        for optimizer in checkpoint.optimizers
    )
    return replace(checkpoint, optimizers=optimizers)


def restored(report: Report, target: str, live: Checkpoint) -> Report:
    """The report, its target the live objects; what their code says already is not required of it any more.

    `live`: the document of the objects as they are now.
    """
    said = {
        line
        for optimizer in live.optimizers
        for line in conversion.convert(optimizer, optimizer).target_requires
    }
    required = tuple(line for line in report.target_requires if line not in said)
    return replace(report, target=target, target_requires=required, restore="")


def unbuilt(what: str, message: str, hint: str) -> MappingError:
    """The error for live objects that have no variables yet."""
    return MappingError(Problem(code="template-unbuilt", loc=(what,), message=message, hint=hint))


def undone(change: Callable[[], None], back: Callable[[], None]) -> None:
    """Make a change in live objects; where it fails half-way, take it `back` and raise what went wrong."""
    try:
        change()
    except BaseException:
        back()
        raise
