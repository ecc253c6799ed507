"""Through files: what torch wrote, lifted and lowered, is what torch reads; edits reach every place."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ckptconv.conversion import convert  # noqa: E402
from ckptconv.detect import read_raw  # noqa: E402
from ckptconv.dialects.torch_plain import Plain  # noqa: E402
from ckptconv.dialects.torch_state_dict import StateDict  # noqa: E402
from ckptconv.document import Checkpoint, Known, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.formats.table import FORMATS  # noqa: E402
from tests.support.write_layout import write_layout  # noqa: E402

FIXTURES = Path(__file__).parents[2] / "fixtures" / "plain"
FILES = sorted(FIXTURES.glob("*/*.pt"))


def lift(path: Path) -> Checkpoint:
    raw = read_raw(path, "pytorch")
    found = [(d, dialect) for dialect in (Plain(), StateDict()) if (d := dialect.detect(raw)) is not None]
    return max(found, key=lambda pair: pair[0].score)[1].lift(raw)


def write(checkpoint: Checkpoint, path: Path, dialect: Plain | StateDict) -> Path:
    write_layout(FORMATS["pytorch"].layout(dialect.lower(checkpoint), path), path)
    return path


def load(path: Path, **options: object) -> object:
    return torch.load(path, weights_only=True, **options)


def assert_same(a: object, b: object, path: str = "") -> None:
    """Equal types, order, attributes, dtypes, strides and bits."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (
            b.dtype,
            b.shape,
            b.stride(),
            b.requires_grad,
        ), path
        assert (
            a.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
            == b.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        ), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
        assert_same(getattr(a, "_metadata", None), getattr(b, "_metadata", None), f"{path}@metadata")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for position, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}.{position}")
    else:
        assert a == b or (a != a and b != b), path


def storages(value: object, path: tuple[object, ...] = ()) -> dict[tuple[object, ...], int]:
    """Path of each tensor -> its storage."""
    if isinstance(value, torch.Tensor):
        return {path: value.untyped_storage().data_ptr()} if value.numel() else {}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {p: s for key, part in parts for p, s in storages(part, (*path, key)).items()}


def sharing(value: object) -> set[frozenset[tuple[object, ...]]]:
    groups: dict[int, set[tuple[object, ...]]] = {}
    for path, storage in storages(value).items():
        groups.setdefault(storage, set()).add(path)
    return {frozenset(paths) for paths in groups.values() if len(paths) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name + "/" + path.name)
def test_the_way_back_gives_equal_objects(path: Path, tmp_path: Path) -> None:
    checkpoint = lift(path)
    dialect = Plain() if checkpoint.provenance.dialect == "plain" else StateDict()
    written = write(checkpoint, tmp_path / path.name, dialect)
    before = load(path)
    for options in ({"mmap": False}, {"mmap": True}):
        after = load(written, **options)
        assert_same(before, after)
        assert sharing(before) == sharing(after)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name + "/" + path.name)
def test_parameters_and_slots_are_what_torch_reads(path: Path) -> None:
    checkpoint = lift(path)
    tensors = {t.untyped_storage().data_ptr(): t for t in _tensors(load(path))}
    have = sorted(_bits(tensor) for tensor in tensors.values())
    found = {tensor.read().tobytes() for _, tensor in checkpoint.tensors()}
    steps = {np.float32(s).tobytes() for o in checkpoint.optimizers for s in o.param_steps.values()}
    rates = {b for b in have if len(b) == 4}
    assert set(have) <= found | steps | rates


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def test_a_state_dict_written_from_a_document_alone_loads_and_stays_tied(tmp_path: Path) -> None:
    checkpoint = replace(lift(FIXTURES / "tied" / "run.pt"), residue=None)
    loaded = load(write(checkpoint, tmp_path / "weights.pt", StateDict()), mmap=True)
    assert type(loaded) is OrderedDict
    assert list(loaded) == list(checkpoint.params)
    assert sharing(loaded) == {frozenset({("embed.weight",), ("head.weight",)})}


def test_a_bare_state_dict_keeps_metadata_prefix_and_empties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(0, 2))
    state = model.to(memory_format=torch.channels_last).state_dict(prefix="module.")
    torch.save(state, tmp_path / "a.pt")
    checkpoint = lift(tmp_path / "a.pt")
    assert list(checkpoint.params) == list(model.state_dict())
    assert_same(state, load(write(checkpoint, tmp_path / "b.pt", StateDict())))


def test_an_edited_step_is_what_the_optimizer_and_the_loop_resume_from(tmp_path: Path) -> None:
    checkpoint = lift(FIXTURES / "mlp-adamw-named" / "run.pt")
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=77)))
    loaded = load(write(edited, tmp_path / "run.pt", Plain()))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.named_parameters())
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert {float(optimizer.state[p]["step"]) for p in model.parameters()} == {77.0}
    assert loaded["global_step"] == 77


def test_a_fresh_template_filled_resumes_as_the_source_does(tmp_path: Path) -> None:
    source = lift(FIXTURES / "linear-adam-9-steps" / "run.pt")
    template = lift(FIXTURES / "never-stepped" / "run.pt")
    names = dict(zip(source.params, template.params, strict=True))
    (given,), (fresh,) = source.optimizers, template.optimizers
    slots = {slot: {names[n]: t for n, t in by.items()} for slot, by in given.slots.items()}
    filled = replace(
        template,
        progress=replace(source.progress, epochs=Known(value=4, status="supplied", source="--set")),
        params={names[n]: replace(p, name=names[n]) for n, p in source.params.items()},
        optimizers=(replace(fresh, step=given.step, slots=slots),),
    )
    loaded = load(write(filled, tmp_path / "run.pt", Plain()))
    assert (loaded["step"], loaded["epoch"]) == (9, 4)
    assert [float(entry["step"]) for entry in loaded["optimizer"]["state"].values()] == [9.0, 9.0]

    original = load(FIXTURES / "linear-adam-9-steps" / "run.pt")
    runs = []
    for model, parts in (
        (torch.nn.Linear(1, 1), (original["model_state_dict"], original["optimizer_state_dict"])),
        (torch.nn.Sequential(torch.nn.Linear(1, 1)), (loaded["model"], loaded["optimizer"])),
    ):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        model.load_state_dict(parts[0])
        optimizer.load_state_dict(parts[1])
        torch.manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 1)).pow(2).mean().backward()
            optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


def test_numpy_counters_are_read_and_written_as_such(tmp_path: Path) -> None:
    run = load(FIXTURES / "linear-adam-9-steps" / "run.pt")
    torch.save({**run, "global_step": np.int64(9), "epoch": np.int32(1)}, tmp_path / "a.pt")
    checkpoint = lift(tmp_path / "a.pt")
    assert value_of(checkpoint.progress.step) == 9
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=11)))
    raw = Plain().lower(edited)
    layout = FORMATS["pytorch"].layout(
        replace(raw, attributes={**raw.attributes, "allow_opaque_globals": True}), tmp_path / "b.pt"
    )
    write_layout(layout, tmp_path / "b.pt")
    loaded = torch.load(tmp_path / "b.pt", weights_only=False)
    assert (type(loaded["global_step"]), loaded["global_step"]) == (np.int64, 11)
    assert (type(loaded["epoch"]), loaded["epoch"]) == (np.int32, 1)


def rewritten(manifest: Path, change: object) -> None:
    """An edit of a manifest as a person would make it."""
    data = json.loads(manifest.read_text())
    change(data)  # type: ignore[operator]
    manifest.write_text(json.dumps(data))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name + "/" + path.name)
def test_through_a_neutral_directory_the_way_back_gives_equal_objects(path: Path, tmp_path: Path) -> None:
    convert(path, tmp_path / "run", to="neutral")
    convert(tmp_path / "run", tmp_path / "run.pt", to="pytorch:plain")
    before, after = load(path), load(tmp_path / "run.pt", mmap=True)
    assert_same(before, after)
    assert sharing(before) == sharing(after)


def test_a_step_edited_in_the_manifest_reaches_every_place(tmp_path: Path) -> None:
    path = FIXTURES / "mlp-adamw-named" / "run.pt"
    convert(path, tmp_path / "run", to="neutral")
    rewritten(tmp_path / "run" / "manifest.json", lambda data: data["progress"]["step"].update(value=77))
    convert(tmp_path / "run", tmp_path / "run.pt", to="pytorch:plain")
    loaded = load(tmp_path / "run.pt")
    assert {float(entry["step"]) for entry in loaded["optimizer"]["state"].values()} == {77.0}
    assert loaded["global_step"] == 77


def test_a_counter_of_unknown_pace_stops_a_step_edited_in_the_manifest(tmp_path: Path) -> None:
    path = FIXTURES / "module-prefix" / "run.pt"
    convert(path, tmp_path / "run", to="neutral")
    rewritten(tmp_path / "run" / "manifest.json", lambda data: data["progress"]["step"].update(value=77))
    with pytest.raises(CkptError) as caught:
        convert(tmp_path / "run", tmp_path / "run.pt", to="pytorch:plain")
    assert caught.value.problems[0].code == "residue-stale"
