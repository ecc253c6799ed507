"""`docs/schedules.md` says what the schedule table says.

`python -m tests.test_schedules_page` writes it anew; `tests/oracle/test_schedule_families.py` resumes or
refuses what it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckptconv.catalog import schedules

PAGE = Path(__file__).resolve().parent.parent / "docs" / "schedules.md"


TOP = """# Learning-rate schedules

This page is generated: `python -m tests.test_schedules_page`.

A torch file holds its scheduler's state, not its class: the family is told by its keys. A TensorFlow
checkpoint and a `.weights.h5` hold the counter that a schedule follows and nothing of the schedule; a
`.keras` file holds Keras' constructor. So the report of a conversion prints the schedule as a line of
code (and writes it into a `.keras` file), and on the way back it is told by a source spec
(`ckptconv.keras.describe(model, optimizer)`), by the note of a file that was converted before, or by a
torch template with the same numbers.

## Families

`exact`: the next rates are the same to 1e-6 of the highest, tested for 50 updates with Keras 3 and
tf_keras. `refused`: `schedule-unsupported` says why; `--allow schedule-unsupported` freezes a plain
learning rate at that of the next update.

| family | direction | case | verdict | as | needs | remark |
|---|---|---|---|---|---|---|"""

FORMS = (
    ("counts updates", "Keras, under a schedule", "exact: the line to pass; its position is `iterations`"),
    ("counts updates", "Keras, a plain rate", "refused; frozen where that is allowed"),
    ("counts epochs", "Keras, under a schedule", "exact with `--set steps_per_epoch=N`, else an error"),
    ("counts epochs, or a metric", "Keras, a plain rate", "exact: the callback to pass"),
    ("does not tell what it counts", "Keras", "an error: `--set schedule_unit=update` or `epoch`"),
    ("of Keras", "torch, a scheduler of its family", "exact, with all that torch keeps of it"),
    ("of Keras", "torch, a LambdaLR", "exact: the function to pass"),
    ("of Keras", "torch, no scheduler", "refused; frozen where that is allowed"),
    (
        "none: a plain rate",
        "torch, a scheduler",
        "refused, unless `--set schedule_unit=` says what it counts and its rate there is the recorded one",
    ),
)
"""(source's schedule, target, what becomes of it)."""

BOTTOM = """
## What torch keeps

Written together, as torch 2.13 has them: `last_epoch`, `_step_count`, `_last_lr`, `base_lrs`, `T_cur`
and `T_i`, those of the parts of a SequentialLR or ChainedScheduler, and in the optimizer's groups `lr`,
`initial_lr`, `max_lr`, `min_lr`, `base_momentum` and `max_momentum`. In float64 the lines give
Keras' schedules a `numpy.float64` to begin with: with a plain number they compute in float32."""


def lines() -> Iterator[str]:
    yield TOP
    for name in schedules.families():
        family = schedules.family(name)
        assert family is not None
        for direction, ways in (("torch → Keras", family.to_keras), ("Keras → torch", family.to_torch)):
            for way in ways:
                case = "" if way.case == schedules.ALWAYS else way.case
                told = (direction, case, way.verdict, way.made, way.needs, way.remark)
                yield f"| {' | '.join((name, *told))} |"
    yield ""
    yield "## The template's form decides"
    yield ""
    yield "Under a schedule a Keras optimizer has no variable for the learning rate, with a plain rate one."
    yield ""
    yield "| the source's schedule | the target's optimizer | what becomes of it |"
    yield "|---|---|---|"
    yield from (f"| {' | '.join(form)} |" for form in FORMS)
    yield BOTTOM


def page() -> str:
    return "\n".join(lines()) + "\n"


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text("utf-8") == page(), "python -m tests.test_schedules_page writes it anew"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
