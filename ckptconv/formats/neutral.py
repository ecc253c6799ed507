"""The neutral checkpoint: a directory of a manifest, safetensors files and one file of other state.

    manifest.json                         the document (schema `checkpoint-1.0.0`), written last: the commit
    weights[-00001-of-00002].safetensors  parameters, under their names
    optimizer[-...].safetensors           slots, `<param>/<slot>`; with several `<optimizer>/<param>/<slot>`
    extras[-...].safetensors              other arrays, under the source's keys
    state.msgpack                         the residue, see `ckptconv.packing`

The manifest's `files` lists every other file with its size and its digest (null: none is known). Files that
it does not list are refused (names that begin with a dot are not looked at); so are files of another size.

Digests: `sha256:` of state.msgpack, which is read whole. A tensor file has `crc32c:` and beside it
`tensor_crc32c`, the checksum of each of its tensors in the order of their bytes. They form a chain that needs
no second pass over the tensors. Writing, each tensor's checksum is a by-product of its copy, and that of the
file follows from them and the header by arithmetic (`crc.crc32c_joined`). Reading, the header that is there
and the recorded checksums must give the file's digest before anything is believed; from then on each tensor
carries its checksum and is checked in the pass that reads it, as in a TensorFlow bundle. Per tensor, since
extents are what the engine checks and what tells shared memory: one extent per file would tie all tensors.
In the manifest, since a copy in a tensor file's own metadata would outlive an edit of its tensors: whoever
edits a tensor file sets `digest` to null and drops `tensor_crc32c`. 100,000 tensors take 800 kB and 0.1 s.

What safetensors has no type for is stored as U8, see `ckptconv.bitcast`; which tensors those are says the
manifest, so this level shows them as U8.

Tree: `{"manifest": JSON text with empty `files`, "state": bytes or None, "weights", "optimizer", "extras":
name -> tensor}`. Writing takes `shard_nbytes` among the attributes.
Producer: ckptconv 0.1.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ckptconv.errors import CkptError, Code, FormatError, Problem
from ckptconv.formats import crc
from ckptconv.formats.base import ChecksumKind, Layout, TargetFile, register
from ckptconv.formats.safetensors_file import (
    Tensors,
    check_tensors,
    constant,
    dedupe,
    file_nbytes,
    read_file,
    shard_limit,
    shard_names,
    split,
    target_file,
)
from ckptconv.rawtree import DictNode, Node, RawTree
from ckptconv.residue_json import STATE_FILE
from ckptconv.strictjson import Json, dump_document, parse
from ckptconv.validation import migrate, validate_manifest

MANIFEST = "manifest.json"
SECTIONS = ("weights", "optimizer", "extras")
_FILE_NAME = re.compile(r"(weights|optimizer|extras)(-\d{5}-of-\d{5})?\.safetensors|state\.msgpack")
_CHECKSUMS = re.compile(r"(?:[0-9a-f]{8})*")
_PIECE_NBYTES = 1 << 20
_MARK = b'"ckptconv/checkpoint"'
_HINT = "Copy the whole directory again, or write the checkpoint again from its source."


def _problem(code: Code, loc: tuple[str | int, ...], message: str, hint: str = _HINT) -> Problem:
    return Problem(code=code, loc=loc, message=message, hint=hint)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"'{path.name}' cannot be read: {error.strerror}"
        raise FormatError(_problem("missing-file", (path.name,), message)) from None


def _read_manifest(path: Path) -> dict[str, Json]:
    """The manifest in the current version, so far as its list of files goes.

    Raises: missing-file, corrupt-file, duplicate-key, schema-version, schema-invalid.
    """
    manifest = migrate(parse(_read_bytes(path / MANIFEST), MANIFEST))
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, list) or not all(_is_entry(entry) for entry in files):
        message = f"'files' is no list of files with their sizes [{MANIFEST}]"
        raise FormatError(_problem("schema-invalid", ("files",), message))
    result: dict[str, Json] = manifest
    return result


def _is_entry(entry: Json) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("path"), str) and type(entry.get("bytes")) is int


def _file_problems(path: Path, files: list[dict[str, Json]]) -> Iterator[Problem]:
    """Names that are none of ours, files that are missing, of another size, or not listed."""
    for i, entry in enumerate(files):
        name, nbytes, loc = entry["path"], entry["bytes"], ("files", i)
        if not _FILE_NAME.fullmatch(name):
            message = f"'{name}' is no file of a neutral checkpoint"
            yield _problem("unsafe-path", (*loc, "path"), message)
        elif not (path / name).is_file():
            yield _problem("missing-file", (*loc, "path"), f"'{name}' is not there")
        elif (got := (path / name).stat().st_size) != nbytes:
            code: Code = "truncated-file" if got < nbytes else "corrupt-file"
            yield _problem(code, (*loc, "bytes"), f"'{name}' should have {nbytes} bytes, it has {got}")
    listed = {MANIFEST, *(entry["path"] for entry in files)}
    for other in sorted(item.name for item in path.iterdir()):
        if other not in listed and not other.startswith("."):
            hint = "Move it elsewhere; if it belongs to the checkpoint, the manifest does not."
            yield _problem("corrupt-file", (other,), f"'{other}' is not listed in {MANIFEST}", hint)


def check_directory(path: Path) -> list[Problem]:
    """Everything that is wrong with a neutral directory short of its tensors' specs.

    I/O: streams every file that has a digest.
    """
    try:
        manifest = _read_manifest(path)
        problems = [*validate_manifest(manifest), *_file_problems(path, manifest["files"])]
        if not problems:
            problems = list(_digest_problems(path, manifest["files"]))
        if not problems:
            FORMAT.read(path)
    except CkptError as error:
        return list(error.problems)
    return problems


def _digest_problems(path: Path, files: list[dict[str, Json]]) -> Iterator[Problem]:
    for i, entry in enumerate(files):
        if entry["digest"] is not None:
            try:
                with (path / entry["path"]).open("rb") as file:
                    got = _digest(file, entry)
                yield from _digest_problem(i, entry, got)
            except OSError as error:
                message = f"'{entry['path']}' cannot be read: {error.strerror}"
                yield _problem("corrupt-file", ("files", i, "path"), message)


def _digest_problem(i: int, entry: dict[str, Json], got: str) -> Iterator[Problem]:
    if entry.get("digest") not in (None, got):
        message = f"'{entry['path']}' should have {entry['digest']}, it has {got}"
        yield _problem("digest-mismatch", ("files", i, "digest"), message)


def _digest(file: io.BufferedIOBase, entry: dict[str, Json]) -> str:
    """Of the whole file, streamed, of the kind that its entry has."""
    if not str(entry.get("digest")).startswith("crc32c:"):
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    value = 0
    while piece := file.read(_PIECE_NBYTES):
        value = crc.extend(value, piece)
    return _crc32c_digest(value)


def _crc32c_digest(value: int) -> str:
    return f"crc32c:{value:08x}"


def _recorded(i: int, entry: dict[str, Json]) -> list[int] | None:
    """The checksums of a file's tensors; None where the manifest has none.

    Raises: schema-invalid.
    """
    text = entry.get("tensor_crc32c")
    if text is None:
        return None
    if not isinstance(text, str) or not _CHECKSUMS.fullmatch(text):
        message = f"'tensor_crc32c' of '{entry['path']}' is no row of checksums of 8 hexadecimal digits each"
        raise FormatError(_problem("schema-invalid", ("files", i, "tensor_crc32c"), message))
    return [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]


def _merge(tensors: Tensors, more: Tensors, file: str, problems: list[Problem]) -> None:
    for key, tensor in more.items():
        if key in tensors:
            problems.append(_problem("duplicate-key", (file, key), f"'{key}' stands in another shard too"))
        tensors[key] = tensor


class Neutral:
    """The format object."""

    name = "neutral"
    summary = "ckptconv's own: a directory of manifest.json, safetensors files and state.msgpack"
    checksums: tuple[ChecksumKind, ...] = ("crc32c",)
    shards = True

    def sniff(self, path: Path) -> bool:
        """Whether it is a directory with our manifest, or with what is left of it beside our other files."""
        try:
            if not (path / MANIFEST).is_file():
                return (path / STATE_FILE).is_file() and not (path / MANIFEST).exists()
            with (path / MANIFEST).open("rb") as file:
                head = file.read(4096)
            return _MARK in head or any(_FILE_NAME.fullmatch(item.name) for item in path.iterdir())
        except OSError:
            return False

    def read(self, path: Path) -> RawTree:
        """Manifest, state and tensors.

        I/O: reads the manifest, the state and headers.
        Raises: missing-file, truncated-file, corrupt-file, unsafe-path, duplicate-key, schema-version,
        schema-invalid, digest-mismatch of the state or of headers and recorded checksums, and those of
        safetensors.
        """
        manifest = _read_manifest(path)
        problems = list(_file_problems(path, manifest["files"]))
        if problems:
            raise FormatError(*problems)
        sections: dict[str, Tensors] = {section: {} for section in SECTIONS}
        state: bytes | None = None
        for i, entry in enumerate(manifest["files"]):
            name = entry["path"]
            if name == STATE_FILE:
                state = _read_bytes(path / name)
                problems += _digest_problem(i, entry, _digest(io.BytesIO(state), entry))
                continue
            contents = read_file(path / name, _recorded(i, entry))
            if contents.crc32c is not None:
                problems += _digest_problem(i, entry, _crc32c_digest(contents.crc32c))
            _merge(sections[re.split(r"[-.]", name)[0]], contents.tensors, name, problems)
        if problems:
            raise FormatError(*problems)
        parts: list[tuple[Node, Node]] = [
            ("manifest", dump_document({**manifest, "files": []})),
            ("state", state),
        ]
        parts += [(section, DictNode(items=tuple(tensors.items()))) for section, tensors in sections.items()]
        return RawTree(format=self.name, root=DictNode(items=tuple(parts)), location=path.name)

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """A directory; the manifest gets its list of files here and is the last to be published.

        Raises: unsupported-feature, unknown-dtype, limit-exceeded, usage.
        """
        root = raw.root
        text = root.get("manifest") if isinstance(root, DictNode) else None
        if not isinstance(root, DictNode) or not isinstance(text, str):
            message = "the tree has no manifest"
            raise FormatError(
                _problem("unsupported-feature", ("manifest",), message, "Lower it with 'neutral'.")
            )
        files: list[TargetFile] = []
        for section in SECTIONS:
            files += _section_files(section, root.get(section), shard_limit(raw))
        tensor_files, state = tuple(files), root.get("state")
        document, entries = parse(text, MANIFEST), []
        if isinstance(state, bytes):
            files.append(TargetFile(name=STATE_FILE, finish=constant([(0, state)])))
            digest = f"sha256:{hashlib.sha256(state).hexdigest()}"
            entries.append({"path": STATE_FILE, "bytes": len(state), "digest": digest})

        def finish(checksums: Mapping[str, int]) -> Sequence[tuple[int, bytes]]:
            listed = [*(_entry(file, checksums) for file in tensor_files), *entries]
            return [(0, dump_document({**document, "files": listed}).encode("utf-8"))]

        files.append(TargetFile(name=MANIFEST, finish=finish))
        return Layout(kind="directory", files=tuple(files))


def _entry(file: TargetFile, checksums: Mapping[str, int]) -> dict[str, Json]:
    """How the manifest lists a written tensor file."""
    head = b"".join(data for _, data in file.finish(checksums))
    crcs = [checksums[placement.key] for placement in file.placements]
    nbytes = [placement.tensor.spec.nbytes for placement in file.placements]
    return {
        "path": file.name,
        "bytes": file_nbytes(file),
        "digest": _crc32c_digest(crc.crc32c_joined([crc.crc32c(head), *crcs], [len(head), *nbytes])),
        "tensor_crc32c": "".join(f"{value:08x}" for value in crcs),
    }


def _section_files(section: str, node: Node, limit: int | None) -> list[TargetFile]:
    """The safetensors files of one section; none where it is empty."""
    if not isinstance(node, DictNode) or not node.items:
        return []
    tensors, aliases = dedupe(check_tensors(node, "This is a fault of the dialect, please report it."))
    shards = split(tensors, limit)
    names = [f"{section}.safetensors"] if len(shards) == 1 else shard_names(section, len(shards))
    files = []
    for name, shard in zip(names, shards, strict=True):
        own = {dropped: kept for dropped, kept in aliases.items() if kept in shard}
        files.append(target_file(name, name, shard, {"format": "pt", **own}, "crc32c"))
    return files


FORMAT = register(Neutral())
