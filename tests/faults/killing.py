"""Makes one conversion again and again, each in a process of its own that is killed at a random moment.

    python -m tests.faults.killing SOURCE TARGET TO COUNT SEED

Imports once and forks, so that the moments fall into the conversion and not into Python's start. After each
death it says in JSON what stands under the target's name, and what stands there after the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import ckptconv
from ckptconv.errors import CkptError


def state(target: Path) -> dict[str, str]:
    """The target's files by their digests; hidden ones too."""
    found = sorted(path for path in target.parent.rglob("*") if path.is_file())
    return {
        str(path.relative_to(target.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found
    }


def convert(source: str, target: str, to: str, force: bool) -> None:
    ckptconv.convert(source, target, to=to or None, force=force, jobs=2)


def main() -> None:
    source, target, to, count, seed = sys.argv[1:]
    old = source + ".old"
    chance = random.Random(int(seed))
    started = time.perf_counter()
    convert(source, target, to, True)  # imports what there is to import, and takes the time
    took = time.perf_counter() - started
    for _ in range(2):
        started = time.perf_counter()
        convert(source, target, to, True)
        took = min(took, time.perf_counter() - started)
    new = state(Path(target))
    convert(old, target, to, True)
    before = state(Path(target))
    print(json.dumps({"new": new, "old": before}), flush=True)
    for _ in range(int(count)):
        child = os.fork()
        if child == 0:
            convert(source, target, to, True)
            os._exit(0)
        time.sleep(chance.uniform(0, 1.2 * took))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        after = state(Path(target))
        try:
            convert(source, target, to, False)
            refused = []
        except CkptError as error:
            refused = [problem.code for problem in error.problems]
        print(
            json.dumps(
                {
                    "killed": os.WIFSIGNALED(status),
                    "after": after,
                    "refused": refused,
                    "cleared": state(Path(target)),
                }
            ),
            flush=True,
        )
        convert(old, target, to, True)


if __name__ == "__main__":
    main()
