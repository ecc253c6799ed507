"""What the folders of PyTorch's trainers have in common: the model in its files, the note, the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckptconv.dialects.dcp_members import MODEL
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_modules import Module, bare_names, lift_module
from ckptconv.dialects.torch_note import with_note
from ckptconv.dialects.torch_values import layout_of, tensor_of
from ckptconv.document import Param
from ckptconv.errors import FormatError
from ckptconv.formats.torch_folder import DIRECTORY, sibling
from ckptconv.note import KEY
from ckptconv.rawtree import DictNode, Node, Opaque, Path, RawTree

WEIGHTS: tuple[str, ...] = (
    f"{MODEL}_0",
    f"{MODEL}.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""Files that hold the model, in the order in which the trainers look for them."""


def folder_of(raw: RawTree) -> DictNode:
    """The folder with its note as an entry, as a training dictionary has it.

    Raises: unknown-dialect for what is no folder.
    """
    if not isinstance(raw.root, DictNode) or raw.root.kind != DIRECTORY:
        raise FormatError.of("unknown-dialect", "this is no folder", "Leave the dialect out.", loc=())
    return with_note(raw.root, raw.note)


def raw_of(filled: Node, raw: RawTree) -> RawTree:
    """The tree to write: the folder without the entry, the note beside it. `raw` gives the attributes."""
    assert isinstance(filled, DictNode)
    note = filled.get(KEY)
    return RawTree(
        format=raw.format,
        root=with_note(filled, None),
        attributes=raw.attributes,
        note=note if isinstance(note, str) else None,
    )


def weights_of(root: DictNode, names: tuple[str, ...] = WEIGHTS) -> tuple[str, tuple[str, ...]] | None:
    """The file that stands for the model, and those in which its tensors are; None where there is none."""
    for name in names:
        node = root.get(name)
        if not isinstance(node, DictNode):
            continue
        if not name.endswith(".index.json"):
            return name, (name,)
        shards = node.get("weight_map")
        files = [value for _, value in shards.items] if isinstance(shards, DictNode) else []
        return name, tuple(sorted({sibling(name, file) for file in files if isinstance(file, str)}))
    return None


def lift_weights(
    root: DictNode,
    files: tuple[str, ...],
    lifter: Lifter,
    *,
    prefix: str = "",
    seen: dict[object, str] | None = None,
) -> Module:
    """The model in these files, its parameters in their order; the rest as for `lift_module`.

    Raises: duplicate-key.
    """
    items: list[tuple[Node, Node]] = []
    home: dict[str | int, str] = {}
    for file in files:
        node = root.get(file)
        for key, value in node.items if isinstance(node, DictNode) else ():
            items.append((key, value))
            if isinstance(key, (str, int)):
                home[key] = file
    merged, spread = DictNode(items=tuple(items)), _Spread(root, lifter, home)
    return lift_module(merged, (files[0],), spread, prefix=prefix, seen=seen)


def lift_copies(root: DictNode, model: str, params: Mapping[str, Param], lifter: Lifter) -> tuple[str, ...]:
    """Take what an export repeats of the model: tensors of the same names and specs are parameters too.

    `model`: the file that the model was taken from. A sentence about those of other specs, which stay.
    """
    others: list[str] = []
    exported = weights_of(root, tuple(name for name in WEIGHTS if not name.startswith(MODEL)))
    for file in exported[1] if exported is not None and model not in exported[1] else ():
        node = root.get(file)
        raws = [key for key in node.keys if isinstance(key, str)] if isinstance(node, DictNode) else []
        for raw, name in zip(raws, bare_names(raws), strict=True):
            found = tensor_of(node.get(raw)) if isinstance(node, DictNode) else None
            if found is None or name not in params:
                continue
            if found[0].spec == params[name].tensor.spec:
                lifter.take((file, raw, *found[1]), ("param", name), **layout_of(found[0]))
            else:
                others.append(f"'{raw}' of '{file}'")
    if not others:
        return ()
    return (
        f"{others[0]} and {len(others) - 1} more have other dtypes or shapes than the parameters of the "
        "same names: a copy for use without the run, kept as it stands and not written anew.",
    )


class _Spread(Lifter):
    """Takes what stands under one name in a merged dictionary from the file that has it."""

    def __init__(self, root: Node, lifter: Lifter, home: dict[str | int, str]) -> None:
        super().__init__(root)
        self._lifter, self._home = lifter, home

    def take(
        self, path: Path, to: Path, **encoding: str | int | float | bool | tuple[int, ...] | None
    ) -> None:
        self._lifter.take((self._home[path[1]], *path[1:]), to, **encoding)


def has_order(file: str) -> bool:
    """Whether a model's file has the parameters in the model's order: safetensors sorts them by name."""
    return ".bin" in file


def numbered(root: DictNode, stem: str, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Files `stem.suffix`, `stem_1.suffix`, ... in the order of their numbers."""
    found: dict[int, str] = {}
    for key in root.keys:
        for suffix in suffixes:
            told = re.fullmatch(re.escape(stem) + r"(?:_(\d{1,9}))?" + re.escape(suffix), str(key))
            if told is not None and isinstance(key, str):
                found.setdefault(int(told[1] or 0), key)
    return tuple(found[number] for number in sorted(found))


def not_read(raw: RawTree) -> tuple[str, ...]:
    """What to say of directories in the folder that are no part of it."""
    left = raw.attributes.get("not_read")
    if not isinstance(left, tuple) or not left:
        return ()
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return (f"The folder also holds {shown}: not read, and not written with it.",)


def scalars(node: Node) -> Iterator[tuple[str, Node]]:
    """The attributes of an object that a pickle only describes, or a dictionary's entries."""
    state = node.state if isinstance(node, Opaque) else node
    for key, value in state.items if isinstance(state, DictNode) else ():
        if isinstance(key, str):
            yield key, value


def argument(node: Node) -> str | None:
    """What an enum's member is called in a file: `SchedulerType("cosine")` is `cosine`."""
    if isinstance(node, Opaque) and len(node.args) == 1:
        node = node.args[0]
    return node if isinstance(node, str) else None
