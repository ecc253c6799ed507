"""The state file `checkpoint` beside TensorFlow checkpoints: which prefix is the newest, which ones are kept.

Layout: a CheckpointState in protobuf's text format: `model_checkpoint_path`, `all_model_checkpoint_paths`
(oldest first) and, from a CheckpointManager, one timestamp for each and `last_preserved_timestamp`. Paths are
relative to the file's directory (TensorFlow 2), or absolute (TensorFlow 1's Saver), in which case they are
stale as soon as the directory is moved or copied.

Read: a path that is not in the directory stands for its last component there; nothing outside is looked at.
Written: as `Checkpoint.save` and `Saver.save` do, with a relative path; what is listed stays listed.

Source: tensorflow v2.21 `python/checkpoint/checkpoint_management.py`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from google.protobuf import text_format

from ckptconv.errors import FormatError, TargetError
from ckptconv.formats import protos

STATE_FILE = "checkpoint"
_MAX_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """The file's content."""

    newest: str
    paths: tuple[str, ...] = ()
    """All that are kept, oldest first."""
    timestamps: tuple[float, ...] = ()
    """Seconds since the epoch, UTC, by path; none unless a CheckpointManager keeps them."""
    last_preserved_timestamp: float = 0.0

    @classmethod
    def parse(cls, text: str, name: str = STATE_FILE) -> CheckpointState:
        """The state from the file's text.

        Raises: corrupt-file.
        """
        message = protos.new(protos.CheckpointState)
        try:
            text_format.Parse(text, message)
        except (text_format.ParseError, RecursionError) as error:
            raise FormatError.of(
                "corrupt-file",
                f"the state file is no CheckpointState: {error}",
                "Delete it and name the prefix (the path without '.index') instead.",
                loc=(name,),
            ) from error
        return cls(
            newest=message.model_checkpoint_path,
            paths=tuple(message.all_model_checkpoint_paths),
            timestamps=tuple(message.all_model_checkpoint_timestamps),
            last_preserved_timestamp=message.last_preserved_timestamp,
        )

    def text(self) -> str:
        """The file's text, as TensorFlow writes it."""
        message = protos.new(protos.CheckpointState)
        message.model_checkpoint_path = self.newest
        for path in self.paths:
            message.all_model_checkpoint_paths.append(path)
        for timestamp in self.timestamps:
            message.all_model_checkpoint_timestamps.append(timestamp)
        message.last_preserved_timestamp = self.last_preserved_timestamp
        return text_format.MessageToString(message)

    def with_newest(self, path: str, timestamp: float) -> CheckpointState:
        """The state after another save; an older entry of the same checkpoint makes way."""
        timed = len(self.timestamps) == len(self.paths) and bool(self.paths)
        kept = [i for i, known in enumerate(self.paths) if base_name(known) != base_name(path)]
        return replace(
            self,
            newest=path,
            paths=(*(self.paths[i] for i in kept), path),
            timestamps=(*(self.timestamps[i] for i in kept), timestamp) if timed else (),
        )


def base_name(path: str) -> str:
    """Last component of a path of any system."""
    return PurePosixPath(PureWindowsPath(path).as_posix()).name


def read_state(directory: Path) -> CheckpointState | None:
    """The directory's state, if it has a state file.

    Raises: corrupt-file, limit-exceeded.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_NBYTES:
        raise FormatError.of(
            "limit-exceeded",
            f"the state file has {path.stat().st_size} bytes, at most {_MAX_NBYTES} are read",
            "Name the prefix instead of the directory.",
            loc=(STATE_FILE,),
        )
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError.of(
            "corrupt-file",
            f"the state file is no text: {error}",
            "Delete it and name the prefix (the path without '.index') instead.",
            loc=(STATE_FILE,),
        ) from error
    return CheckpointState.parse(text)


def record(directory: Path, name: str, scratch: Path) -> None:
    """Make a checkpoint the newest of its directory's state file, which is replaced as a whole.

    `scratch` is a directory of the same file system.
    Raises: target-unwritable, corrupt-file.
    """
    state = read_state(directory) or CheckpointState(newest="")
    text = state.with_newest(name, time.time()).text()
    temporary = scratch / f"{STATE_FILE}.new"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / STATE_FILE)
    except OSError as error:
        raise TargetError.of(
            "target-unwritable",
            f"the checkpoint is written, its directory's state file is not: {error}",
            "Make the directory writable, or name the prefix itself when restoring.",
            loc=(STATE_FILE,),
        ) from error
