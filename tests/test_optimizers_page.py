"""`docs/optimizers.md` says what the tables and the measurement say.

`python -m tests.test_optimizers_page` writes it anew.
The measurement is the catalog's `data/parity.json`, written by `python -m tests.parity.measure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from ckptconv.catalog.directions import Direction, directions
from ckptconv.catalog.loading import load, names
from ckptconv.catalog.optimizer_rows import COLUMNS, algorithms, row
from ckptconv.catalog.parity import Measured, measured
from ckptconv.catalog.transitions import transitions
from ckptconv.cli import app
from tests.parity.matrix import Place, cases, cells, floor, limit

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "optimizers.md"
NAMES = {
    "torch": "torch",
    "keras3": "Keras 3",
    "tf_keras": "tf_keras",
    "tf_keras_legacy": "tf_keras legacy",
    "tf1": "TensorFlow 1",
}


def lines() -> Iterator[str]:
    yield "# Optimizers"
    yield ""
    yield "This page is generated: `python -m tests.test_optimizers_page`. The same table comes from"
    yield "`ckptconv formats --optimizers`."
    yield ""
    yield "## Classes"
    yield ""
    yield f"| algorithm | {' | '.join(NAMES.values())} |"
    yield "|---|" + "---|" * len(NAMES)
    for name in algorithms():
        cells = (row(name, framework) for framework in COLUMNS)
        yield f"| {name} | {' | '.join(f'`{c.class_name}`' if c else '' for c in cells)} |"
    yield ""
    yield "## Directions"
    yield ""
    yield "`exact`: the same update in exact arithmetic. `exact-at-constant-learning-rate`: until the rate"
    yield "changes. `approximate`: the report states the largest and the median relative difference of the"
    yield "next update, from the second moments that are converted. `lossy` and `refused`: only with"
    yield "`--allow form-mismatch`; what a `lossy` one comes to was measured. The error is what was measured"
    yield "(below): the larger of the two models' in float64, of each run."
    yield ""
    yield "| algorithm | direction | verdict | error | what remains different | the run must have had |"
    yield "|---|---|---|---|---|---|"
    for each in directions():
        name = f"{each.algorithm} ({', '.join(each.options)})" if each.options else each.algorithm
        way = f"{NAMES[each.source]} → {NAMES[each.target]}"
        notes = "; ".join(each.remains).replace("|", "\\|")
        errors = ", ".join(error(each, run) for run in each.measured)
        yield f"| {name} | {way} | {each.verdict} | {errors} | {notes} | {', '.join(each.needs)} |"
    yield ""
    yield "Within its framework a state goes back as it was, whatever the class. These go to no other:"
    yield ""
    yield from (f"- {name}: {reason}" for name, reason in alone())
    yield ""
    yield "A class that trains some parameters by another algorithm crosses to two optimizers and back, each"
    yield "part as its algorithm does; which parameter is whose must be the same on both sides:"
    yield ""
    yield from (f"- {text}" for text in parts())
    yield ""
    yield "Keras' Muon trains by Muon what has two axes and is no embedding, and the rest by AdamW: kernels"
    yield "of convolutions, too. PyTorch's takes matrices alone; give the rest to `torch.optim.AdamW`. In"
    yield "each step of Newton-Schulz PyTorch's rounds to bfloat16, in float64 models, too. With the helper"
    yield "below (`muon full`, AdamW with `raw_epsilon`) it goes on as Keras' does. Keras' fails in float64"
    yield "models unless `keras.config.set_floatx('float64')` is called."
    yield ""
    yield "## Exact continuation"
    yield ""
    yield "Where the target's class only comes near the source's rule, a helper makes it follow it. Every"
    yield "helper was measured with at least one algorithm, in a float64 run that crossed at update 20: below"
    yield "1e-10 of the distance travelled. The report names the call with the run's numbers beside the"
    yield "difference that it removes; other differences stay. It takes an optimizer that is not built"
    yield "(Keras) or has no scheduler yet (PyTorch), keeps its variables and state keys, and may be"
    yield "put around another: `optimizer = ckptconv.keras.corrected_epsilon(optimizer, 1e-8)`."
    yield ""
    yield "| algorithm | in | difference | helper |"
    yield "|---|---|---|---|"
    for name, target, difference, call in sorted({*helpers()}):
        yield f"| {name} | {NAMES[target]} | {difference} | `{call}` |"
    yield ""
    yield "A file does not say that its run used a helper: of an epsilon or a decay it is read as the"
    yield "stock class's, unless `--set corrected_epsilon=1e-8` (the helper's name and its number) tells, or"
    yield "a `--source-spec` that `describe` made of the live optimizer. A template that is so described has"
    yield "the rule, too. The two helpers for a changing rate leave in the buffer what the stock class would"
    yield "have at the present rate, so that their files convert exactly. All Keras helpers make sparse"
    yield "gradients dense; `ckptconv.keras.densified(optimizer)` does that alone: Keras 3 on TensorFlow"
    yield "squares an embedding's gradient row by row before it sums repeated tokens. Keras' Lion, which"
    yield "PyTorch does not have, is `ckptconv.pytorch.lion(params)`."
    yield ""
    yield "## Measured"
    yield ""
    yield "A model is trained for 20 updates, converted through its files, and trained for 20 more on both"
    yield "sides: MLP is two dense layers, CNN an embedding, a convolution, a batch normalization and a dense"
    yield "layer. The error is the largest difference of a weight at the end, relative to the largest"
    yield "distance that a weight has travelled since the conversion. Stated is what the report said of the"
    yield "next update, of which no element was beyond it. `lossy`: what the target's class lacks, or does"
    yield "otherwise, was allowed. TensorFlow 1 is not among them: its runs cross to and from torch and"
    yield "Keras 3 in `tests/oracle/test_tf1.py` and `test_tf1_optimizers.py`, two dense layers in float32,"
    yield "trained four updates further on both sides: no weight is then further apart than 2e-5 of itself,"
    yield "plus 2e-6."
    yield ""
    yield "| run | direction | verdict | stated | float64, MLP | CNN | float32, MLP | CNN |"
    yield "|---|---|---|---|---|---|---|---|"
    for run in measured():
        way = f"{NAMES[run.source]} → {NAMES[run.target]}"
        numbers = (
            run.errors.get(d, {}).get(model) for d in ("float64", "float32") for model in ("mlp", "cnn")
        )
        texts = ("" if number is None else f"{number:.0e}" for number in (run.stated, *numbers))
        yield f"| {run.run} | {way} | {run.verdict} | {' | '.join(texts)} |"


def error(direction: Direction, run: Measured) -> str:
    """The largest error of a run, with the run's name where there are several."""
    text = f"{run.worst('float64'):.0e}"
    name = run.run.removeprefix(run.algorithm).strip(" _")
    return f"{text} ({name})" if len(direction.measured) > 1 else text


def parts() -> Iterator[str]:
    """The classes of two algorithms, with the arguments that divide the parameters."""
    for name in algorithms():
        for framework in COLUMNS:
            known = row(name, framework)
            if known is not None and known.part is not None:
                arguments = ", ".join(f"`{each}`" for each in known.part.divided_by)
                yield f"`{known.class_name}`: {name} and {known.part.algorithm}, divided by {arguments}"


def alone() -> Iterator[tuple[str, str]]:
    """Algorithms that one framework alone has, and why their state goes nowhere else."""
    for name in algorithms():
        found = [one for framework in COLUMNS if (one := row(name, framework)) is not None]
        if found[0].alone:
            yield name, found[0].alone


def test_what_stands_alone_is_in_one_framework() -> None:
    have = {name: sum(row(name, framework) is not None for framework in COLUMNS) for name in algorithms()}
    assert {name for name, count in have.items() if count == 1} == {name for name, _ in alone()}


def helpers() -> Iterator[tuple[str, str, str, str]]:
    """(family or algorithm, framework of the target, what differs, call)."""
    for name in names("optimizers"):
        for step in transitions(load(f"optimizers/{name}.json")).values():
            for target, call in step.helper.items():
                if target in forms(name, step.point, step.after):
                    yield name, target, f"{step.point}: {step.before} there, {step.after} here", call
    for name in algorithms():
        for target in COLUMNS:
            found = row(name, target)
            if found is None:
                continue
            yield from (
                (name, target, f"{lacking} of the source", call) for lacking, call in found.helpers.items()
            )
            for rule in found.rules.values():
                for point, form in rule.form.items():
                    here = found.base_form.get(point, "none")
                    yield name, target, f"{point}: {form} there, {here} here", rule.call


def forms(family: str, point: str, form: str) -> set[str]:
    """Frameworks whose class of the family has a form."""
    found = ((f, row(family, f)) for f in COLUMNS)
    return {f for f, known in found if known is not None and known.base_form.get(point) == form}


def page() -> str:
    return "\n".join(lines()) + "\n"


def test_the_page_is_what_the_tables_say() -> None:
    assert PAGE.read_text("utf-8") == page(), "python -m tests.test_optimizers_page writes it anew"


def test_every_cell_of_the_matrix_was_measured() -> None:
    found = {
        Place(run.run, run.source, run.target, model, dtype)
        for run in measured()
        for dtype, errors in run.errors.items()
        for model in errors
    }
    assert found == {*cells()}, "python -m tests.parity.measure writes it anew"


def test_what_was_measured_is_of_the_cases_as_they_are() -> None:
    told = {run.run: (run.algorithm, run.hyperparameters) for run in measured()}
    assert told == {name: (case.algorithm, case.hypers) for name, case in cases().items()}


def test_every_number_is_within_its_limit() -> None:
    for run in measured():
        for dtype, errors in run.errors.items():
            for model, number in errors.items():
                place = Place(run.run, run.source, run.target, model, dtype)
                assert number <= limit(cases()[run.run], place, run.verdict), place


def test_the_verdict_of_each_direction_is_what_was_measured_of_it() -> None:
    shown = set()
    for direction in directions():
        for run in direction.measured:
            assert run.verdict == ("lossy" if lacks(direction, run) else direction.verdict), run
            shown.add((run.run, run.source, run.target))
            if run.verdict == "approximate":
                assert run.stated is not None
                # An epsilon that the tables tell apart is one that shows.
                assert (run.worst("float64") or 1) > floor(cases()[run.run], "float64")
    alone = {(run.run, run.source, run.target) for run in measured() if run.source == run.target}
    assert shown == {(run.run, run.source, run.target) for run in measured()} - alone


def test_every_direction_that_converts_was_measured() -> None:
    for direction in directions():
        if direction.verdict != "refused" and "tf1" not in (direction.source, direction.target):
            assert direction.measured, direction


def test_the_command_shows_the_verdict_and_the_number() -> None:
    shown = CliRunner().invoke(app, ["formats", "--optimizers"]).stdout.splitlines()
    for direction in directions():
        way = f"{direction.source} -> {direction.target}"
        rows = [row for row in shown if row.startswith(direction.algorithm) and f" {way} " in row]
        for run in direction.measured:
            number = run.worst("float32")
            assert any(f" {direction.verdict} " in row and f"/ {number:.1e}" in row for row in rows), run


def lacks(direction: Direction, run: Measured) -> bool:
    """Whether the run had what the target's class cannot be told."""
    needs = (need.split(" = ") for need in direction.needs)
    return any(str(run.hyperparameters.get(name, value)) != value for name, value in needs)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), "utf-8")
