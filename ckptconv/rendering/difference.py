"""The difference of two checkpoints for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from ckptconv.difference import Difference
from ckptconv.differing_values import TensorDifference
from ckptconv.rendering.text import Rows, View, clean, count, heading, value_text

TABLE_ROWS = 40
"""Arrays shown unless all are asked for."""

_KIND: Mapping[str, str] = {
    "only-first": "only in A",
    "only-second": "only in B",
    "shape": "other shape",
    "dtype": "other dtype",
    "values": "other values",
    "within": "within tolerance",
}


def difference_view(difference: Difference, *, verbose: bool = False) -> list[View]:
    """Whether they are the same; else fields and arrays that are not."""
    head = Text.assemble((clean(difference.first), "bold"), " and ", (clean(difference.second), "bold"))
    state = Text.assemble(head, ": ", ("the same", "green") if difference.same else ("different", "bold red"))
    views: list[View] = [state]
    if difference.carried:
        how = "Names, layouts and optimizers are those of the template, or of B: A was carried onto them."
        views.append(Text(f"  {how}"))
    equal = f"{difference.equal:,} of {count(difference.compared, 'array')} on both sides are bit-equal"
    views.append(Text(f"  {equal}."))
    if difference.fields:
        rows = Rows(styles=("cyan", "", ""), titles=("field", "A", "B"), indent=2)
        for field in difference.fields:
            rows.add(clean(field.field), value_text(field.first), value_text(field.second))
        views += [Text(), heading("Told differently"), rows]
    if difference.tensors:
        views += [Text(), heading("Arrays"), _table(difference, verbose)]
        left = len(difference.tensors) - TABLE_ROWS
        if left > 0 and not verbose:
            views.append(Text(f"  and {left:,} more (--verbose shows them)"))
    return views


def _table(difference: Difference, verbose: bool) -> Rows:
    titles = ("array", "what", "A", "B", "largest difference", "relative", "elements", "first at")
    rows = Rows(styles=("cyan", "", "", "", "", "", "", ""), titles=titles, indent=2)
    for tensor in difference.tensors[: None if verbose else TABLE_ROWS]:
        rows.add(clean(_name(tensor)), _KIND[tensor.kind], *_sides(tensor), *_sizes(tensor))
    return rows


def _name(tensor: TensorDifference) -> str:
    what, *rest = tensor.address
    return str(rest[-1]) if what == "param" else f"{rest[-1]}/{rest[-2]}"


def _sides(tensor: TensorDifference) -> tuple[str, str]:
    if tensor.kind == "only-first":
        return tensor.first, ""
    if tensor.kind == "only-second":
        return "", tensor.second
    return tensor.first, "" if tensor.first == tensor.second else tensor.second


def _sizes(tensor: TensorDifference) -> tuple[str, str, str, str]:
    if tensor.kind not in ("values", "within"):
        return "", "", "", ""
    at = "" if tensor.at is None else str(list(tensor.at))
    elements = f"{tensor.differing:,}" if tensor.differing else ""
    return f"{tensor.max_abs:.3g}", f"{tensor.max_rel:.3g}", elements, at
