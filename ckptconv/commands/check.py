"""`ckptconv validate` and `ckptconv doctor`: whether a checkpoint is whole, and what restores lose of it."""

from __future__ import annotations

from ckptconv.console import outcome, print_json, show, stop, write
from ckptconv.options import (
    AsJson,
    From,
    Readable,
    Require,
    Select,
    parse_container,
    split_names,
)


def validate(
    path: Readable,
    require: Require = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Check a checkpoint: schema, digests, cross-references, and what the container itself records.

    With --require it is a gate for pipelines: a field that is not known is a problem.

    Example: ckptconv validate run.pt --require step,learning_rate
    """
    with outcome(as_json=as_json):
        from ckptconv.conversion import validate as check

        problems = check(path, require=split_names(require), select=select or ())
        if problems:
            stop(problems, as_json=as_json)
        if as_json:
            print_json({"problems": []})
        else:
            from ckptconv.rendering.text import clean

            write(f"{clean(path)}: no problems\n")


def doctor(
    path: Readable,
    from_: From = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Say where the step of a checkpoint is, which restoring calls of which framework bring it back, leave it
    at 0 or put optimizer state in the wrong place, why, and what mends that.

    Nothing is written, nothing in the file is run.

    Example: ckptconv doctor ckpts/ckpt-9
    """
    with outcome(as_json=as_json):
        from ckptconv import doctor as doctors

        format_, dialect = parse_container("--from", from_)
        found = doctors.diagnose(path, format=format_, dialect=dialect, select=select or ())
        if as_json:
            print_json(doctors.to_json(found))
            return
        from ckptconv.rendering.doctor import doctor_view

        show(doctor_view(found))
