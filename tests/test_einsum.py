"""What an einsum layer's equation says of its kernel."""

from __future__ import annotations

import pytest

from ckptconv.catalog import layers
from ckptconv.catalog.einsum import contraction


@pytest.mark.parametrize(
    ("equation", "axes"),
    [
        ("abc,cd->abd", "in out"),
        ("...x, xy -> ...y", "in out"),
        ("abc,dc->abd", "out in"),
        ("bqm,mnh->bqnh", "in out out"),
        ("bqnh,nhm->bqm", "in in out"),
        ("abc,dce->abde", "out in out"),
        ("abcd,dce->abe", ""),  # the input has its axes in another order
        ("abc,cde->abed", ""),  # the output has
        ("abc,bcd->abd", ""),  # a matrix for each position
        ("abc,cdf->abd", ""),  # an axis that is summed away
        ("abc->ab", ""),
        (None, ""),
    ],
)
def test_the_axes_of_a_kernel(equation: object, axes: str) -> None:
    assert contraction(equation) == tuple(axes.split())


@pytest.mark.parametrize(
    ("equation", "kind"),
    [
        ("abc,cd->abd", "einsum_linear"),
        ("abc,dc->abd", "einsum_transposed"),
        ("abc,cde->abde", "einsum_split"),
        ("abde,dec->abc", "einsum_joined"),
        ("abc,dce->abde", "einsum_dense"),
        (None, "einsum_dense"),
    ],
)
def test_the_kind_of_an_einsum_layer(equation: object, kind: str) -> None:
    assert layers.kind_of_class_name("keras3", "keras.EinsumDense", {"equation": equation}) == kind
