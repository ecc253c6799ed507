"""`keras_metadata.pb` of a SavedModel: which class of Keras each object of the model is.

    SavedMetadata { 1 repeated SavedObject { 2 node_id, 3 node_path, 4 identifier, 5 metadata, 6 version } }

`node_path` is a path of edges from the root, joined by dots (`root.layer_with_weights-0`); `metadata` a JSON
text with `class_name` and `config`. Written by Keras 2.5 to 2.15 and tf_keras; Keras 3 writes none.

Source: tf_keras 2.21 `tf_keras/protobuf/saved_metadata.proto`, `src/saving/legacy/saved_model/save.py`.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError

from ckptconv.errors import CkptError, FormatError
from ckptconv.formats import protos
from ckptconv.strictjson import parse

FILE = "keras_metadata.pb"
_LAYER = "_tf_keras_layer"
_MOST_NBYTES = 256 << 20


def layer_classes(directory: Path) -> tuple[tuple[str, str], ...]:
    """(path of edges, name of the class) of every layer of Keras; none where the file is not there.

    Raises: corrupt-file, unsupported-feature, limit-exceeded.
    """
    path = directory / FILE
    if not path.is_file():
        return ()
    try:
        nbytes = path.stat().st_size
        data = path.read_bytes() if nbytes <= _MOST_NBYTES else b""
    except OSError as error:
        raise _failure(f"it cannot be read: {error.strerror}") from None
    if nbytes > _MOST_NBYTES:
        raise FormatError.of(
            "limit-exceeded",
            f"'{FILE}' has {nbytes} bytes, {_MOST_NBYTES} are read",
            "Move it away: the variables are read without it.",
            loc=(FILE,),
        )
    found = []
    try:
        nodes = protos.decoder(protos.SavedMetadata)(data).nodes
    except DecodeError:
        raise _failure(f"{nbytes} bytes are no SavedMetadata") from None
    for number, node in enumerate(nodes):
        if node.identifier != _LAYER:
            continue
        told = parse(node.metadata, f"{FILE}[{number}]", constants=True)
        name = told.get("class_name") if isinstance(told, dict) else None
        if not isinstance(name, str):
            raise _failure(f"object {number} ('{node.node_path}') has no class")
        found.append((node.node_path, name))
    return tuple(found)


def _failure(what: str) -> CkptError:
    return FormatError.of(
        "corrupt-file", f"{what} [{FILE}]", "Copy the SavedModel again, or move that file away.", loc=(FILE,)
    )
