"""How long a conversion takes and how much memory it needs, beside a plain copy of the same file.

    python benchmarks/bench_convert.py [--gib 2] [--directory DIR] [--evict] [CASE ...]

Makes a torch checkpoint of that size with ckptconv's own writer (random float32 matrices, no framework), then
runs each case in a process of its own. See README.md in this directory for the cases and for results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from synthetic import RandomTensor

from ckptconv import dtypes, engine, verification
from ckptconv.formats import pytorch, safetensors, tensor_bundle
from ckptconv.formats.base import Format
from ckptconv.ops import Cast, Permute
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.tensor import TensorRef, TensorSpec

FORMATS: dict[str, Format] = {
    "pytorch": pytorch.PyTorchFormat(),
    "safetensors": safetensors.FORMAT,
    "tensorflow": tensor_bundle.FORMAT,
}
SIDES = (4096, 1024, 8192, 2048, 4096, 16384)
"""Square matrices of these sides, again and again, as far as the size allows."""


def fixture(path: Path, nbytes: int) -> None:
    """A bare state_dict of about that many bytes, every tensor in a storage of its own."""
    items: list[tuple[str, TensorRef]] = []
    left, number = nbytes, 0
    while left > 0:
        side = SIDES[number % len(SIDES)]
        while side > 512 and side * side * 4 > left:
            side //= 2
        spec = TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=(side, side))
        items.append((f"layers.{number}.weight", RandomTensor(spec=spec, seed=number)))
        left -= spec.nbytes
        number += 1
    tree = RawTree(format="pytorch", root=DictNode(items=tuple(items), kind="collections.OrderedDict"))
    engine.write(FORMATS["pytorch"].layout(tree, path), path, force=True)


def through_engine(
    to: str, change: Callable[[TensorRef], TensorRef], verify: bool
) -> Callable[[Path, Path], None]:
    """A conversion without the command line: read, lay out, write, read again."""

    def run(source: Path, target: Path) -> None:
        raw = FORMATS["pytorch"].read(source)
        assert isinstance(raw.root, DictNode)
        items = tuple((key, change(t) if isinstance(t, TensorRef) else t) for key, t in raw.root.items)
        tree = RawTree(format=to, root=DictNode(items=items))
        layout = FORMATS[to].layout(tree, target)
        check = verification.checker(FORMATS[to], tree, layout) if verify else None
        engine.write(layout, target, force=True, verify=check)

    return run


def through_command_line(*arguments: str) -> Callable[[Path, Path], None]:
    """`ckptconv convert`, in this process."""

    def run(source: Path, target: Path) -> None:
        from ckptconv.cli import main

        sys.argv = ["ckptconv", "convert", str(source), str(target), "--force", *arguments]
        main()

    return run


def copy(source: Path, target: Path) -> None:
    """The yardstick: sendfile and fsync."""
    with source.open("rb") as reading, target.open("wb") as writing:
        offset, size = 0, os.fstat(reading.fileno()).st_size
        while offset < size:
            offset += os.sendfile(writing.fileno(), reading.fileno(), offset, min(size - offset, 1 << 30))
        os.fsync(writing.fileno())


def _same(tensor: TensorRef) -> TensorRef:
    return tensor


def _turned(tensor: TensorRef) -> TensorRef:
    return tensor.apply(Permute((1, 0)))


def _halved(tensor: TensorRef) -> TensorRef:
    return tensor.apply(Cast("bfloat16"))


def _turned_and_halved(tensor: TensorRef) -> TensorRef:
    return tensor.apply(Cast("bfloat16")).apply(Permute((1, 0)))


CASES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "copy": (".pt", copy),
    "safetensors": (".safetensors", through_engine("safetensors", _same, True)),
    "safetensors-no-verify": (".safetensors", through_engine("safetensors", _same, False)),
    "tensorflow": ("", through_engine("tensorflow", _same, True)),
    "pytorch": (".pt", through_engine("pytorch", _same, True)),
    "tensorflow-transposed": ("", through_engine("tensorflow", _turned, True)),
    "safetensors-bfloat16": (".safetensors", through_engine("safetensors", _halved, True)),
    "tensorflow-transposed-bfloat16": ("", through_engine("tensorflow", _turned_and_halved, True)),
    "cli-safetensors": (".safetensors", through_command_line("--to", "safetensors")),
    "cli-tensorflow": ("", through_command_line("--to", "tensorflow:tf-module")),
}


def status(pid: int) -> dict[str, int]:
    """Memory of a process, in bytes, from /proc."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}


def measure(case: str, source: Path, target: Path) -> dict[str, float]:
    """Run one case in a child; seconds from its first to its last instruction of the conversion."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", case, str(source), str(target)],
        stdout=subprocess.PIPE,
        text=True,
    )
    anonymous = 0
    while child.poll() is None:
        try:
            anonymous = max(anonymous, status(child.pid).get("RssAnon", 0))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.02)
    output = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"{case}: exit {child.returncode}")
    return {**json.loads(output.splitlines()[-1]), "RssAnon": anonymous}


def child(case: str, source: Path, target: Path) -> None:
    base = status(os.getpid())["VmHWM"]
    started = time.perf_counter()
    try:
        CASES[case][1](source, target)
    except SystemExit as done:
        if done.code:
            raise
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "VmHWM": status(os.getpid())["VmHWM"], "base": base}))


def evict(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rows(arguments: argparse.Namespace, here: Path) -> Iterator[str]:
    source = here / "source.pt"
    fixture(source, int(arguments.gib * (1 << 30)))
    size = source.stat().st_size
    os.sync()
    names = [name for name in arguments.cases or CASES if name != "copy"]
    what = f"{size / (1 << 30):.2f} GiB{', cold' if arguments.evict else ''}"
    yield f"| case, {what} | s | MB/s | of a copy | peak RSS, MiB | RssAnon, MiB |"
    yield "|---|---|---|---|---|---|"
    plain = 0.0
    for name in ["copy", *names]:
        results = []
        for _ in range(arguments.repeat):
            if arguments.evict:
                evict(source)
            results.append(measure(name, source, here / f"target{CASES[name][0]}"))
            for path in here.iterdir():
                if path != source:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()
        seconds = min(result["seconds"] for result in results)
        plain = plain or seconds
        peak, anon = (max(result[key] for result in results) / (1 << 20) for key in ("VmHWM", "RssAnon"))
        speed = f"{seconds:.2f} | {size / seconds / 1e6:.0f} | {seconds / plain:.2f}"
        yield f"| {name} | {speed} | {peak:.0f} | {anon:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case; the fastest counts")
    parser.add_argument("--directory", help="where source and targets are written; needs twice the size")
    parser.add_argument(
        "--evict", action="store_true", help="drop the source from the page cache before each run"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="all by default")
    arguments = parser.parse_args()
    if arguments.child:
        case, source, target = arguments.child
        child(case, Path(source), Path(target))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="ckptconv-bench-") as here:
        for row in rows(arguments, Path(here)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
