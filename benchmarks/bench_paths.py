"""What each path through ckptconv costs, beside a plain copy of the same bytes and beside what people write.

    python benchmarks/bench_paths.py                                # 64 MiB and 1 GiB, all paths
    python benchmarks/bench_paths.py --sizes 4GiB --repeat 3 "torch to safetensors"
    python benchmarks/bench_paths.py --json results.json --chart chart.svg

Every figure of a path is measured in turn with its references, each in a process of its own, as often as
`--repeat` says; medians count. See README.md in this directory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
COUNTERS = ("--set", "epochs=3", "--set", "epoch_convention=count")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way through ckptconv, and the ways around it that `peers.py` knows."""

    name: str
    source: str
    target: str
    arguments: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


WAYS = (
    Way(
        name="torch to safetensors",
        source="weights.pt",
        target="weights.safetensors",
        peers=("torch.load, save_file", "torch.load(mmap), save_file", "safetensors' convert"),
    ),
    Way(name="torch to neutral", source="run.pt", target="neutral", arguments=("--to", "neutral")),
    Way(
        name="torch to bundle",
        source="run.pt",
        target="keras",
        arguments=("--template", "template"),
        peers=("torch.load, tf.train.Checkpoint.write",),
    ),
    Way(
        name="bundle to torch",
        source="trained",
        target="back.pt",
        arguments=("--template", "run.pt", *COUNTERS),
        peers=("tf.train.load_checkpoint, torch.save",),
    ),
    Way(
        name="DCP to torch",
        source="folder",
        target="whole.pt",
        arguments=("--to", "pytorch:plain"),
        peers=("dcp_to_torch_save",),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one process needed."""

    seconds: float
    """From its start to its end."""
    working: float
    """After the imports."""
    peak_rss: int
    peak_anonymous: int
    """Sampled."""
    read: int
    written: int
    """Bytes that went through system calls, as the kernel counts them."""


def measure(here: Path, *command: str) -> Figures:
    """Run one command in a child that reports on itself."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, str(HERE / "peers.py"), *command],
        cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    anonymous = 0
    while child.poll() is None:
        anonymous = max(anonymous, anonymous_nbytes(child.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    output, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {child.returncode}\n{errors}")
    return Figures(seconds=seconds, peak_anonymous=anonymous, **json.loads(output.splitlines()[-1]))


def anonymous_nbytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def make_sources(here: Path, nbytes: int, layers: int) -> None:
    """Everything that is read: about `nbytes` each, of the same shapes."""
    import synthetic  # not in the children, whose imports are measured

    def of(parts: int) -> tuple[synthetic.Dense, ...]:
        side = math.isqrt(nbytes // (4 * parts * layers))
        return synthetic.dense_layers(layers, max(side * 4 // 3, 2), max(side * 3 // 4, 3))

    synthetic.write(synthetic.torch_run(of(1), optimizer=False), here / "weights.pt")
    synthetic.write(synthetic.torch_run(of(3)), here / "run.pt")
    synthetic.write(synthetic.keras_template(of(3)), here / "template")
    measure(here, "ckptconv", "convert", "run.pt", "trained", "--template", "template")
    measure(here, "ckptconv", "convert", "run.pt", "folder", "--to", "dcp")
    os.sync()


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint; a bundle has several, beside its name."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}.*"))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        for file in files_of(path):
            file.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The medians of one way of doing it, and how they stand to the copy measured in the same turns."""

    way: str
    done_by: str
    nbytes: int
    figures: Figures
    to_copy: float
    """Seconds after start-up, in those of the copy."""


def rows_of(way: Way, here: Path, repeat: int) -> Iterator[Row]:
    convert = ("ckptconv", "convert", way.source, way.target, "--force", *way.arguments)
    files = [str(file.relative_to(here)) for file in files_of(here / way.source)]
    commands = {
        "copy and fsync": ("copy", *files),
        "ckptconv --no-verify": (*convert, "--no-verify"),
        "ckptconv": convert,
        **{peer: ("peer", peer, way.source, way.target) for peer in way.peers},
    }
    found: dict[str, list[Figures]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            found[name].append(measure(here, *command))
            remove(here / way.target)
            os.sync()
    copying = [figures.working for figures in found["copy and fsync"]]
    for name, results in found.items():
        ratios = [figures.working / copied for figures, copied in zip(results, copying, strict=True)]
        yield Row(
            way=way.name,
            done_by=name,
            nbytes=sum((here / file).stat().st_size for file in files),
            figures=Figures(
                **{
                    key: statistics.median(getattr(figures, key) for figures in results)
                    for key in Figures.__dataclass_fields__
                }
            ),
            to_copy=statistics.median(ratios),
        )


HEAD = ("path", "done by", "s", "after start", "of a copy", "peak RSS", "anonymous", "read", "written")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown; bytes in MiB."""
    yield "| " + " | ".join(HEAD) + " |"
    yield "|" + "---|" * len(HEAD)
    for row in rows:
        f = row.figures
        sizes = (f"{n / MIB:,.0f}" for n in (f.peak_rss, f.peak_anonymous, f.read, f.written))
        size = f"{row.way}, {row.nbytes / MIB:,.0f} MiB"
        numbers = (f"{f.seconds:.2f}", f"{f.working:.2f}", f"{row.to_copy:.2f}", *sizes)
        yield f"| {size} | {row.done_by} | " + " | ".join(numbers) + " |"


def chart(rows: Sequence[Row], path: Path) -> None:
    """Seconds and memory against size, a pair of pictures for each path."""
    from matplotlib import pyplot

    ways = list(dict.fromkeys(row.way for row in rows))
    figure, axes = pyplot.subplots(2, len(ways), figsize=(4 * len(ways), 7), squeeze=False, sharex=True)
    for column, way in enumerate(ways):
        of_way = [row for row in rows if row.way == way]
        for name in dict.fromkeys(row.done_by for row in of_way):
            line = sorted((row.nbytes / MIB, row) for row in of_way if row.done_by == name)
            sizes = [size for size, _ in line]
            axes[0][column].plot(sizes, [row.figures.seconds for _, row in line], marker="o", label=name)
            peaks = [row.figures.peak_rss / MIB for _, row in line]
            axes[1][column].plot(sizes, peaks, marker="o", label=name)
        axes[0][column].set(title=way, xscale="log", yscale="log")
        axes[1][column].set(xlabel="MiB of the source", xscale="log", yscale="log")
        axes[0][column].legend(fontsize="x-small")
    axes[0][0].set_ylabel("seconds, whole process")
    axes[1][0].set_ylabel("peak RSS, MiB")
    figure.tight_layout()
    figure.savefig(path)


def nbytes_of(text: str) -> int:
    """`64MiB`, `1GiB`."""
    for unit, power in (("MiB", 20), ("GiB", 30)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * (1 << power))
    raise argparse.ArgumentTypeError(f"'{text}' is no size such as 64MiB or 4GiB")


def main() -> None:
    names = [way.name for way in WAYS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=nbytes_of, nargs="+", default=[64 * MIB, 1024 * MIB])
    parser.add_argument("--layers", type=int, default=24, help="dense layers; with AdamW eight tensors each")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="needs neither torch nor tensorflow")
    parser.add_argument("--directory", help="where everything is written; needs seven times the size")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--chart", type=Path, help="draw seconds and memory against size there (matplotlib)")
    parser.add_argument("ways", nargs="*", metavar="PATH", help=f"all by default: {', '.join(names)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.ways) - set(names):
        parser.error(f"no such path: {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    for nbytes in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="ckptconv-bench-") as where:
            make_sources(Path(where), nbytes, arguments.layers)
            for way in WAYS:
                if not arguments.ways or way.name in arguments.ways:
                    asked = Way(**{**asdict(way), "peers": ()}) if arguments.no_peers else way
                    rows += rows_of(asked, Path(where), arguments.repeat)
    print(*table(rows), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if arguments.chart:
        chart(rows, arguments.chart)


if __name__ == "__main__":
    main()
