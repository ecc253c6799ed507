"""Run as one or opcode by opcode, a tensor's sequence gives the same tree or the same error."""

from __future__ import annotations

import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.errors import CkptError
from ckptconv.formats.pickle_machine import Machine
from ckptconv.formats.pickle_reader import unpickle
from ckptconv.formats.torch_decode import Decoder
from ckptconv.formats.torch_idiom import TensorIdiom
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, transform
from ckptconv.tensor import BufferSource, Extent, StoredTensor

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RECORD_NBYTES = 96


class Counting(TensorIdiom):
    """Counts the sequences that were run as one."""

    __slots__ = ("runs",)

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.runs = 0

    def __call__(self, machine: Machine, at: int) -> int:
        after = super().__call__(machine, at)
        self.runs += after > at
        return after


def wide(data: bytes) -> bytes:
    """The pickle with every memo number raised beyond one byte, as a large one has them."""
    out, edges = bytearray(), [*(at for _, _, at in pickletools.genops(data)), len(data)]
    for (opcode, number, at), end in zip(pickletools.genops(data), edges[1:], strict=True):
        if opcode.name in ("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"):
            out += (b"r" if "PUT" in opcode.name else b"j") + struct.pack("<I", 256 + number)
        else:
            out += data[at:end]
    return bytes(out)


def pickled(value: Any, path: Path) -> tuple[bytes, dict[str, int]]:
    """What torch saves, wide, and the records of its storages."""
    torch.save(value, path)
    return records(path)


def records(path: Path) -> tuple[bytes, dict[str, int]]:
    with zipfile.ZipFile(path) as file:
        prefix = file.namelist()[0].partition("/")[0]
        lengths = {i.filename.removeprefix(f"{prefix}/data/"): i.file_size for i in file.infolist()}
        return wide(file.read(f"{prefix}/data.pkl")), lengths


SOURCE = BufferSource(bytes(0))


def read(data: bytes, lengths: dict[str, int], *, idiom: bool) -> tuple[Any, int]:
    """The tree, or codes and places of the errors; and how many sequences were run as one."""

    def find(key: str) -> Extent | None:
        nbytes = lengths.get(key)
        # Where it lies follows from the key alone, so that two readings can be compared.
        return None if nbytes is None else Extent(source=SOURCE, offset=hash(key), nbytes=nbytes)

    decoder = Decoder(find, name="x", file_nbytes=10_000)
    counting = Counting(decoder)
    at_once = replace(decoder.at_once, idiom=counting) if idiom else decoder.at_once
    try:
        found = unpickle(data, decode=decoder.decode, name="x", at_once=at_once)
    except CkptError as error:
        return [(problem.code, problem.loc) for problem in error.problems], counting.runs
    return (replace(found, root=transform(found.root, with_content)), decoder.locations, decoder.storages), (
        counting.runs
    )


def with_content(_: tuple[str | int, ...], node: Node) -> Node:
    """What stands in the pickle itself: a numpy array's bytes have a source of their own in each reading."""
    outside = not isinstance(node, StoredTensor) or node.extent.source is SOURCE
    return node if outside else Opaque(kind="content", args=(node.read().tobytes(),))


def both(data: bytes, lengths: dict[str, int]) -> tuple[Any, int]:
    one_by_one, _ = read(data, lengths, idiom=False)
    as_one, runs = read(data, lengths, idiom=True)
    assert as_one == one_by_one
    return as_one, runs


def archives() -> Iterator[Path]:
    for path in sorted(FIXTURES.rglob("*")):
        if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".zip") and zipfile.is_zipfile(path):
            yield path


def test_every_fixture_reads_alike() -> None:
    runs = [both(*records(path))[1] for path in archives() if b"data.pkl" in path.read_bytes()]
    assert len(runs) >= 20
    assert sum(map(bool, runs)) >= 10


def test_a_training_run_is_read_so(tmp_path: Path) -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)), torch.nn.BatchNorm1d(4))
    adam = {
        number: {
            "step": torch.tensor(9.0),
            "exp_avg": torch.ones(p.shape),
            "exp_avg_sq": torch.zeros(p.shape),
        }
        for number, p in enumerate(layers.parameters())
    }
    _, runs = both(
        *pickled({"model": layers.state_dict(), "optimizer": {"state": adam}}, tmp_path / "run.pt")
    )
    # The first tensor of all, and the first of another class of storage, name what others get.
    assert runs == len(layers.state_dict()) + 3 * len(adam) - 2


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_of_every_kind(protocol: int, tmp_path: Path) -> None:
    flat, dense = torch.arange(60.0), torch.arange(24).reshape(2, 3, 4)
    views = [flat[i : i + 6].view(2, 3) for i in range(0, 54, 6)]
    kinds = [
        torch.tensor(1.5), torch.zeros(0), torch.zeros(3, 0), dense, dense.mT, dense[:, ::2], flat[::7],
        torch.ones(2, 1, 1, 1, 1, 2), torch.ones(1).expand(5), torch.ones(2, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.uint16),
        torch.ones(2, dtype=torch.complex64).conj(), torch.ones(300, 300), torch.ones(70_000),
    ]  # fmt: skip
    again = [tensor.detach() for tensor in kinds]
    torch.save([kinds, views, again], tmp_path / "x.pt", pickle_protocol=protocol)
    _, runs = both(*records(tmp_path / "x.pt"))
    assert (runs > 20) == (protocol == 2)


def model(count: int) -> tuple[bytes, dict[str, int]]:
    """The pickle that torch writes for a small state_dict, made without a file."""

    class Tensors(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.id if isinstance(value, Storage) else None

    class Storage:
        def __init__(self, key: str) -> None:
            self.id = "storage", torch.FloatStorage, key, "cpu", 24

    class Tensor:
        def __init__(self, key: str) -> None:
            self.key = key

        def __reduce__(self) -> Any:
            size, strides = (tuple(numbers) for numbers in ([6, 4], [4, 1]))  # constants would be got
            args = Storage(self.key), 0, size, strides, False, OrderedDict()
            return torch._utils._rebuild_tensor_v2, args

    out = bytearray()

    class Sink:
        def write(self, data: Any) -> None:
            out.extend(data)

    keys = [key for number in range(count // 2) for key in [str(number)] * 2]
    Tensors(Sink(), 2).dump({f"layers.{i}.weight": Tensor(key) for i, key in enumerate(keys)})
    return wide(bytes(out)), dict.fromkeys(keys, RECORD_NBYTES)


MODEL, LENGTHS = model(6)


def test_the_model_is_read_so() -> None:
    (found, locations, storages), runs = both(MODEL, LENGTHS)
    assert runs == 5
    assert isinstance(found.root, DictNode)
    assert all(isinstance(tensor, StoredTensor) and tensor.shape == (6, 4) for _, tensor in found.root.items)
    assert list(locations) == ["cpu"]
    assert len(storages) == 3


def test_what_was_left_out_can_be_had() -> None:
    """The pickle ends in a GET of each memo entry in turn, also of the tuples and the OrderedDict."""
    numbers = [number for opcode, number, _ in pickletools.genops(MODEL) if opcode.name == "LONG_BINPUT"]
    kinds: set[str] = set()
    for number in numbers:
        (found, *_), _ = both(MODEL[:-1] + b"j" + struct.pack("<I", number) + b"\x86.", LENGTHS)
        assert isinstance(found.root, ListNode)
        kinds.add(kind_of(found.root.items[1]))
    assert {"tuple", "collections.OrderedDict", "StoredTensor", "str"} <= kinds


def kind_of(node: Node) -> str:
    return node.kind if isinstance(node, (ListNode, DictNode, Opaque)) else type(node).__name__


def test_a_storage_that_is_too_short_or_of_two_lengths_is_told() -> None:
    assert both(MODEL, {**LENGTHS, "2": RECORD_NBYTES - 1})[0][0][0] == "truncated-tensor"
    assert both(MODEL, {"0": RECORD_NBYTES, "1": RECORD_NBYTES})[0][0][0] == "corrupt-file"
    last = MODEL.rindex(b"K\x18t")
    assert both(MODEL[:last] + b"K\x17" + MODEL[last + 2 :], LENGTHS)[0][0][0] == "corrupt-file"


PIECES = [
    b"(", b")", b"t", b"R", b"Q", b"0", b"2", b"\x86", b"\x87", b"\x88", b"\x89", b"\x94", b"K\x00", b"K\xff",
    b"M\xff\xff",
    b"J\xff\xff\xff\xff", b"J\x01\x00\x00\x00", b"h\x00", b"N", b"}", b"b", b"X\x01\x00\x00\x009",
    *(bytes((opcode, low, 1, 0, 0)) for opcode in b"jr" for low in range(0, 40, 3)),
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The model with a few bytes changed, or opcodes put in, left out or doubled."""
    data = bytearray(MODEL)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        end = at + draw(st.sampled_from((0, 1, 2, 5)))
        piece = draw(
            st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from(PIECES), st.just(data[at:end] * 2))
        )
        data[at:end] = piece
    return bytes(data)


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_damaged_pickles_read_alike(data: bytes) -> None:
    both(data, LENGTHS)


def test_every_byte_changed_reads_alike() -> None:
    end = MODEL.index(b"\x89", MODEL.index(b"layers.2"))
    for at in range(MODEL.index(b"layers.1"), end):
        for value in (MODEL[at] ^ 1, 0x4B, 0x28, 0xFF):
            both(MODEL[:at] + bytes((value,)) + MODEL[at + 1 :], LENGTHS)
