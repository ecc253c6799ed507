"""A residue <-> the manifest's entry and the bytes of the state file."""

from __future__ import annotations

import base64
import binascii

from ckptconv.document import Residue
from ckptconv.errors import FormatError
from ckptconv.packing import pack, unpack
from ckptconv.rawtree import DictNode, ListNode, Node, Scalar, dict_of
from ckptconv.strictjson import Json

STATE_FILE = "state.msgpack"


def residue_bytes(residue: Residue) -> bytes:
    """Tree and attributes of a residue, as the state file holds them.

    Raises: unsupported-feature for a tensor that was not lifted.
    """
    attributes: dict[str, Node] = {
        key: ListNode(items=value, kind="tuple") if isinstance(value, tuple) else value
        for key, value in residue.attributes.items()
    }
    return pack(dict_of({"root": residue.root, "attributes": dict_of(attributes)}))


def residue_to_json(residue: Residue | None, state_file: str | None) -> Json:
    if residue is None:
        return None
    head = {"format": residue.format, "dialect": residue.dialect}
    if state_file is not None:
        return {**head, "file": state_file}
    return {**head, "inline": base64.b64encode(residue_bytes(residue)).decode("ascii")}


def residue_from_json(item: Json, state: bytes | None) -> Residue | None:
    if item is None:
        return None
    name = "manifest.json"
    if "file" in item:
        name = item["file"]
        if state is None:
            raise FormatError.of(
                "missing-file",
                f"the residue is in '{name}', which is not there",
                "Copy the whole directory.",
                loc=(name,),
            )
        data = state
    else:
        try:
            data = base64.b64decode(item["inline"], validate=True)
        except binascii.Error as error:
            raise FormatError.of(
                "corrupt-file",
                f"the residue is not base64: {error}",
                "Write it again.",
                loc=("residue", "inline"),
            ) from None
    tree = unpack(data, name)
    attributes = tree.get("attributes") if isinstance(tree, DictNode) else None
    if not isinstance(tree, DictNode) or not isinstance(attributes, DictNode) or "root" not in tree:
        raise FormatError.of(
            "corrupt-file",
            f"no residue: 'root' and 'attributes' are missing [{name}]",
            "Copy it again.",
            loc=(name,),
        )
    return Residue(
        format=item["format"],
        dialect=item["dialect"],
        root=tree.get("root"),
        attributes={str(key): _attribute(value, name) for key, value in attributes.items},
    )


def _attribute(value: Node, name: str) -> Scalar | tuple[str, ...]:
    if isinstance(value, ListNode):
        return tuple(str(item) for item in value.items)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    raise FormatError.of(
        "corrupt-file",
        f"an attribute cannot be a {type(value).__name__} [{name}]",
        "Copy it again.",
        loc=(name,),
    )
