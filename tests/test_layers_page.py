"""`docs/layers.md` says what the layer tables say; `python -m tests.test_layers_page` writes it anew."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from ckptconv.catalog import layers
from ckptconv.catalog.compounds import cut_rows, reparametrized_rows, sum_rows

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "layers.md"
COLUMNS = {"torch": "PyTorch", "keras3": "Keras 3", "tf_keras": "tf_keras"}
LIBRARIES = {"torch": "PyTorch", "keras": "Keras"}

APART = {
    "`LSTM`, `GRU`, `RNN` with layers and directions in one module": (
        "a layer for each, `Bidirectional` around both directions (any `merge_mode`), `RNN` of cells"
    ),
    "two biases of `LSTM` and `RNN`": (
        "their sum: outputs are equal, both train in PyTorch, so that the verdict is `approximate`; "
        "`ckptconv.pytorch.freeze_recurrent_bias(model)` makes it exact"
    ),
    "two biases of `GRU`": "the two rows of one (`reset_after=True`)",
    "`MultiheadAttention`, fused or split; linear layers": (
        "`MultiHeadAttention`, `EinsumDense` with axes for the heads"
    ),
    "a depthwise convolution, then one of 1x1": "`SeparableConv1D`, `SeparableConv2D`",
    "an embedding, and a linear layer tied to it or not": "`ReversibleEmbedding`",
    "`weight_norm`, `spectral_norm`, old and new": (
        "the weight that they make now, by `--allow form-mismatch`; state of the optimizer stays behind "
        "(`--allow slots-missing`). Onto a model that has them nothing is converted: load the plain model, "
        "then apply them"
    ),
}
"""What is several of the other library's: PyTorch's and Keras' words for it."""


ABOVE = """\
Layers in one row hold the same numbers, in the order of axes that each library has; outputs are equal in both
directions, and so is what an optimizer does next (`tests/oracle/test_layer_kinds.py`,
`test_recurrent_forms.py`, `test_compounds.py`). A class of your own that extends one of these is taken for
it. Parameters of other classes are matched by name, shape and flow where their axes cannot be mistaken; else
a mapping file says what they are (`docs/mapping.md`).
"""
BELOW = """\
Slots of optimizers are cut, joined and reordered as their parameters are. A sum has one gradient for all its
terms, which each of them has, too.
"""


def lines() -> Iterator[str]:
    yield "# Layers"
    yield ""
    yield "This page is generated: `python -m tests.test_layers_page`."
    yield ""
    yield from textwrap.wrap(ABOVE, 110)
    yield ""
    yield f"| kind | {' | '.join(COLUMNS.values())} | remarks |"
    yield "|---|" + "---|" * (len(COLUMNS) + 1)
    for kind in layers.kinds():
        cells = [
            ", ".join(f"`{name.split('.')[-1]}`" for name in layers.classes_of(column, kind))
            for column in COLUMNS
        ]
        if any(cells):
            yield f"| {kind} | {' | '.join(cells)} | {'; '.join(remarks(kind))} |"
    yield ""
    yield "## One layer that is several"
    yield ""
    yield "| PyTorch | Keras |"
    yield "|---|---|"
    for ours, theirs in APART.items():
        yield f"| {ours} | {theirs} |"
    yield ""
    yield from textwrap.wrap(BELOW, 110)


def remarks(kind: str) -> Iterator[str]:
    if layers.counterpart(kind) != kind:
        yield f"as {layers.counterpart(kind)}"
    for family, library in LIBRARIES.items():
        told = layers.lacking(kind, family)
        if told is not None:
            yield f"refused to {library}: {told}"
    elsewhere = {name for row in cut_rows("keras3") for name in row.layers} | {"einsum_dense"}
    alone = not layers.classes_of("torch", kind) and layers.counterpart(kind) == kind
    if kind == "einsum_dense":
        yield "with another equation: a mapping file says what its axes are"
    elif kind in elsewhere and alone:
        yield "below"
    elif alone and layers.lacking(kind, "torch") is None:
        yield "PyTorch has none: a mapping file says what a module of your own is"
    settings = dict.fromkeys(name for column in COLUMNS for name in layers.settings(column, kind))
    if settings:
        yield f"its {' and '.join(settings)} must be in the target's code: the report has the line"


def page() -> str:
    return "\n".join(lines()) + "\n"


def test_the_page_is_what_the_tables_say() -> None:
    assert PAGE.read_text("utf-8") == page(), "python -m tests.test_layers_page writes it anew"


def test_the_readme_leads_to_it() -> None:
    assert "docs/layers.md" in (ROOT / "README.md").read_text("utf-8")


def test_what_is_several_is_on_the_page() -> None:
    """A row of the table for compounds that the page does not speak of."""
    rules = {row.rule for row in reparametrized_rows("torch")}
    assert all(any(f"`{rule}`" in ours for ours in APART) for rule in rules)
    assert {row.layers for row in sum_rows("torch")} == {frozenset({"lstm", "simple_rnn"})}
    kinds = {kind for row in cut_rows("keras3") for kind in (row.kind, *row.layers) if kind}
    assert kinds == {
        "attention_input",
        "attention_output",
        "dense",
        "gru",
        "separable_conv1d",
        "separable_conv2d",
    }


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
