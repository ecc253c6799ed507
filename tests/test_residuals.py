"""The size of a difference between update rules does not depend on how the state is cut or laid out."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest

from ckptconv.catalog.residuals import Residual, measure
from ckptconv.ops import Permute
from ckptconv.tensor import StoredTensor, TensorRef

ADAM = Residual(
    formula="bias-corrected: corrected -> raw",
    slot="second_moment",
    minus=None,
    values={"epsilon": 1e-7, "beta_2": 0.999, "step": 9.0},
)
CENTERED = Residual(
    formula="root: inside -> outside",
    slot="second_moment",
    minus="average_gradient",
    values={"epsilon": 1e-7, "rho": 0.9, "fitted": 1e-4},
)


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, TensorRef]:
    return {name: StoredTensor.of_array(array) for name, array in arrays.items()}


def test_neither_layout_nor_number_of_tensors_matters() -> None:
    moments = np.random.default_rng(0).random((300, 700), np.float32) * 1e-6
    whole = _tensors({"w": moments})
    rows = _tensors({str(i): row for i, row in enumerate(moments)})
    turned = {name: tensor.apply(Permute((1, 0))) for name, tensor in whole.items()}
    results = {measure({"second_moment": slots}, ADAM) for slots in (whole, rows, turned)}
    assert len(results) == 1
    largest, median = results.pop()
    assert 0 < median < largest


def test_a_mean_of_another_dtype_and_layout_is_subtracted_element_by_element() -> None:
    generator = np.random.default_rng(1)
    mean = generator.random((40, 30), np.float32).astype(ml_dtypes.bfloat16)
    moments = mean.astype(np.float32) ** 2 + generator.random((40, 30), np.float32)
    turned = StoredTensor.of_array(np.ascontiguousarray(mean.T)).apply(Permute((1, 0)))
    second = _tensors({"w": moments})
    plain = measure({"second_moment": second, "average_gradient": _tensors({"w": mean})}, CENTERED)
    assert plain == measure({"second_moment": second, "average_gradient": {"w": turned}}, CENTERED)
    assert plain == pytest.approx(
        measure(
            {"second_moment": _tensors({"w": moments - mean.astype(np.float32) ** 2})},
            Residual(formula=CENTERED.formula, slot="second_moment", minus=None, values=CENTERED.values),
        ),
        rel=1e-2,
    )


def test_elements_without_a_gradient_are_left_out() -> None:
    assert measure({"second_moment": _tensors({"w": np.zeros((3, 2), np.float32)})}, ADAM) == (0.0, 0.0)
