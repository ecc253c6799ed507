"""What the command line needs for a checkpoint with very many tensors, or for a training run of any size.

    python benchmarks/bench_many.py                                   # 25,000 parameters with AdamW
    python benchmarks/bench_many.py --layers 4 --shape 8192 5504      # 2 GiB in few tensors

Makes the run and the template of its Keras counterpart with ckptconv's own writers (`synthetic.py`), then
runs each command in a process of its own, start of Python included. See README.md in this directory.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Case:
    """One command; what it writes stays for the cases behind it."""

    name: str
    arguments: tuple[str, ...]


COUNTERS = ("--set", "epochs=3", "--set", "epoch_convention=count")
CASES = (
    Case("help", ("--help",)),
    Case("inspect, two parameters", ("inspect", "tiny.pt")),
    Case("inspect, torch state_dict", ("inspect", "weights.pt")),
    Case(
        "torch state_dict to shards",
        ("convert", "weights.pt", "shards", "--to", "safetensors", "--shard-size", "1MB"),
    ),
    Case("inspect, safetensors in shards", ("inspect", "shards")),
    Case("inspect, torch run", ("inspect", "run.pt")),
    Case("inspect, Keras bundle", ("inspect", "template")),
    Case("torch run to safetensors", ("convert", "run.pt", "run.safetensors")),
    Case("inspect, safetensors", ("inspect", "run.safetensors")),
    Case(
        "torch run to bundle of names",
        ("convert", "run.pt", "names", "--to", "tensorflow:tf-module", "--allow", "state-dropped"),
    ),
    Case("torch run to neutral", ("convert", "run.pt", "neutral", "--to", "neutral")),
    Case("inspect, neutral", ("inspect", "neutral")),
    Case("torch run to DCP folder", ("convert", "run.pt", "folder", "--to", "dcp")),
    Case("inspect, DCP folder", ("inspect", "folder")),
    Case("torch run to Keras 3", ("convert", "run.pt", "keras", "--template", "template")),
    Case("Keras 3 to torch run", ("convert", "keras", "back.pt", "--template", "run.pt", *COUNTERS)),
)


def measure(case: Case, here: Path) -> dict[str, float]:
    """Run one command in a child; seconds from its start to its end."""
    started = time.perf_counter()
    child = subprocess.run(
        [sys.executable, __file__, "--child", *case.arguments], cwd=here, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"{case.name}: exit {child.returncode}\n{child.stderr}")
    return {**json.loads(child.stderr.splitlines()[-1]), "seconds": seconds}


def child(arguments: list[str]) -> None:
    from ckptconv.cli import main

    sys.argv = ["ckptconv", *arguments]
    code: object = 0
    try:
        main()
    except SystemExit as done:
        code = done.code
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"cpu": time.process_time(), "VmHWM": peak}), file=sys.stderr)
    raise SystemExit(code)


def fixtures(arguments: argparse.Namespace, here: Path) -> int:
    """Everything that is read; how many bytes the run has."""
    import synthetic  # not in the children, whose imports are measured

    outputs, inputs = arguments.shape
    layers = synthetic.dense_layers(arguments.layers, outputs, inputs)
    synthetic.write(synthetic.torch_run(synthetic.dense_layers(1, 3, 2)), here / "tiny.pt")
    wide = synthetic.dense_layers(arguments.layers * 4, outputs, inputs)  # as many tensors as the run has
    synthetic.write(synthetic.torch_run(wide, optimizer=False), here / "weights.pt")
    synthetic.write(synthetic.torch_run(layers), here / "run.pt")
    synthetic.write(synthetic.keras_template(layers), here / "template")
    return (here / "run.pt").stat().st_size


def rows(arguments: argparse.Namespace, here: Path) -> Iterator[str]:
    size = fixtures(arguments, here)
    os.sync()
    what = f"run and state_dict of {8 * arguments.layers:,} tensors, {size / (1 << 20):,.0f} MiB"
    yield f"| command, {what} | s | CPU s | peak RSS, MiB |"
    yield "|---|---|---|---|"
    for case in CASES:
        results = []
        for _ in range(arguments.repeat):
            if case.arguments[0] == "convert":
                remove(here, case.arguments[2])
            results.append(measure(case, here))
        seconds, cpu = (min(result[key] for result in results) for key in ("seconds", "cpu"))
        peak = max(result["VmHWM"] for result in results) / (1 << 20)
        yield f"| {case.name} | {seconds:.1f} | {cpu:.1f} | {peak:.0f} |"


def remove(here: Path, name: str) -> None:
    """The files of a target; a bundle has several."""
    for path in (here / name, *here.glob(f"{name}.data-*"), *here.glob(f"{name}.index")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12_500, help="dense layers, with two parameters each")
    parser.add_argument("--shape", type=int, nargs=2, default=(6, 4), help="outputs and inputs of a layer")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each command; the fastest counts")
    parser.add_argument("--directory", help="where everything is written; needs six times the run's size")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="ckptconv-bench-") as here:
        for row in rows(arguments, Path(here)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
