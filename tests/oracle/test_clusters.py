"""Conversions handed to real clusters and process pools, with workers that are killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptconv
from ckptconv import finished, jobs
from ckptconv.errors import CkptError
from ckptconv.jobs import Job, JobResult

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
SHARDS = 8


def slowed(work: Callable[..., Any], task: Any) -> Any:
    """The work, in a time in which somebody can kill the worker."""
    time.sleep(0.3)
    return work(task)


class Slow(Executor):
    """Another executor, whose tasks take their time."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._inner.submit(slowed, fn, *args, **kwargs)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "weights.safetensors"
    generator = np.random.default_rng(0)
    save_file({f"layers.{i}.weight": generator.random((64, 96), np.float32) for i in range(SHARDS)}, path)
    return path


def convert(source: Path, target: Path, executor: Executor | None) -> None:
    ckptconv.convert(source, target, to="safetensors", shard_size=64 * 96 * 4, executor=executor)


def shards(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert len(found) == SHARDS + 1
    return found


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("expected") / "out.safetensors.index.json"
    convert(source, target, None)
    return shards(target.parent)


def staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.ckptconv-resumable.tmp")


@contextmanager
def killing(target: Path, victim: Callable[[], int | None]) -> Iterator[list[int]]:
    """Kill the victim, once, as soon as a file of the target is finished and others are not."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not killed:
            if any(staging(target).glob("done-*.json")) and (pid := victim()) is not None:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield killed
    finally:
        over.set()
        watching.join()


def child_called(name: str) -> int | None:
    """The process of that title, anywhere on the machine that is of this user."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith(name):
            return int(process.name)
    return None


def test_files_that_are_finished_when_a_worker_dies_are_not_written_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.safetensors.index.json"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pid = pool.submit(os.getpid).result()
        with killing(target, lambda: pid) as killed, pytest.raises(CkptError) as caught:
            convert(source, target, Slow(pool))
    assert killed
    assert [problem.code for problem in caught.value.problems] == ["worker-lost"]
    assert [path.name for path in tmp_path.iterdir()] == [staging(target).name]  # and no file of the target
    done = len(list(staging(target).glob("done-*.json")))
    assert 0 < done < SHARDS
    written: list[str] = []

    def run_job(job: Job, advance: Any = None) -> JobResult:
        written.append(job.path)
        return jobs.run_job(job, advance)

    monkeypatch.setattr(finished, "run_job", run_job)
    with ThreadPoolExecutor(1) as threads:
        convert(source, target, threads)
    assert len(set(written)) == len(written) == SHARDS - done
    assert shards(tmp_path) == expected
    assert not staging(target).exists()


@pytest.mark.parametrize("what", ["damaged", "another source"])
def test_a_finished_file_that_is_not_what_is_asked_for_is_written_again(
    what: str, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out.safetensors.index.json"
    first = source
    if what == "another source":
        first = source.with_name("other.safetensors")
        save_file({f"layers.{i}.weight": np.zeros((64, 96), np.float32) for i in range(SHARDS)}, first)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pid = pool.submit(os.getpid).result()
        with killing(target, lambda: pid), pytest.raises(CkptError):
            convert(first, target, Slow(pool))
    if what == "damaged":
        for path in staging(target).glob("*.safetensors"):
            data = bytearray(path.read_bytes())
            if data:
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        convert(source, target, pool)
    assert shards(tmp_path) == expected


@pytest.fixture(scope="module")
def dask() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster


@pytest.mark.filterwarnings("ignore")
def test_dask_goes_on_when_a_worker_is_killed(
    source: Path, expected: dict[str, bytes], tmp_path: Path, dask: Any
) -> None:
    from distributed import Client

    target = tmp_path / "out.safetensors.index.json"
    with Client(dask) as client:
        pids = client.run(os.getpid)
        with killing(target, lambda: next(iter(pids.values()))) as killed:
            convert(source, target, Slow(client.get_executor(pure=False)))
    assert killed
    assert shards(tmp_path) == expected


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_reaches_a_dask_cluster(
    source: Path, expected: dict[str, bytes], tmp_path: Path, dask: Any
) -> None:
    target = tmp_path / "out.safetensors.index.json"
    command = [
        sys.executable, "-m", "ckptconv", "convert", str(source), str(target),
        "--shard-size", str(64 * 96 * 4), "--executor", f"dask:{dask.scheduler_address}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path) == expected


@pytest.mark.filterwarnings("ignore")
def test_ray_goes_on_when_a_worker_is_killed(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    from ckptconv.executors import executor_at

    target = tmp_path / "out.safetensors.index.json"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    try:
        with (
            executor_at("ray:auto") as executor,
            killing(target, lambda: child_called("ray::slowed")) as killed,
        ):
            convert(source, target, Slow(executor))
    finally:
        ray.shutdown()
    assert killed
    assert shards(tmp_path) == expected


@pytest.mark.parametrize("text", ["dask", "dsk:tcp://127.0.0.1:1", "dask:", "dask:tcp://127.0.0.1:1"])
def test_a_cluster_that_is_none(text: str) -> None:
    pytest.importorskip("distributed")
    from ckptconv.executors import executor_at

    with pytest.raises(CkptError) as caught, executor_at(text):
        pass
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("--executor", text))]
