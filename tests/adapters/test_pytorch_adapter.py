"""Live PyTorch objects against PyTorch: what is captured goes on, bit for bit, where it is restored."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.adapters.live import SPILL_PREFIX  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.schema import to_json, validate_manifest  # noqa: E402
from tests.support.command import FIXTURES, run  # noqa: E402

nn = torch.nn
Module = Any


class Net(nn.Module):
    """Square matrices, a tied head, statistics, and a bias that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)
        self.wide = nn.Linear(8, 600)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight
        self.fc.bias.requires_grad_(False)

    def forward(self, x: Any) -> Any:
        h = self.bn(self.fc(self.emb(x)))
        return self.head(h).pow(2).mean() + self.wide(torch.tanh(h)).mean()


def made(seed: int, *, rate: float = 0.01) -> tuple[Module, Any]:
    """A model with two groups that torch's state_dict does not name."""
    torch.manual_seed(seed)
    model = Net()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trained if n.endswith("weight")]},
            {"params": [p for n, p in trained if not n.endswith("weight")], "weight_decay": 0.0},
        ],
        lr=rate,
    )
    return model, optimizer


def train(model: Module, optimizer: Any, steps: int, scheduler: Any = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(11)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a state_dict."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    else:
        return {path: value.clone() if torch.is_tensor(value) else value}
    return {key: leaf for name, part in parts for key, leaf in flat(part, f"{path}/{name}").items()}


def assert_equal(a: Any, b: Any) -> None:
    left, right = flat(a), flat(b)
    assert left.keys() == right.keys()
    for key, value in left.items():
        if torch.is_tensor(value):
            assert value.dtype == right[key].dtype, key
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key], key


def states(*live: Any) -> list[dict[str, Any]]:
    return [flat(one.state_dict()) for one in live]


def codes(call: Callable[[], object]) -> list[tuple[str, tuple[object, ...]]]:
    with pytest.raises(CkptError) as caught:
        call()
    assert all(problem.message and problem.hint for problem in caught.value.problems)
    return [(problem.code, problem.loc) for problem in caught.value.problems]


# -- describe ------------------------------------------------------------------------------------------


def test_a_description_declares_what_the_classes_say() -> None:
    spec = ckptconv.pytorch.describe(*made(1))
    assert spec.is_skeleton
    fc = spec.params["fc.weight"]
    assert (fc.layer, fc.role, fc.axes, fc.evidence) == ("dense", "kernel", ("out", "in"), "declared")
    assert spec.params["emb.weight"].axes == ("vocabulary", "features")
    assert spec.params["head.weight"].tied_to == "emb.weight"
    assert {name: p.trainable for name, p in spec.params.items()} == {
        "emb.weight": True,
        "fc.weight": True,
        "fc.bias": False,
        "bn.weight": True,
        "bn.bias": True,
        "bn.running_mean": False,
        "bn.running_var": False,
        "bn.num_batches_tracked": False,
        "wide.weight": True,
        "wide.bias": True,
        "head.weight": True,
    }
    (optimizer,) = spec.optimizers
    assert (optimizer.algorithm, optimizer.param_order) == ("adamw", "named")
    assert [group.params for group in optimizer.groups] == [
        ("emb.weight", "fc.weight", "bn.weight", "wide.weight"),
        ("bn.bias", "wide.bias"),
    ]
    decays = [group.hyperparameters["weight_decay"] for group in optimizer.groups]
    assert [fact.value for fact in decays if isinstance(fact, ckptconv.Known)] == [0.01, 0.0]


def test_a_description_is_of_no_moment_and_holds_small_counters_alone() -> None:
    model, optimizer = made(1)
    train(model, optimizer, 3)
    spec = ckptconv.pytorch.describe(model, optimizer)
    assert isinstance(spec.progress.step, ckptconv.Unknown)
    assert isinstance(spec.optimizers[0].step, ckptconv.Unknown)
    assert spec.params["bn.num_batches_tracked"].read().tolist() == 3
    with pytest.raises(CkptError) as caught:
        spec.params["fc.weight"].read()
    assert caught.value.problems[0].code == "reference-broken"


def test_a_description_is_a_json_file_and_comes_back(tmp_path: Path) -> None:
    model, optimizer = made(1)
    train(model, optimizer, 3)
    spec = ckptconv.pytorch.describe(model, optimizer)
    manifest = to_json(spec, values=True)
    assert validate_manifest(manifest) == []
    ckptconv.write_skeleton(spec, tmp_path / "spec.json")
    back = ckptconv.read_skeleton(tmp_path / "spec.json")
    assert to_json(back, values=True) == manifest
    assert (tmp_path / "spec.json").stat().st_size < 40_000  # `wide` alone has 19 KB of weights


def test_gpt2_conv1d_is_declared_in_its_own_order() -> None:
    """`transformers.pytorch_utils.Conv1D`: square, (in, out). The class is told by its package and name."""

    def init(self: Any) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.zeros(6))

    names = {"__init__": init, "__module__": "transformers.pytorch_utils"}
    conv1d = type("Conv1D", (nn.Module,), names)
    spec = ckptconv.pytorch.describe(nn.Sequential(conv1d(), nn.Linear(6, 6)))
    assert spec.params["0.weight"].axes == ("in", "out")
    assert spec.params["1.weight"].axes == ("out", "in")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["data-parallel", "compiled"])
def test_wrappers_leave_no_trace(wrap: Callable[[Module], Module]) -> None:
    model, optimizer = made(1)
    plain, wrapped = ckptconv.pytorch.describe(model, optimizer), wrap(model)
    assert to_json(ckptconv.pytorch.describe(wrapped, optimizer)) == to_json(plain)
    other, other_optimizer = made(2)
    ckptconv.pytorch.restore(ckptconv.pytorch.capture(other, other_optimizer), wrapped, optimizer)
    assert_equal(model.state_dict(), other.state_dict())


# -- capture and restore -------------------------------------------------------------------------------


def test_a_captured_run_goes_on_where_it_is_restored() -> None:
    model, optimizer = made(1)
    train(model, optimizer, 3)
    captured = ckptconv.pytorch.capture(model, optimizer)
    assert captured.progress.step.value == 3
    fresh, fresh_optimizer = made(2, rate=0.5)
    before = {name: id(p) for name, p in fresh.named_parameters(remove_duplicate=False)}
    report = ckptconv.pytorch.restore(captured, fresh, fresh_optimizer)
    assert [verdict.verdict for verdict in report.verdicts] == ["exact"]
    assert {name: id(p) for name, p in fresh.named_parameters(remove_duplicate=False)} == before
    assert fresh.head.weight is fresh.emb.weight
    assert not fresh.fc.bias.requires_grad
    assert_equal(fresh_optimizer.state_dict(), optimizer.state_dict())
    for _ in range(2):
        assert_equal(fresh.state_dict(), model.state_dict())
        train(model, optimizer, 2)
        train(fresh, fresh_optimizer, 2)


def test_what_is_captured_does_not_change_with_the_model_and_leaves_nothing_behind() -> None:
    def spilled() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob(f"{SPILL_PREFIX}*"))

    before = spilled()
    model, optimizer = made(1)
    weight = model.wide.weight.detach().clone()
    captured = ckptconv.pytorch.capture(model, optimizer)
    train(model, optimizer, 1)
    gc.collect()
    assert torch.equal(torch.from_numpy(captured.params["wide.weight"].read()), weight)
    mine = spilled() - before
    assert mine
    del captured
    gc.collect()
    assert not mine & spilled()


def test_the_caller_tells_the_counters_that_live_objects_do_not_hold(tmp_path: Path) -> None:
    model, optimizer = made(1)
    train(model, optimizer, 3)
    captured = ckptconv.pytorch.capture(model, optimizer, progress={"epochs": 1.5, "samples": 33})
    epochs = captured.progress.epochs
    assert (epochs.value, epochs.status, epochs.source) == (1.5, "supplied", "capture")
    ckptconv.save(captured, tmp_path / "run", to="neutral")
    assert ckptconv.validate(tmp_path / "run", require=["step", "epochs", "samples"]) == []
    assert ckptconv.open(tmp_path / "run").progress.samples.value == 33


@pytest.mark.parametrize(
    "progress", [{"epoch": 2}, {"epochs": -1}, {"samples": 1.5}, {"step": "many"}, {"learning_rate": 0.1}]
)
def test_a_counter_that_makes_no_sense(progress: dict[str, Any]) -> None:
    model, optimizer = made(1)
    name = next(iter(progress))
    call = lambda: ckptconv.pytorch.capture(model, optimizer, progress=progress)  # noqa: E731
    assert codes(call) == [("usage", ("progress", name))]


def test_an_optimizer_that_stores_no_step_takes_it_from_the_caller() -> None:
    torch.manual_seed(3)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    captured = ckptconv.pytorch.capture(model, optimizer, progress={"step": 9})
    assert captured.optimizers[0].step.value == 9
    assert captured.progress.step.status == "supplied"


def test_a_live_optimizer_without_state_has_done_nothing() -> None:
    model, optimizer = made(1)
    captured = ckptconv.pytorch.capture(model, optimizer)
    assert (captured.progress.step.value, captured.progress.step.status) == (0, "derived")
    fresh, fresh_optimizer = made(2)
    ckptconv.pytorch.restore(captured, fresh, fresh_optimizer)
    assert_equal(fresh_optimizer.state_dict(), optimizer.state_dict())
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    assert isinstance(ckptconv.pytorch.capture(model, plain).progress.step, ckptconv.Unknown)


def test_a_schedule_of_the_same_class_goes_on() -> None:
    def scheduled(seed: int) -> tuple[Module, Any, Any]:
        model, optimizer = made(seed)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

    run, fresh = scheduled(1), scheduled(2)
    train(run[0], run[1], 4, run[2])
    ckptconv.pytorch.restore(ckptconv.pytorch.capture(*run), *fresh)
    assert fresh[2].last_epoch == 4
    for _ in range(2):
        for a, b in zip(run, fresh, strict=True):
            assert_equal(a.state_dict(), b.state_dict())
        train(run[0], run[1], 3, run[2])
        train(fresh[0], fresh[1], 3, fresh[2])


def test_a_schedule_of_another_class_is_refused() -> None:
    model, optimizer = made(1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    train(model, optimizer, 1, scheduler)
    captured = ckptconv.pytorch.capture(model, optimizer, scheduler)
    fresh, fresh_optimizer = made(2)
    other = torch.optim.lr_scheduler.ExponentialLR(fresh_optimizer, 0.9)
    before = states(fresh, fresh_optimizer, other)
    call = lambda: ckptconv.pytorch.restore(captured, fresh, fresh_optimizer, other)  # noqa: E731
    assert codes(call) == [("schedule-unsupported", ("schedules", "scheduler"))]
    assert_equal(states(fresh, fresh_optimizer, other), before)


def test_state_of_a_file_without_names_finds_its_parameters_by_a_description() -> None:
    """Two groups in another order than the model's: only the live optimizer tells."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 1e-4}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    source = FIXTURES / "plain" / "two-groups-unnamed" / "run.pt"
    before = states(model, optimizer)
    assert ("order-ambiguous", ("optimizers", "optimizer")) in codes(
        lambda: ckptconv.pytorch.restore(source, model, optimizer)
    )
    assert_equal(states(model, optimizer), before)
    spec = ckptconv.pytorch.describe(model, optimizer)
    ckptconv.pytorch.restore(source, model, optimizer, source_spec=spec)
    truth = torch.load(source, weights_only=True)
    assert_equal(model.state_dict(), truth["model"])
    assert_equal(optimizer.state_dict(), truth["optimizer"])


def test_weights_alone_need_consent_where_there_is_an_optimizer(tmp_path: Path) -> None:
    model, _ = made(1)
    ckptconv.save(ckptconv.pytorch.capture(model), tmp_path / "weights.safetensors")
    fresh, fresh_optimizer = made(2)
    source = tmp_path / "weights.safetensors"
    found = codes(lambda: ckptconv.pytorch.restore(source, fresh, fresh_optimizer))
    assert ("slots-missing", ("optimizers", "optimizer")) in found
    ckptconv.pytorch.restore(source, fresh)
    assert_equal(fresh.state_dict(), model.state_dict())


# -- nothing is changed where something is wrong -------------------------------------------------------


def test_another_architecture_changes_nothing() -> None:
    model, optimizer = made(1)
    train(model, optimizer, 2)
    before = states(model, optimizer)
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    captured = ckptconv.pytorch.capture(other, torch.optim.AdamW(other.parameters()))
    assert codes(lambda: ckptconv.pytorch.restore(captured, model, optimizer))
    assert_equal(states(model, optimizer), before)


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = made(1)
    train(model, optimizer, 1)
    spec = ckptconv.pytorch.describe(model, optimizer)
    run_file = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, run_file)
    data = bytearray(run_file.read_bytes())
    at = data.find(model.wide.weight.detach().numpy().tobytes()[:64])
    data[at + 5000] ^= 1
    run_file.write_bytes(data)
    fresh, fresh_optimizer = made(2)
    before = states(fresh, fresh_optimizer)
    found = codes(lambda: ckptconv.pytorch.restore(run_file, fresh, fresh_optimizer, source_spec=spec))
    assert [code for code, _ in found] == ["checksum-mismatch"]
    assert_equal(states(fresh, fresh_optimizer), before)
    assert [code for code, _ in codes(lambda: ckptconv.pytorch.restore(tmp_path / "no.pt", fresh))] == [
        "missing-file"
    ]


def test_state_that_pytorch_would_round_without_a_word_is_said() -> None:
    torch.manual_seed(4)
    source = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(source.parameters())
    source(torch.randn(2, 4)).pow(2).sum().backward()
    optimizer.step()
    captured = ckptconv.pytorch.capture(source, optimizer)
    half = nn.Linear(4, 3, dtype=torch.bfloat16)
    half_optimizer = torch.optim.Adam(half.parameters())
    before = states(half, half_optimizer)
    found = codes(lambda: ckptconv.pytorch.restore(captured, half, half_optimizer))
    assert {code for code, _ in found} == {"precision-loss"}
    assert_equal(states(half, half_optimizer), before)
    ckptconv.pytorch.restore(captured, half, half_optimizer, allow=["precision-loss"])
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, source.weight.bfloat16())
    moment = optimizer.state[source.weight]["exp_avg"]
    assert torch.equal(half_optimizer.state[half.weight]["exp_avg"], moment.bfloat16())


def test_slots_of_higher_precision_than_their_parameter() -> None:
    """The weights fit, the moments do not: `load_state_dict` alone would round them silently."""
    torch.manual_seed(5)
    model = nn.Linear(4, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    state = optimizer.state_dict()
    state["state"] = {
        i: {"step": torch.tensor(2.0), "exp_avg": torch.rand(p.shape), "exp_avg_sq": torch.rand(p.shape)}
        for i, p in enumerate(model.parameters())
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": model.state_dict(), "optimizer": state}, f"{folder}/run.pt")
        before = states(model, optimizer)
        found = codes(lambda: ckptconv.pytorch.restore(f"{folder}/run.pt", model, optimizer))
        assert found == [("precision-loss", ("optimizer", "state", 0, "exp_avg"))]
        assert_equal(states(model, optimizer), before)


@pytest.mark.parametrize("build", [lambda: nn.LazyLinear(3), lambda: nn.Linear(2, 3, device="meta")])
def test_a_model_without_memory_is_unbuilt(build: Callable[[], Module]) -> None:
    assert codes(lambda: ckptconv.pytorch.describe(build())) == [("template-unbuilt", ("model",))]
    assert codes(lambda: ckptconv.pytorch.capture(build())) == [("template-unbuilt", ("model",))]


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, _ = made(1)
    _, stranger = made(2)
    assert codes(lambda: ckptconv.pytorch.describe(model, stranger)) == [
        ("template-mismatch", ("optimizer", "param_groups", 0))
    ]


def test_a_state_that_pickle_refuses_is_said() -> None:
    model, optimizer = made(1)

    class Odd:
        def state_dict(self) -> dict[str, object]:
            return {"last_epoch": 1, "_step_count": 2, "f": lambda: None}

        def load_state_dict(self, state_dict: dict[str, object]) -> None:
            raise AssertionError

    assert codes(lambda: ckptconv.pytorch.capture(model, optimizer, Odd())) == [
        ("unsupported-feature", ("training state",))
    ]


def test_a_class_that_only_has_the_name_is_told_by_its_state() -> None:
    class Adam(torch.optim.SGD):
        """Not torch's."""

    model = nn.Linear(4, 4)
    spec = ckptconv.pytorch.describe(model, Adam(model.parameters(), lr=0.1))
    assert spec.optimizers[0].algorithm == "sgd"


# -- on the command line -------------------------------------------------------------------------------


def test_a_description_is_a_template_and_a_source_spec_of_the_command_line(tmp_path: Path) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    ckptconv.write_skeleton(ckptconv.pytorch.describe(model, optimizer), tmp_path / "mlp.json")
    source = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
    spec = ("--template", tmp_path / "mlp.json", "--source-spec", tmp_path / "mlp.json")
    done = run("convert", source, tmp_path / "again.pt", *spec)
    assert done.returncode == 0, done.stderr
    state, truth = (torch.load(path, weights_only=True) for path in (tmp_path / "again.pt", source))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert_equal(model.state_dict(), truth["model_state_dict"])
    assert_equal(optimizer.state_dict()["state"], truth["optimizer_state_dict"]["state"])
