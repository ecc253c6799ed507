"""safetensors: one file, or shards with an index.

One file: see `safetensors_header`. Shards: `<stem>-00001-of-00002.safetensors`, each a whole file, and
`<stem>.safetensors.index.json`, `{"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}`; a
directory with exactly one index is read too. File names in an index are plain names; every mapped tensor is
in its file, every tensor of a file is mapped (`total_size` is informative; writers differ on tied weights).

Tied weights: a tensor is stored once, and `__metadata__` has `{dropped name: kept name}`, as `save_model` of
the safetensors library writes it; reading gives both names the same tensor. The embedded note is
`__metadata__["ckptconv"]` (of the first shard). `{"format": "pt"}` is always written: readers ask for it.

Tree: `DictNode` name -> tensor in the header's order, aliases last; attributes: the other `__metadata__`
entries. Writing takes `shard_nbytes` among the attributes. What has no tag (complex128, strings, 4-bit
integers, quantized types) is `unknown-dtype`.
Producers: safetensors 0.3 to 0.8, transformers, accelerate, diffusers. Source: huggingface/safetensors 0.8.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ckptconv.errors import FormatError, Problem, TargetError
from ckptconv.formats.base import ChecksumKind, Layout, TargetFile, register
from ckptconv.formats.safetensors_file import (
    NOTE,
    SUFFIX,
    Contents,
    Tensors,
    check_tensors,
    constant,
    dedupe,
    format_error,
    read_file,
    shard_limit,
    shard_names,
    split,
    target_file,
)
from ckptconv.formats.safetensors_header import METADATA, looks_like_header
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.strictjson import dump, parse

INDEX_SUFFIX = ".safetensors.index.json"


def _index_of(path: Path) -> Path | None:
    """The index a path stands for: itself, the only one of a directory, the one beside a missing file."""
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        return found[0] if len(found) == 1 else None
    if path.name.endswith(INDEX_SUFFIX):
        return path
    beside = path.with_name(path.name + ".index.json")
    return beside if path.suffix == SUFFIX and not path.exists() and beside.is_file() else None


def _read_index(path: Path) -> RawTree:
    name = path.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise format_error(
            "missing-file", f"'{name}' cannot be read: {error.strerror}", "Check it.", name
        ) from None
    obj = parse(data, name)
    weight_map = obj.get("weight_map") if isinstance(obj, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise format_error(
            "corrupt-file", f"no 'weight_map' of names to files [{name}]", "Copy it again.", name
        )
    files = dict.fromkeys(weight_map.values())
    unsafe = [file for file in files if not is_plain_name(file)]
    if unsafe:
        raise FormatError(
            *(
                Problem(
                    code="unsafe-path",
                    loc=("weight_map", file),
                    message=f"'{file}' is no plain file name [{name}]",
                    hint="Names must stay in the directory: ask who wrote this file.",
                )
                for file in unsafe
            )
        )
    shards = {file: read_file(path.parent / file) for file in files}
    problems = list(_disagreements(weight_map, shards, name))
    if problems:
        raise FormatError(*problems)
    root: Tensors = {key: shards[file].tensors[key] for key, file in weight_map.items()}
    metadata: dict[str, str] = {}
    notes = {shard.note for shard in shards.values()} - {None}
    for shard in shards.values():
        for key, tensor in shard.tensors.items():
            root.setdefault(key, tensor)
        metadata.update(shard.metadata)
    if len(notes) > 1:
        raise format_error(
            "corrupt-file", f"the shards carry {len(notes)} notes [{name}]", "Copy the shards again.", name
        )
    return RawTree(
        format="safetensors",
        root=DictNode(items=tuple(root.items())),
        attributes=metadata,
        note=next(iter(notes), None),
        location=name,
    )


def _disagreements(
    weight_map: Mapping[str, str], shards: Mapping[str, Contents], name: str
) -> Iterator[Problem]:
    hint = "Index and shards do not belong together: copy all of them again."
    for key, file in weight_map.items():
        if key not in shards[file].tensors:
            message = f"'{key}' is not in '{file}', where the index has it [{name}]"
            yield Problem(code="corrupt-file", loc=("weight_map", key), message=message, hint=hint)
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for key in shard.tensors:
            if key in seen:
                message = f"'{key}' is in '{seen[key]}' and in '{file}' [{name}]"
                yield Problem(code="duplicate-key", loc=(file, key), message=message, hint=hint)
            elif key in shard.stored and key not in weight_map:
                message = f"'{key}' of '{file}' is not in the index [{name}]"
                yield Problem(code="corrupt-file", loc=(file, key), message=message, hint=hint)
            seen[key] = file


def is_plain_name(name: str) -> bool:
    """Whether a name from inside a file names a file of the same directory and nothing else."""
    return name not in ("", ".", "..") and not any(c in "/\\:" or ord(c) < 32 for c in name)


def _metadata(raw: RawTree) -> dict[str, str]:
    """The `__metadata__` of a target: the tree's own entries, format and note."""
    metadata = {"format": "pt"}
    problems: list[Problem] = []
    for key, value in raw.attributes.items():
        if key == "shard_nbytes":
            continue
        if isinstance(value, str):
            metadata[key] = value
        else:
            message = f"metadata '{key}' is {type(value).__name__}, safetensors holds text only"
            hint = "Leave it out or write it as text."
            problems.append(
                Problem(code="unsupported-feature", loc=(METADATA, key), message=message, hint=hint)
            )
    if problems:
        raise FormatError(*problems)
    if raw.note is not None:
        metadata[NOTE] = raw.note
    return metadata


class Safetensors:
    """The format object."""

    name = "safetensors"
    summary = "named tensors: one .safetensors file, or shards with an index"
    checksums: tuple[ChecksumKind, ...] = ()
    shards = True

    def sniff(self, path: Path) -> bool:
        """Whether it is a safetensors file, an index, a directory with one, or the name beside one."""
        if path.is_dir() and (path / "sharded").is_dir():
            return False  # torch.distributed.checkpoint's: the shards below hold what consolidating spoils
        index = _index_of(path)
        if index is not None or not path.is_file():
            return index is not None and index.is_file()
        try:
            with path.open("rb") as file:
                head = file.read(64)
        except OSError:
            return False
        return path.suffix == SUFFIX or looks_like_header(head, path.stat().st_size)

    def read(self, path: Path) -> RawTree:
        """The tensors of a file, or of all shards of an index.

        I/O: reads headers and the index.
        Raises: missing-file, truncated-file, truncated-tensor, corrupt-file, duplicate-key, limit-exceeded,
        unknown-dtype, unsafe-path.
        """
        index = _index_of(path)
        if index is not None:
            return _read_index(index)
        if path.is_dir():
            hint = f"Name the file: a directory is read when it has exactly one *{INDEX_SUFFIX}."
            raise format_error("unknown-format", f"no single index in '{path.name}'", hint, path.name)
        contents = read_file(path)
        return RawTree(
            format=self.name,
            root=DictNode(items=tuple(contents.tensors.items())),
            attributes=contents.metadata,
            note=contents.note,
            location=path.name,
        )

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """One file; shards and an index where there is a `shard_nbytes` or the path names an index.

        Raises: unknown-dtype, unsupported-feature, duplicate-key, limit-exceeded, usage.
        """
        hint = "Write to neutral, which holds everything, or leave it out with --exclude."
        tensors, aliases = dedupe(check_tensors(raw.root, hint))
        metadata, limit = _metadata(raw), shard_limit(raw)
        taken = sorted(set(metadata) & set(aliases))
        if taken:
            raise format_error(
                "duplicate-key", f"'{taken[0]}' is a tied tensor and a metadata key", hint, taken[0]
            )
        if limit is None and not path.name.endswith(INDEX_SUFFIX):
            file = target_file("", path.name, tensors, {**metadata, **aliases})
            return Layout(kind="file", files=(file,))
        return _sharded(tensors, aliases, metadata, limit, path)


def _sharded(
    tensors: Tensors, aliases: Mapping[str, str], metadata: Mapping[str, str], limit: int | None, path: Path
) -> Layout:
    """Shards and their index: beside a path with a suffix, inside a directory otherwise."""
    if path.is_file() and path.suffix == SUFFIX:
        # Readers would take the old single file for the new shards.
        raise TargetError.of(
            "target-exists",
            f"'{path.name}' exists and would hide the shards beside it",
            "Delete it, or choose another target.",
            loc=(path.name,),
        )
    suffix = next((s for s in (INDEX_SUFFIX, SUFFIX) if path.name.endswith(s)), "")
    stem = path.name.removesuffix(suffix) if suffix else "model"
    shards = split(tensors, limit)
    names = shard_names(stem, len(shards))
    files = []
    for position, (name, shard) in enumerate(zip(names, shards, strict=True)):
        own = {dropped: kept for dropped, kept in aliases.items() if kept in shard}
        # The note stands once, in the first shard.
        common = {key: text for key, text in metadata.items() if key != NOTE or position == 0}
        files.append(target_file(name, name, shard, {**common, **own}))
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(tensor.spec.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = (dump(index, indent=2) + "\n").encode("utf-8")
    files.append(TargetFile(name=f"{stem}{INDEX_SUFFIX}", finish=constant([(0, text)])))
    return Layout(kind="prefix" if suffix else "directory", files=tuple(files))


FORMAT = register(Safetensors())
