"""What `inspect` needs for a torch.distributed.checkpoint folder of very many tensors, as torch writes it.

    python benchmarks/bench_dcp.py                      # 25,000 parameters with AdamW, 100,000 tensors
    python benchmarks/bench_dcp.py --folder run/step-1  # one that is there already

Without `--folder` torch saves the folder first, which takes minutes: its `.metadata` names every class and
every size anew, which ckptconv's own does not. See README.md in this directory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def save(folder: Path, parameters: int) -> None:
    """A model and its AdamW, as `get_state_dict` gives them."""
    import torch
    import torch.distributed.checkpoint as dcp

    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(parameters // 2):
        shapes |= {f"layers.{layer}.weight": (6, 4), f"layers.{layer}.bias": (6,)}
    model = {name: torch.randn(shape) for name, shape in shapes.items()}
    state = {
        name: {"step": torch.tensor(7.0), "exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape)}
        for name, shape in shapes.items()
    }
    group = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    optimizer = {"state": state, "param_groups": [{**group, "params": list(shapes)}]}
    dcp.save({"model": model, "optim": optimizer, "epoch": 2}, checkpoint_id=folder)


def measure(folder: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak MiB of the command, start of Python included."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "ckptconv", "inspect", str(folder)], stdout=subprocess.DEVNULL
    ) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"inspect: exit {child.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=25_000, help="of the model; four tensors for each")
    parser.add_argument("--folder", type=Path, help="a folder that is there already")
    parser.add_argument("--repeat", type=int, default=2, help="runs; the fastest counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptconv-bench-") as here:
        folder = arguments.folder or Path(here) / "folder"
        if arguments.folder is None:
            # In a process of its own: a child's peak is no less than what its parent has when it starts.
            saving = multiprocessing.get_context("spawn").Process(
                target=save, args=(folder, arguments.parameters)
            )
            saving.start()
            saving.join()
        seconds, cpu, peak = map(min, zip(*(measure(folder) for _ in range(arguments.repeat)), strict=True))
        print("| command | s | CPU s | peak RSS, MiB |\n|---|---|---|---|")
        print(f"| inspect, DCP folder | {seconds:.1f} | {cpu:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
