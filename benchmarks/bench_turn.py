"""How fast a matrix is turned in memory, beside a copy of the same bytes: one thread, float32.

python benchmarks/bench_turn.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from ckptconv import strided

SHAPES = ((4096, 4096), (1024, 16384), (16384, 1024), (4099, 4093), (1000, 16777), (5592, 3000))
"""Rows a power of two apart, which fall into the same sets of the cache, and others."""


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=9, help="runs of each, in turn; medians count")
    arguments = parser.parse_args()
    print("| matrix | turned, GB/s | of a copy | numpy's own, of a copy |\n|---|---|---|---|")
    for rows, columns in SHAPES:
        matrix = np.random.default_rng(0).random((rows, columns), np.float32)
        turned, copied = np.zeros((columns, rows), np.float32), np.zeros_like(matrix)
        ways: tuple[Callable[[], None], ...] = (
            lambda out=copied, matrix=matrix: np.copyto(out, matrix),
            lambda out=turned, matrix=matrix: strided.copy(out, matrix.T),
            lambda out=turned, matrix=matrix: np.copyto(out, matrix.T),
        )
        turns = [[seconds(way) for way in ways] for _ in range(arguments.repeat)]
        ours = statistics.median(copy / turn for copy, turn, _ in turns)
        plain = statistics.median(copy / turn for copy, _, turn in turns)
        speed = matrix.nbytes / statistics.median(turn for _, turn, _ in turns) / 1e9
        print(f"| {rows} x {columns} | {speed:.2f} | {ours:.2f} | {plain:.2f} |")


if __name__ == "__main__":
    main()
