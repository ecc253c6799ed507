"""One measured process: ckptconv, a plain copy, or what people write; it reports on itself at its end.

    python benchmarks/peers.py ckptconv convert run.pt out --to neutral
    python benchmarks/peers.py copy FILE...
    python benchmarks/peers.py peer "torch.load, save_file" weights.pt weights.safetensors

The imports of a way are done before its clock starts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], None]


def ckptconv(*arguments: str) -> Work:
    """The command line, with what it imports for these arguments (a run on nothing imports it)."""
    from ckptconv.cli import main
    from ckptconv.conversion import convert  # noqa: F401
    from ckptconv.dialects.table import DIALECTS
    from ckptconv.formats.table import FORMATS
    from ckptconv.rendering import report  # noqa: F401

    assert len(FORMATS) < len(DIALECTS)  # which imports all of them

    def work() -> None:
        sys.argv = ["ckptconv", *arguments]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main()
        except SystemExit as done:
            if done.code:
                raise

    return work


def copy(*files: str) -> Work:
    """sendfile and fsync, as `cp` does it."""

    def work() -> None:
        for file in files:
            target = f"{file}.copy"
            with open(file, "rb") as reading, open(target, "wb") as writing:
                offset, size = 0, os.fstat(reading.fileno()).st_size
                while offset < size:
                    count = min(size - offset, 1 << 30)
                    offset += os.sendfile(writing.fileno(), reading.fileno(), offset, count)
                os.fsync(writing.fileno())
        for file in files:
            os.unlink(f"{file}.copy")

    return work


def load_and_save_file(source: str, target: str, mmap: bool = False) -> Work:
    import torch
    from safetensors.torch import save_file

    def work() -> None:
        save_file(torch.load(source, mmap=mmap, weights_only=True), target)

    return work


def load_mapped_and_save_file(source: str, target: str) -> Work:
    return load_and_save_file(source, target, mmap=True)


def safetensors_convert(source: str, target: str) -> Work:
    """As safetensors' `bindings/python/convert.py` does it: contiguous copies, then every tensor compared."""
    import torch
    from safetensors.torch import load_file, save_file

    def work() -> None:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
        loaded = {name: tensor.contiguous() for name, tensor in loaded.items()}
        save_file(loaded, target, metadata={"format": "pt"})
        again = load_file(target)
        for name, tensor in loaded.items():
            if not torch.equal(tensor, again[name]):
                raise RuntimeError(f"'{name}' does not match")

    return work


def load_and_write_checkpoint(source: str, target: str) -> Work:
    """A variable for every tensor, kernels and their moments transposed."""
    import tensorflow as tf
    import torch

    def work() -> None:
        run = torch.load(source, weights_only=True)
        flat = dict(run["model"])
        for index, state in run["optimizer"]["state"].items():
            flat |= {f"{index}/{name}": tensor for name, tensor in state.items()}
        variables = {
            name.replace(".", "_"): tf.Variable(tensor.numpy().T if tensor.ndim == 2 else tensor.numpy())
            for name, tensor in flat.items()
        }
        tf.train.Checkpoint(**variables).write(target)

    return work


def load_checkpoint_and_save(source: str, target: str) -> Work:
    """Every tensor of the bundle under its key, kernels and their moments transposed."""
    import tensorflow as tf
    import torch

    def work() -> None:
        reader = tf.train.load_checkpoint(source)
        state = {}
        for key, shape in reader.get_variable_to_shape_map().items():
            if key != "_CHECKPOINTABLE_OBJECT_GRAPH":
                tensor = torch.from_numpy(reader.get_tensor(key)) if shape else reader.get_tensor(key)
                state[key] = tensor.T.contiguous() if len(shape) == 2 else tensor
        torch.save(state, target)

    return work


def dcp_to_torch(source: str, target: str) -> Work:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    return lambda: dcp_to_torch_save(source, target)


PEERS: dict[str, Callable[[str, str], Work]] = {
    "torch.load, save_file": load_and_save_file,
    "torch.load(mmap), save_file": load_mapped_and_save_file,
    "safetensors' convert": safetensors_convert,
    "torch.load, tf.train.Checkpoint.write": load_and_write_checkpoint,
    "tf.train.load_checkpoint, torch.save": load_checkpoint_and_save,
    "dcp_to_torch_save": dcp_to_torch,
}


def peer(name: str, source: str, target: str) -> Work:
    return PEERS[name](source, target)


def counted(file: str, key: str) -> int:
    """A number that the kernel keeps of this process."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    kind, *arguments = sys.argv[1:]
    work = {"ckptconv": ckptconv, "copy": copy, "peer": peer}[kind](*arguments)
    read, written = counted("io", "rchar"), counted("io", "wchar")
    started = time.perf_counter()
    work()
    report = {
        "working": time.perf_counter() - started,
        "peak_rss": counted("status", "VmHWM") << 10,
        "read": counted("io", "rchar") - read,
        "written": counted("io", "wchar") - written,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
