"""A real S3 server on loopback: what is read over the wire, and multipart uploads that appear whole."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("moto", reason="needs moto for an S3 server")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs to reach it")

import ckptconv  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from tests.support.command import FIXTURES, ROOT, run  # noqa: E402

RUN = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
FRESH = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The server's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the server did not start"
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, reached as a user's environment says."""
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir("runs")
    yield fs
    fs.rm("runs", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_run_crosses_by_the_command_line(bucket: Any, tmp_path: Path) -> None:
    bucket.put_file(str(RUN), "runs/in/run.pt")
    done = run("convert", "s3://runs/in/run.pt", "s3://runs/out/ckpt-1", "--template", FRESH)
    assert done.returncode == 0, done.stderr
    bucket.invalidate_cache()
    assert sorted(bucket.ls("runs/out", detail=False)) == [
        "runs/out/checkpoint",
        "runs/out/ckpt-1.data-00000-of-00001",
        "runs/out/ckpt-1.index",
    ]
    ckptconv.convert(RUN, tmp_path / "ckpt-1", template=FRESH)
    for name in ("ckpt-1.index", "ckpt-1.data-00000-of-00001"):
        assert bucket.cat(f"runs/out/{name}") == (tmp_path / name).read_bytes()
    shown = run("inspect", "s3://runs/out/ckpt-1", "--json")
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
def test_a_large_target_goes_up_in_parts(bucket: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"layer{n}.weight": rng.random((1 << 21,), np.float32) for n in range(13)}
    from safetensors.numpy import save_file

    save_file(arrays, tmp_path / "w.safetensors")
    ckptconv.convert(tmp_path / "w.safetensors", "s3://runs/w.neutral", to="neutral")
    bucket.invalidate_cache()
    assert "-" in bucket.info("runs/w.neutral/weights.safetensors")["ETag"]  # the mark of a multipart upload
    there = ckptconv.open("s3://runs/w.neutral")
    for name, array in arrays.items():
        assert np.array_equal(there.params[name].tensor.read(), array)
    ckptconv.convert("s3://runs/w.neutral", tmp_path / "again.safetensors")
    assert ckptconv.open(tmp_path / "again.safetensors").params.keys() == arrays.keys()


def test_credentials_that_see_nothing_are_said(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CkptError) as caught:
        ckptconv.open("s3://runs/in/run.pt")
    assert caught.value.problems[0].code == "missing-file"
