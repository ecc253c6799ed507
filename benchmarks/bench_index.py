"""The `.index` of a TensorFlow checkpoint with very many keys: parsed and written, CPU seconds.

    python benchmarks/bench_index.py                # 100,000 keys: within 2 s parsed, within 3 s written
    python benchmarks/bench_index.py --keys 20000

The bundle is written once with ckptconv's own writer, small float32 tensors under keys as Keras has them.
`parsed` is from the file to the tree of lazy tensors, checksums of the table included; `written` from the
tree to the bytes of the index, without those of the tensors: they equal those that were read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from ckptconv import engine
from ckptconv.formats.object_graph import variable_key
from ckptconv.formats.tensor_bundle import FORMAT
from ckptconv.rawtree import RawTree, dict_of
from ckptconv.tensor import StoredTensor

PARSED_S, WRITTEN_S = 2.0, 3.0
"""Most seconds for 100,000 keys."""


def write(prefix: Path, keys: int) -> None:
    """A bundle of that many tensors of eight numbers."""
    tensor = StoredTensor.of_array(np.arange(8, dtype=np.float32))
    names = (("model", f"block_{number // 8:05}", f"dense_{number % 8}", "kernel") for number in range(keys))
    raw = RawTree(format="tensorflow", root=dict_of({variable_key(name): tensor for name in names}))
    engine.write(FORMAT.layout(raw, prefix), prefix)


def parsed(prefix: Path) -> tuple[float, RawTree]:
    started = time.process_time()
    raw = FORMAT.read(prefix)
    return time.process_time() - started, raw


def written(prefix: Path, raw: RawTree) -> tuple[float, bytes]:
    started = time.process_time()
    layout = FORMAT.layout(raw, prefix)
    checksums = {
        placement.key: placement.tensor.extents[0].checksum.value  # type: ignore[union-attr]
        for file in layout.files
        for placement in file.placements
    }
    data = b"".join(piece for _, piece in layout.files[-1].finish(checksums))
    return time.process_time() - started, data


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "many"
        write(prefix, arguments.keys)
        index = prefix.with_name("many.index").read_bytes()
        reading, writing = [], []
        for _ in range(arguments.repeat):
            seconds, raw = parsed(prefix)
            reading.append(seconds)
            seconds, data = written(prefix, raw)
            writing.append(seconds)
            if data != index:
                print("the index that is written differs from the one that was read")
                return 1
    limit = arguments.keys / 100_000
    print(f"{arguments.keys} keys, index of {len(index)} bytes, CPU seconds, median of {arguments.repeat}")
    print(f"parsed   {median(reading):.2f}  (at most {PARSED_S * limit:.2f})")
    print(f"written  {median(writing):.2f}  (at most {WRITTEN_S * limit:.2f})")
    return int(median(reading) > PARSED_S * limit or median(writing) > WRITTEN_S * limit)


if __name__ == "__main__":
    sys.exit(main())
