"""The TensorFlow dialects on the fixtures: names, roles, slots, counters, the way back; no framework."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

import ckptconv
from ckptconv.detect import detect_dialect, read_raw
from ckptconv.dialects.graph_lower import is_built, unbuilt
from ckptconv.dialects.table import DIALECTS
from ckptconv.document import Absent, Checkpoint, Known, Unknown, value_of
from ckptconv.errors import CkptError
from ckptconv.formats.object_graph import OBJECT_GRAPH_KEY, ObjectGraph, variable_key
from ckptconv.formats.string_tensor import of_strings, read_strings
from ckptconv.rawtree import DictNode, RawTree, dict_of, is_tensor, walk
from ckptconv.tensor import TensorRef

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
CASES = [
    "keras3/manager-adam-step-9",
    "keras3/sequential-adam",
    "keras3/functional-frozen",
    "keras3/subclassed-lists",
    "keras3/embedding-conv-bn-adamw",
    "keras3/sgd-plain",
    "keras3/adam-schedule",
    "keras3/loss-scale-adam",
    "keras3/adam-accumulating",
    "keras3/adam-fresh",
    "keras3/adam-unbuilt",
    "keras3/keras-3.3-amsgrad",
    "keras3/keras-3.6-nadam",
    "tf-keras/sequential-adam",
    "tf-keras/subclassed-sgd-momentum",
    "tf-keras/adam-fresh",
    "tf-keras-legacy/sequential-adam",
    "tf-keras-legacy/subclassed-sgd-momentum",
    "tf-keras-legacy/adam-fresh",
    "tf-keras-legacy/adam-unbuilt",
    "tf-module/module",
]


def expected(case: str) -> dict:
    return json.loads((FIXTURES / case / "expected.json").read_text())


def raw_of(case: str) -> RawTree:
    return read_raw(FIXTURES / case / expected(case)["checkpoint"])


def lifted(case: str) -> Checkpoint:
    raw = raw_of(case)
    dialect, _ = detect_dialect(raw)
    return dialect.lift(raw)


def lowered(checkpoint: Checkpoint) -> RawTree:
    assert checkpoint.residue is not None
    return DIALECTS["tensorflow", checkpoint.residue.dialect].lower(checkpoint)


def sha(tensor: TensorRef) -> str:
    return hashlib.sha256(tensor.read().tobytes()).hexdigest()


def values(raw: RawTree) -> dict[object, tuple[object, bytes]]:
    assert isinstance(raw.root, DictNode)
    return {
        key: (node.spec, node.read().tobytes()) for key, node in raw.root.items if isinstance(node, TensorRef)
    }


@pytest.mark.parametrize("case", CASES)
def test_every_key_is_what_tensorflow_reads(case: str) -> None:
    raw = raw_of(case)
    assert isinstance(raw.root, DictNode)
    found = {key: node for key, node in raw.root.items if key != OBJECT_GRAPH_KEY}
    wanted = {key: entry for key, entry in expected(case)["tensors"].items() if key != OBJECT_GRAPH_KEY}
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert isinstance(tensor, TensorRef)
        assert (tensor.dtype.name, list(tensor.shape), sha(tensor)) == (
            wanted[key]["dtype"],
            wanted[key]["shape"],
            wanted[key]["sha256"],
        )


@pytest.mark.parametrize("case", CASES)
def test_the_dialect_is_found(case: str) -> None:
    dialect, detection = detect_dialect(raw_of(case))
    assert dialect.name == expected(case)["dialect"]
    assert detection.evidence


@pytest.mark.parametrize("case", CASES)
def test_every_variable_is_a_parameter_with_its_own_slots(case: str) -> None:
    """Each value that the live objects held is one parameter's, the slots beside it are that variable's."""
    checkpoint = lifted(case)
    own = [param for param in checkpoint.params.values() if param.tied_to is None]
    assert sorted(sha(param.tensor) for param in own) == sorted(
        v["sha256"] for v in expected(case)["variables"]
    )
    duplicates = [v["sha256"] for v in expected(case)["variables"]]
    by_sha = {sha(param.tensor): param for param in own}
    for variable in expected(case)["variables"]:
        if duplicates.count(variable["sha256"]) > 1:
            continue
        param = by_sha[variable["sha256"]]
        assert list(param.tensor.shape) == variable["shape"]
        if variable["trained"]:
            assert param.trainable is True
        slots = {
            slot: sha(by_param[param.name])
            for optimizer in checkpoint.optimizers
            for slot, by_param in optimizer.slots.items()
            if param.name in by_param
        }
        assert slots == variable["slots"]


@pytest.mark.parametrize("case", CASES)
def test_step_and_learning_rate(case: str) -> None:
    checkpoint, truth = lifted(case), expected(case)
    assert value_of(checkpoint.progress.step) == truth["step"]
    for optimizer in checkpoint.optimizers:
        rate = value_of(optimizer.groups[0].hyperparameters["learning_rate"])
        assert rate == (None if truth["learning_rate"] is None else pytest.approx(truth["learning_rate"]))


@pytest.mark.parametrize("case", CASES)
def test_lowering_gives_the_same_bundle(case: str) -> None:
    raw = raw_of(case)
    dialect, _ = detect_dialect(raw)
    checkpoint = dialect.lift(raw)
    assert values(dialect.lower(checkpoint)) == values(raw)


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_stays_in_the_residue(case: str) -> None:
    residue = lifted(case).residue
    assert residue is not None
    assert not any(is_tensor(node) for _, node in walk(residue.root))
    assert isinstance(residue.root, DictNode)
    assert isinstance(residue.root.get(OBJECT_GRAPH_KEY), bytes)


def test_the_seed_case_says_step_9_with_its_key() -> None:
    checkpoint = lifted("keras3/manager-adam-step-9")
    assert checkpoint.progress.step == Known(value=9, source="optimizer/_iterations")
    assert checkpoint.optimizers[0].step == checkpoint.progress.step
    directory = read_raw(FIXTURES / "keras3/manager-adam-step-9/artifact")
    assert values(directory) == values(raw_of("keras3/manager-adam-step-9"))


def test_the_counter_of_keras_3_3_has_another_edge() -> None:
    assert lifted("keras3/keras-3.3-amsgrad").progress.step == Known(value=4, source="optimizer/iterations")


@pytest.mark.parametrize("where", ["keras3", "keras-file"])
def test_the_product_of_an_older_nadam_stands_first(where: str) -> None:
    case = FIXTURES / where / "keras-3.6-nadam"
    optimizer = ckptconv.open(case / expected(f"{where}/keras-3.6-nadam")["checkpoint"]).optimizers[0]
    truth = expected("keras3/keras-3.6-nadam")["momentum_product"]
    assert value_of(optimizer.scalars["momentum_product"]) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_keys_say_does_not_matter(case: str) -> None:
    """TensorFlow restores by edges: under any keys, in any order, everything is what it was."""
    raw = raw_of(case)
    assert isinstance(raw.root, DictNode)
    items = dict(raw.root.items)
    graph = ObjectGraph.parse(read_strings(items.pop(OBJECT_GRAPH_KEY), ())[0])
    others = {key: f"{9999 - number}/{key[-40:]}" for number, key in enumerate(map(str, items))}
    nodes = [
        replace(
            node,
            attributes=tuple(
                replace(one, checkpoint_key=others.get(one.checkpoint_key, one.checkpoint_key))
                for one in node.attributes
            ),
        )
        for node in graph.nodes
    ]
    new = {others[str(key)]: node for key, node in items.items()}
    new[OBJECT_GRAPH_KEY] = of_strings([ObjectGraph(nodes=tuple(nodes)).serialize()])
    renamed = replace(raw, root=dict_of(new))
    dialect, _ = detect_dialect(renamed)
    one, other = lifted(case), dialect.lift(renamed)
    assert {name: sha(param.tensor) for name, param in one.params.items()} == {
        name: sha(param.tensor) for name, param in other.params.items()
    }
    assert [
        (o.algorithm, value_of(o.step), {s: {n: sha(t) for n, t in by.items()} for s, by in o.slots.items()})
        for o in one.optimizers
    ] == [
        (o.algorithm, value_of(o.step), {s: {n: sha(t) for n, t in by.items()} for s, by in o.slots.items()})
        for o in other.optimizers
    ]


def test_automatic_names_are_numbered_within_the_model() -> None:
    """The template's layers are `dense_1` to `dense_4` to TensorFlow, the run's `dense` to `dense_3`."""
    names = [f"dense-{i}/{leaf}" for i in range(4) for leaf in ("kernel", "bias")]
    assert list(lifted("keras3/sequential-adam").params) == names
    assert list(lifted("keras3/adam-fresh").params) == names


def test_the_generations_of_keras_give_one_name_to_one_layer() -> None:
    legacy = list(lifted("tf-keras-legacy/sequential-adam").params)
    assert (
        legacy
        == list(lifted("tf-keras/sequential-adam").params)
        == list(lifted("tf-keras/adam-fresh").params)
    )
    assert legacy[:6] == [
        "dense-0/kernel",
        "dense-0/bias",
        "batch_normalization-0/gamma",
        "batch_normalization-0/beta",
        "batch_normalization-0/moving_mean",
        "batch_normalization-0/moving_variance",
    ]
    assert legacy[6:] == [f"dense-{i}/{leaf}" for i in (1, 2, 3) for leaf in ("kernel", "bias")]


def test_names_of_a_functional_model() -> None:
    checkpoint = lifted("keras3/functional-frozen")
    assert list(checkpoint.params) == [
        "stem/kernel",
        "stem/bias",
        "layer_normalization-0/gamma",
        "layer_normalization-0/beta",
        "inner/dense-0/kernel",
        "inner/dense-0/bias",
        "inner/dense-1/kernel",
        "inner/dense-1/bias",
        "head/kernel",
        "head/bias",
    ]
    assert [name for name, param in checkpoint.params.items() if param.trainable is False] == [
        "stem/kernel",
        "stem/bias",
    ]


def test_names_of_subclassed_models() -> None:
    names = ["first", "pair/0", "pair/1", "untracked-0", "untracked-1", "last"]
    leaves = {"untracked-1": ("gamma", "beta")}
    wanted = [f"{name}/{leaf}" for name in names for leaf in leaves.get(name, ("kernel", "bias"))]
    checkpoint = lifted("keras3/subclassed-lists")
    assert sorted(checkpoint.params) == sorted(wanted)
    assert checkpoint.oddities
    listed = ["first", "blocks/0", "blocks/1", "heads/a"]
    for kind in ("tf-keras", "tf-keras-legacy"):
        found = list(lifted(f"{kind}/subclassed-sgd-momentum").params)
        assert found == [f"{name}/{leaf}" for name in listed for leaf in ("kernel", "bias")]


def test_layers_are_read_off_the_edges() -> None:
    params = lifted("keras3/embedding-conv-bn-adamw").params
    found = {name: (param.layer, param.role, param.evidence) for name, param in params.items()}
    assert found == {
        "embed/embeddings": ("embedding", "embeddings", "named"),
        "conv/kernel": ("conv2d", "kernel", "named"),
        "conv/bias": ("conv2d", "bias", "named"),
        "norm/gamma": ("batch_norm", "gamma", "named"),
        "norm/beta": ("batch_norm", "beta", "named"),
        "norm/moving_mean": ("batch_norm", "moving_mean", "named"),
        "norm/moving_variance": ("batch_norm", "moving_variance", "named"),
        "head/kernel": ("dense", "kernel", "named"),
        "head/bias": ("dense", "bias", "named"),
    }
    assert params["conv/kernel"].axes == ("h", "w", "in", "out")
    assert params["norm/moving_mean"].trainable is False


@pytest.mark.parametrize(
    ("case", "algorithm", "framework"),
    [
        ("keras3/sequential-adam", "adam", "keras3"),
        ("keras3/embedding-conv-bn-adamw", "adamw", "keras3"),
        ("keras3/functional-frozen", "sgd", "keras3"),
        ("keras3/sgd-plain", "sgd", "keras3"),
        ("keras3/loss-scale-adam", "adam", "keras3"),
        ("keras3/adam-unbuilt", "adam", "keras3"),
        ("tf-keras/sequential-adam", "adam", "tf_keras"),
        ("tf-keras/subclassed-sgd-momentum", "sgd", "tf_keras"),
        ("tf-keras-legacy/sequential-adam", "adam", "tf_keras_legacy"),
        ("tf-keras-legacy/subclassed-sgd-momentum", "sgd", "tf_keras_legacy"),
    ],
)
def test_the_algorithm_is_recognised(case: str, algorithm: str, framework: str) -> None:
    (optimizer,) = lifted(case).optimizers
    assert (optimizer.algorithm, optimizer.framework) == (algorithm, framework)
    assert optimizer.name == "optimizer"


def test_legacy_hyperparameters_stand_in_the_file() -> None:
    (optimizer,) = lifted("tf-keras-legacy/sequential-adam").optimizers
    facts = optimizer.groups[0].hyperparameters
    assert value_of(facts["beta_1"]) == pytest.approx(0.9)
    assert value_of(facts["beta_2"]) == pytest.approx(0.999)
    assert value_of(facts["learning_rate_decay"]) == 0.0
    (momentum,) = lifted("tf-keras-legacy/subclassed-sgd-momentum").optimizers
    assert value_of(momentum.groups[0].hyperparameters["momentum"]) == pytest.approx(0.9)


def test_a_schedule_hides_the_learning_rate() -> None:
    checkpoint = lifted("keras3/adam-schedule")
    assert isinstance(checkpoint.optimizers[0].groups[0].hyperparameters["learning_rate"], Unknown)
    (schedule,) = checkpoint.schedules
    assert (schedule.family, schedule.position, schedule.unit) == (
        "unknown",
        Known(value=3, source="optimizer/_iterations"),
        "update",
    )


def test_the_inner_optimizer_of_a_loss_scale_counts() -> None:
    progress = lifted("keras3/loss-scale-adam").progress
    assert progress.step == Known(value=3, source="optimizer/inner_optimizer/_iterations")
    assert value_of(progress.loss_scale) == 1024.0
    assert isinstance(lifted("keras3/sequential-adam").progress.loss_scale, Absent)


def test_accumulation_counts_batches() -> None:
    checkpoint = lifted("keras3/adam-accumulating")
    assert isinstance(checkpoint.progress.step, Unknown)
    assert value_of(checkpoint.progress.micro_steps) == 7
    assert {"moving_average", "accumulated_gradient"} <= checkpoint.optimizers[0].slots.keys()
    assert not [key for key in checkpoint.extras if key.startswith("optimizer/_variables/")]


def test_user_counters_are_offered_or_follow() -> None:
    checkpoint = lifted("keras3/subclassed-lists")
    epochs = checkpoint.progress.epochs
    assert isinstance(epochs, Unknown)
    assert [candidate.value for candidate in epochs.candidates] == [2, 3]
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=40)))
    root = lowered(edited).root
    assert number(root, "optimizer/_iterations") == 40
    assert number(root, "step") == 41  # it counted from 1
    assert number(root, "epoch") == 2
    module = lifted("tf-module/module").progress.step
    assert isinstance(module, Unknown)
    assert [candidate.value for candidate in module.candidates] == [7]


def number(root: object, *path: str) -> int:
    assert isinstance(root, DictNode)
    node = root.get(variable_key(tuple(path[0].split("/"))))
    assert isinstance(node, TensorRef)
    return int(node.read())


STEP_PLACES = {
    "keras3/manager-adam-step-9": "optimizer/_iterations",
    "keras3/loss-scale-adam": "optimizer/inner_optimizer/_iterations",
    "tf-keras/sequential-adam": "optimizer/_iterations",
    "tf-keras-legacy/sequential-adam": "optimizer/iter",
}


@pytest.mark.parametrize("case", STEP_PLACES)
@pytest.mark.parametrize("where", ["progress", "optimizer", "both"])
def test_an_edited_step_is_written(case: str, where: str) -> None:
    checkpoint = lifted(case)
    step = Known(value=123456789012)
    if where in ("progress", "both"):
        checkpoint = replace(checkpoint, progress=replace(checkpoint.progress, step=step))
    if where in ("optimizer", "both"):
        checkpoint = replace(checkpoint, optimizers=(replace(checkpoint.optimizers[0], step=step),))
    root = lowered(checkpoint).root
    assert number(root, STEP_PLACES[case]) == 123456789012
    if case == "keras3/loss-scale-adam":
        assert number(root, "optimizer/_iterations") == 0


def test_two_edits_are_a_conflict() -> None:
    checkpoint = lifted("keras3/sequential-adam")
    checkpoint = replace(
        checkpoint,
        progress=replace(checkpoint.progress, step=Known(value=7)),
        optimizers=(replace(checkpoint.optimizers[0], step=Known(value=8)),),
    )
    assert problem(checkpoint) == ("progress-conflict", ("progress", "step"))


def problem(checkpoint: Checkpoint) -> tuple[str, tuple[str | int, ...]]:
    with pytest.raises(CkptError) as caught:
        lowered(checkpoint)
    return caught.value.problems[0].code, caught.value.problems[0].loc


def test_an_unknown_step_is_not_written() -> None:
    checkpoint = lifted("keras3/sequential-adam")
    nothing = Unknown(reason="test")
    checkpoint = replace(
        checkpoint,
        progress=replace(checkpoint.progress, step=nothing),
        optimizers=(replace(checkpoint.optimizers[0], step=nothing),),
    )
    assert problem(checkpoint)[0] == "progress-unknown"


def test_a_step_of_accumulated_batches() -> None:
    checkpoint = lifted("keras3/adam-accumulating")
    progress = replace(checkpoint.progress, step=Known(value=3))
    assert number(lowered(replace(checkpoint, progress=progress)).root, "optimizer/_iterations") == 7
    progress = replace(progress, step=Known(value=5), accumulation=Known(value=2))
    assert number(lowered(replace(checkpoint, progress=progress)).root, "optimizer/_iterations") == 10
    progress = replace(progress, step=Known(value=5), accumulation=Unknown(reason="test"))
    assert problem(replace(checkpoint, progress=progress))[0] == "residue-stale"


def test_templates_that_were_not_built() -> None:
    for case in ("keras3/adam-unbuilt", "tf-keras-legacy/adam-unbuilt"):
        (found,) = unbuilt(lifted(case))
        assert (found.code, found.loc) == ("template-unbuilt", ("template", "optimizer"))
    for case in (
        "keras3/adam-fresh",
        "keras3/sgd-plain",
        "tf-keras/adam-fresh",
        "tf-keras-legacy/adam-fresh",
    ):
        assert is_built(lifted(case))


def test_state_for_an_unbuilt_template_is_refused() -> None:
    template, run = lifted("keras3/adam-unbuilt"), lifted("keras3/sequential-adam")
    assert problem(replace(run, residue=template.residue)) == ("template-unbuilt", ("template", "optimizer"))


def test_a_template_takes_a_run_of_the_same_model() -> None:
    template, run = lifted("keras3/adam-fresh"), lifted("keras3/sequential-adam")
    filled = replace(template, params=run.params, optimizers=run.optimizers, progress=run.progress)
    again = DIALECTS["tensorflow", "keras3"].lift(replace(lowered(filled), location="x"))
    assert {name: sha(p.tensor) for name, p in again.params.items()} == {
        name: sha(p.tensor) for name, p in run.params.items()
    }
    assert value_of(again.progress.step) == 5


@pytest.mark.parametrize("dialect", ["keras3", "tf-keras", "tf-keras-legacy"])
def test_a_keras_bundle_needs_a_template(dialect: str) -> None:
    checkpoint = replace(lifted("keras3/sequential-adam"), residue=None)
    with pytest.raises(CkptError) as caught:
        DIALECTS["tensorflow", dialect].lower(checkpoint)
    assert caught.value.problems[0].code == "template-required"


def test_another_dialects_residue_is_a_mismatch() -> None:
    with pytest.raises(CkptError) as caught:
        DIALECTS["tensorflow", "tf-keras"].lower(lifted("keras3/sequential-adam"))
    assert caught.value.problems[0].code == "template-mismatch"
