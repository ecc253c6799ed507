"""The report names the helper that makes a pair exact, and the one for sparse gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

import ckptconv
from ckptconv.catalog import optimizers, sparse
from ckptconv.catalog.loading import load, names
from ckptconv.catalog.optimizer_rows import FRAMEWORKS, algorithms, row
from ckptconv.catalog.transitions import transitions
from ckptconv.document import Optimizer, Param, value_of
from tests.test_catalog import keras, tensor, torch_adam, torch_sgd


def named() -> Iterator[tuple[str, str, str]]:
    """(framework of the target, the call, algorithm) of every helper in the tables."""
    for name in names("optimizers"):
        for step in transitions(load(f"optimizers/{name}.json")).values():
            for framework, call in step.helper.items():
                yield framework, call, name
    for name in algorithms():
        for framework in FRAMEWORKS:
            found = row(name, framework)
            if found is not None:
                calls = (*found.helpers.values(), *(rule.call for rule in found.rules.values()))
                yield from ((framework, call, name) for call in calls)


@pytest.mark.parametrize(("framework", "call", "algorithm"), sorted(set(named())))
def test_what_the_tables_name_is_there(framework: str, call: str, algorithm: str) -> None:
    parsed = re.fullmatch(r"ckptconv\.(keras|pytorch)\.(\w+)\(optimizer(?:, \{(\w+)\})?\)", call)
    assert parsed is not None
    module, function, value = parsed.groups()
    assert module == {"torch": "pytorch", "keras3": "keras", "tf_keras": "keras"}[framework]
    assert function in getattr(ckptconv, module).__all__
    assert value is None or any(
        found is not None and value in found.hyperparameters
        for found in (row(algorithm, each) for each in FRAMEWORKS)
    )


@pytest.mark.parametrize("algorithm", algorithms())
def test_a_rule_is_called_as_its_setting(algorithm: str) -> None:
    for framework in FRAMEWORKS:
        found = row(algorithm, framework)
        for name, rule in (found.rules if found else {}).items():
            (point,) = rule.form
            assert re.fullmatch(rf"ckptconv\.\w+\.{name}\(optimizer, \{{{point}\}}\)", rule.call)
            assert point in {"epsilon", "weight_decay"}
            assert found.base_form.get(point) != rule.form[point]


def residuals(source: Optimizer, target: Optimizer, *allow: str) -> str:
    return " | ".join(optimizers.convert(source, target, allow=frozenset(allow)).verdict.residuals)


def test_it_stands_beside_what_remains() -> None:
    assert "ckptconv.keras.corrected_epsilon(optimizer, 1e-07)" in residuals(torch_adam(), keras())
    assert "ckptconv.pytorch.raw_epsilon(optimizer, 1e-07)" in residuals(keras(), torch_adam())
    other = torch_adam(epsilon=1e-3)
    assert "ckptconv.pytorch.raw_epsilon(optimizer, 0.5)" in residuals(keras(epsilon=0.5), other)
    assert "ckptconv.keras.gradient_momentum(optimizer)" in residuals(torch_sgd(), keras("sgd"))


def test_where_the_target_has_none_it_is_not_named() -> None:
    assert "ckptconv." not in residuals(torch_adam(), keras("adam", "tf_keras_legacy"))


def test_a_refused_decay_names_it_in_the_hint_and_an_allowed_one_in_the_residual() -> None:
    source, call = torch_sgd(weight_decay=0.02), "ckptconv.keras.coupled_decay(optimizer, 0.02)"
    (problem,) = optimizers.convert(source, keras("sgd")).problems
    assert call in problem.hint
    assert call in residuals(source, keras("sgd"), "form-mismatch")


def test_a_template_with_a_decay_rule_takes_the_decay() -> None:
    """Its own argument stays off, and the line for the target's code has the source's number."""
    source = torch_sgd(weight_decay=0.02)
    done = optimizers.convert(source, keras("sgd", coupled_decay=0.5))
    assert done.problems == ()
    assert done.form["weight_decay"] == "coupled"
    assert value_of(done.hyperparameters[0]["weight_decay"]) == 0.02
    first, *others = done.target_requires
    assert "weight_decay" not in first
    assert "optimizer = ckptconv.keras.coupled_decay(optimizer, 0.02)" in others
    back = optimizers.convert(keras("sgd", coupled_decay=0.02, momentum=0.9), torch_sgd())
    assert back.problems == ()
    assert value_of(back.hyperparameters[0]["weight_decay"]) == 0.02


def test_sparse_gradients() -> None:
    params = {"e": param("e", "embeddings"), "k": param("k", "kernel")}
    both = ("second_moment", "first_moment")
    (line,) = sparse.residuals("torch", "keras3", both, ("e", "k"), params)
    assert "'e'" in line
    assert "'k'" not in line
    assert "ckptconv.keras.densified(optimizer)" in line
    assert sparse.residuals("keras3", "keras3", both, ("e", "k"), params) == ()
    assert sparse.residuals("torch", "tf_keras", both, ("e", "k"), params) == ()
    assert sparse.residuals("torch", "keras3", ("momentum",), ("e", "k"), params) == ()
    assert sparse.residuals("torch", "keras3", both, ("k",), params) == ()


def param(name: str, role: str) -> Param:
    return Param(name=name, tensor=tensor(), role=role)
