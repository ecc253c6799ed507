"""Cuts and flips of one checkpoint: what reading it says of every damaged copy.

    python -m tests.sweeps.damage PATH [--flips 1000] [--cuts 1000000] [--seed 0] [--unchecked]

Every file of the checkpoint is cut at each boundary of what the reader reads, and a byte to either side; and
one bit is flipped at random positions. A copy is judged by `judge`; what is none of the allowed outcomes is
printed in JSON, the counts last. `--unchecked`: the container has no checksums, so other values may come out,
but nothing else may happen. More than 10 s, or memory beyond 256 MiB and four times the files, is a failure.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ckptconv
from ckptconv import listing
from ckptconv.detect import read_raw
from ckptconv.errors import CkptError
from ckptconv.source import FileSource
from ckptconv.tensor import TensorRef

SECONDS = 10
ROOM_NBYTES = 256 << 20

Contents = dict[str, tuple[str, tuple[int, ...], str]]
"""Key -> dtype, shape and digest of every tensor."""


class TooSlow(Exception):
    """More than `SECONDS`."""


def contents(path: Path) -> Contents:
    """Every tensor of a checkpoint that validates; the document is lifted, too.

    Raises: CkptError with what is wrong.
    """
    problems = ckptconv.validate(path)
    if problems:
        raise CkptError(*problems)
    return {
        listing.key_of(key): (leaf.dtype.name, leaf.shape, listing.digest(leaf))
        for key, leaf in listing.leaves(read_raw(path).root)
        if isinstance(leaf, TensorRef)
    }


def judge(path: Path, whole: Contents) -> str:
    """`error`, `equal`, `other` (a tensor is another one) or what went wrong."""

    def late(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = contents(path)
    except CkptError:
        return "error"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "equal" if found == whole else "other"


def boundaries(path: Path) -> dict[str, set[int]]:
    """File name -> where something that is read begins or ends."""
    seen: dict[str, set[int]] = collections.defaultdict(set)
    read_into = FileSource.read_into

    def watching(source: FileSource, offset: int, out: memoryview) -> None:
        seen[source.path] |= {offset, offset + len(out)}
        read_into(source, offset, out)

    FileSource.read_into = watching  # type: ignore[method-assign]
    try:
        contents(path)
    finally:
        FileSource.read_into = read_into  # type: ignore[method-assign]
    return seen


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint: of a folder, of a bundle's prefix, or the one."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}.*"))


def damages(
    file: Path, ends: set[int], cuts: int, flips: int, chance: random.Random
) -> Iterator[tuple[str, bytes]]:
    """What was done, and the file's bytes then."""
    data = file.read_bytes()
    places = sorted({end + step for end in ends for step in (-1, 0, 1)} & set(range(len(data))))
    for cut in sorted(chance.sample(places, min(cuts, len(places)))):
        yield f"cut at {cut}", data[:cut]
    for _ in range(flips if data else 0):
        position, bit = chance.randrange(len(data)), chance.randrange(8)
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        yield f"bit {bit} of byte {position}", bytes(flipped)


def sweep(path: Path, cuts: int, flips: int, seed: int, allowed: set[str]) -> dict[str, int]:
    """How often each outcome came; prints those that are not allowed."""
    chance, counts = random.Random(seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        for file in files_of(path):
            place = copy / file.relative_to(path) if path.is_dir() else Path(folder) / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        whole = contents(copy)
        ends = boundaries(copy)
        size = sum(file.stat().st_size for file in files_of(copy))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + ROOM_NBYTES + 4 * size
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        files = files_of(copy)
        for file in files:
            data = file.read_bytes()
            part = len(data) / max(size, 1)
            shares = (max(int(part * count), min(count, 10)) for count in (cuts, flips))
            for what, damaged in damages(file, ends[str(file)], *shares, chance):
                file.write_bytes(damaged)
                outcome = judge(copy, whole)
                counts[outcome] += 1
                if outcome not in allowed:
                    print(json.dumps({"file": file.name, "damage": what, "outcome": outcome}), flush=True)
            file.write_bytes(data)
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--cuts", type=int, default=1_000_000, help="at most so many")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unchecked", action="store_true")
    arguments = parser.parse_args()
    allowed = {"error", "equal"} | ({"other"} if arguments.unchecked else set())
    counts: dict[str, Any] = sweep(arguments.path, arguments.cuts, arguments.flips, arguments.seed, allowed)
    print(json.dumps(counts))
    sys.exit(bool(counts.keys() - allowed))


if __name__ == "__main__":
    main()
