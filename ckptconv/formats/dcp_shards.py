"""What the HuggingFace writer of torch.distributed.checkpoint leaves: safetensors shards without a
`.metadata`.

Byte layout: `shard-<rank>-model-<i>-of-<n>.safetensors`, each a safetensors file with a rank's chunks under
the names of their tensors; `__metadata__["DCP_SHARDING_INFO"]` is JSON, `{name: {"saved_offsets": [..]}}`.
With consolidation they stand in `sharded/`, and beside it the whole tensors with their index. The shards are
read there too: torch 2.13 consolidates every tensor of rank 0 to zeros, and cannot consolidate integers.

No shard tells a tensor's size: it is where the last chunk ends, and a missing last shard is seen only where
the consolidated file tells otherwise. Refused: holes and overlaps, tensors without an offset, shards that
disagree with the consolidated file.

Source: torch 2.13 `torch/distributed/checkpoint/hf_storage.py`, `_hf_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptconv.dtypes import DType
from ckptconv.errors import CkptError, Code, FormatError, Problem
from ckptconv.formats.bundle_slices import Box, assemble
from ckptconv.formats.pickle_checks import INT64
from ckptconv.formats.safetensors import FORMAT as SAFETENSORS
from ckptconv.formats.safetensors import INDEX_SUFFIX
from ckptconv.formats.safetensors_file import read_file
from ckptconv.rawtree import DictNode
from ckptconv.strictjson import parse
from ckptconv.tensor import Index, TensorRef

_PATTERN = "shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"
_BELOW = "sharded"
_INFO = "DCP_SHARDING_INFO"
UNSEEN = "unseen_shards"
"""Attribute: whether a missing last shard would not be seen."""


def shards_of(path: Path) -> list[Path]:
    """The shards in a directory, or in the one below it where consolidation leaves them."""
    if not path.is_dir():
        return []
    return sorted(path.glob(_PATTERN)) or sorted((path / _BELOW).glob(_PATTERN))


def read_shards(path: Path) -> tuple[DictNode, dict[str, bool | int]]:
    """The tensors by name, and the attributes of the tree.

    I/O: reads the headers of all shards, and of the consolidated files where they stand beside.
    Raises: corrupt-file, unsupported-feature, missing-file, and what reading a safetensors file raises.
    """
    files = shards_of(path)
    boxes: dict[str, list[Box]] = {}
    for file in files:
        contents = read_file(file)
        offsets = _offsets(contents.metadata.get(_INFO), file.name)
        for name, tensor in contents.tensors.items():
            start = offsets.get(name)
            if start is None or len(start) != len(tensor.shape):
                message = f"'{name}' has shape {list(tensor.shape)} and the offset {start}"
                raise _problem("corrupt-file", file.name, name, message)
            stop = tuple([low + size for low, size in zip(start, tensor.shape, strict=True)])
            boxes.setdefault(name, []).append(Box(start, stop, tensor))
    tensors: dict[str, TensorRef] = {}
    problems: list[Problem] = []
    for name, parts in boxes.items():
        try:
            tensors[name] = _whole(parts, name, path.name)
        except CkptError as error:
            problems += error.problems
    if problems:
        raise FormatError(*problems)
    beside = files[0].parent.parent
    consolidated = files[0].parent.name == _BELOW and any(beside.glob(f"*{INDEX_SUFFIX}"))
    if consolidated:
        _compare(tensors, beside)
    return DictNode(items=tuple(tensors.items())), {"files": len(files), UNSEEN: not consolidated}


def _offsets(text: str | None, file: str) -> dict[str, Index]:
    """Name -> where its chunk begins."""
    info = parse((text or "null").encode(), file)
    offsets: dict[str, Index] = {}
    for name, entry in info.items() if isinstance(info, dict) else ():
        saved = entry.get("saved_offsets") if isinstance(entry, dict) else None
        counts = [n for n in saved if type(n) is int and 0 <= n < INT64] if isinstance(saved, list) else []
        if not isinstance(saved, list) or len(counts) != len(saved):
            raise _problem("corrupt-file", file, name, f"the offset of '{name}' is {saved!r:.60}")
        offsets[name] = tuple(counts)
    return offsets


def _whole(boxes: list[Box], name: str, folder: str) -> TensorRef:
    first = boxes[0].tensor
    dtypes: set[DType] = {box.tensor.dtype for box in boxes}
    ranks = {len(box.start) for box in boxes}
    if len(dtypes) > 1 or len(ranks) > 1:
        kinds = sorted(row.name for row in dtypes)
        raise _problem("corrupt-file", folder, name, f"the shards of '{name}' differ: {kinds}, axes {ranks}")
    shape = tuple([max(box.stop[axis] for box in boxes) for axis in range(len(first.shape))])
    return assemble(boxes, shape, (name,))


def _compare(tensors: Mapping[str, TensorRef], path: Path) -> None:
    """Raises: corrupt-file where the consolidated files tell of other tensors."""
    root = SAFETENSORS.read(path).root
    assert isinstance(root, DictNode)
    whole = {name: tensor.spec for name, tensor in root.items if isinstance(tensor, TensorRef)}
    for name in sorted({*tensors, *(name for name in whole if isinstance(name, str))}):
        ours = tensors[name].spec if name in tensors else None
        if whole.get(name) != ours:
            message = f"the shards of '{name}' make {ours}, the consolidated file has {whole.get(name)}"
            raise _problem("corrupt-file", path.name, name, message)


def _problem(code: Code, file: str, name: str, message: str) -> FormatError:
    error = FormatError.of(code, f"{message} [{file}]", "Copy all shards again.", loc=(file, name))
    assert isinstance(error, FormatError)
    return error
