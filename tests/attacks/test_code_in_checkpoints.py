"""A pickle that would run code is inert data for every command, and is written again only when allowed."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path

import pytest

from tests.support.command import FIXTURES, convert_here, inspect_here, invoke, refused_here
from tests.support.hostile import commands, pickle_of, with_value

RUN = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
FRESH = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
WAYS = list(commands("true"))
PLACES: dict[str, str | None] = {"root": None, "optimizer": "optimizer_state_dict", "state": "state"}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Hostile:
    """A training run with an extra value that would create `marker`."""

    def __init__(self, folder: Path, way: str, place: str = "root") -> None:
        self.marker = folder / "marker"
        opcodes, self.names = commands(f"touch {self.marker}")[way]
        self.path = with_value(RUN, folder / "run.pt", opcodes, "evil", PLACES[place])
        self.bytes = self.path.read_bytes()

    def check(self) -> None:
        """Nothing ran, and the file is what it was."""
        assert not self.marker.exists()
        assert self.path.read_bytes() == self.bytes


def test_the_payload_is_one(tmp_path: Path) -> None:
    """Python's unpickler does run it: the tests below would notice."""
    import pickle

    opcodes, _ = commands(f"touch {tmp_path / 'marker'}")["reduce"]
    pickle.loads(b"\x80\x02" + opcodes + b".")
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("place", PLACES)
def test_nothing_runs(way: str, place: str, tmp_path: Path) -> None:
    run = Hostile(tmp_path, way, place)
    for arguments in (
        ["inspect", run.path],
        ["inspect", run.path, "--json"],
        ["inspect", run.path, "--raw", "--digest"],
        ["validate", run.path],
        ["plan", run.path, tmp_path / "out-1", "--template", FRESH],
        ["convert", run.path, tmp_path / "out-1", "--template", FRESH],
        ["convert", run.path, tmp_path / "weights.safetensors"],
        ["convert", run.path, tmp_path / "archive", "--to", "neutral"],
        ["validate", tmp_path / "archive"],
        ["convert", run.path, tmp_path / "new.pt"],
        ["convert", run.path, tmp_path / "allowed.pt", "--allow", "opaque-globals"],
        ["inspect", tmp_path / "allowed.pt"],
    ):
        code, shown = invoke(*arguments)
        assert code in (0, 1), shown
        run.check()


def test_inspect_tells_what_would_be_called(way: str, tmp_path: Path) -> None:
    run = Hostile(tmp_path, way)
    document = inspect_here(run.path)
    assert any(run.names in oddity for oddity in document["oddities"])
    assert document["progress"]["step"]["value"] == 9


def test_the_weights_still_convert_and_the_rest_is_listed(way: str, tmp_path: Path) -> None:
    run = Hostile(tmp_path, way)
    report = tmp_path / "report.json"
    for target, more in (("out-1", ["--template", FRESH]), ("weights.safetensors", [])):
        convert_here(run.path, tmp_path / target, *more, "--report", report, "--force")
        ledger = json.loads(report.read_text())["ledger"]
        (left,) = [entry for entry in ledger if entry["item"] == ["residue", "evil"]]
        assert left["fate"] == "left"
        plain = tmp_path / f"plain-{target}"
        convert_here(RUN, plain, *more)
        assert leaves(tmp_path / target) == leaves(plain)


def leaves(path: Path) -> list[object]:
    code, shown = invoke("inspect", path, "--raw", "--json", "--digest")
    assert code == 0, shown
    return [leaf for leaf in json.loads(shown)["leaves"] if "sha256" in leaf]


def test_a_new_pickle_needs_leave(way: str, tmp_path: Path) -> None:
    run = Hostile(tmp_path, way)
    archive = convert_here(run.path, tmp_path / "archive", "--to", "neutral")
    for source in (run.path, archive):
        target = tmp_path / "new.pt"
        (problem,) = refused_here("convert", source, target)
        assert (problem["code"], problem["loc"]) == ("opaque-globals", [run.names])
        assert "--allow opaque-globals" in problem["hint"]
        assert not target.exists()
        convert_here(source, target, "--allow", "opaque-globals")
        arguments = [str(argument) for _, argument, _ in pickletools.genops(pickle_of(target))]
        # Protocol 2 has Python 2's names of modules, as Python's own pickle writes them.
        assert any(argument.endswith(" " + run.names.rpartition(".")[2]) for argument in arguments)
        assert any(str(run.marker) in argument for argument in arguments)
        assert any(run.names in oddity for oddity in inspect_here(target)["oddities"])
        target.unlink()
    run.check()


def test_leave_does_not_carry_code_to_another_dialect(tmp_path: Path) -> None:
    run = Hostile(tmp_path, "reduce")
    allow = ["--allow", "opaque-globals"]
    convert_here(run.path, tmp_path / "w.safetensors", *allow)
    convert_here(run.path, tmp_path / "k-1", "--template", FRESH, *allow)
    allow += ["--allow", "state-dropped"]
    convert_here(run.path, tmp_path / "bare.pt", "--to", "pytorch:state-dict", *allow)
    names = {str(argument) for _, argument, _ in pickletools.genops(pickle_of(tmp_path / "bare.pt"))}
    assert not any("posix" in name or "marker" in name for name in names)
    for file in tmp_path.glob("k-1*"):
        assert b"posix" not in file.read_bytes()
    run.check()


@pytest.mark.parametrize("key", ["model_state_dict", "optimizer_state_dict", "epoch"])
def test_a_key_that_stands_twice_is_refused(key: str, tmp_path: Path) -> None:
    """`torch.load` keeps the last value; whoever looks at the first one sees another checkpoint."""
    path = with_value(RUN, tmp_path / "run.pt", b"K\x05", key)
    (problem,) = refused_here("inspect", path)
    assert (problem["code"], problem["loc"]) == ("duplicate-key", [key])
    assert invoke("inspect", path, "--raw")[0] == 0


def test_registries_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    path = with_value(RUN, tmp_path / "run.pt", b"\x82\x01", "evil")  # EXT1
    (problem,) = refused_here("inspect", path)
    assert problem["code"] == "unsupported-feature"
