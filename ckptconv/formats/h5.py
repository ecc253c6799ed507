"""`.h5`: a whole Keras model, or its weights alone, in the layout of Keras 2, which Keras 3 still writes.

    attributes of the root        keras_version, backend; model_config, training_config (JSON texts)
    model_weights                 a group per layer; attribute `layer_names`, in the model's order
    model_weights/<layer>         datasets by name; attribute `weight_names`, in the layer's order
    optimizer_weights             datasets by name; attribute `weight_names`, in the optimizer's order

Weights alone have the groups of the layers and `layer_names` at the root. An attribute of more than 64 KB is
split: `layer_names0`, `layer_names1`, ... Texts are of fixed or variable length, by the age of h5py.

The tree is that of the HDF5 file (see `hdf5_read`), with both configs as they parse. Written: contiguous
datasets, see `hdf5_write`; the embedded note is a dataset of its own at the root.

Producers: Keras 2.0 to 2.15, tf_keras 2.21, the legacy format of Keras 3. Refused: configs that are no JSON.
Source: keras 3.15.1 `keras/src/legacy/saving/legacy_h5_format.py`, keras 2.0.9 `keras/engine/topology.py`.
"""

from __future__ import annotations

from pathlib import Path

from ckptconv.errors import CkptError
from ckptconv.formats.base import ChecksumKind, Layout, Placement, TargetFile, register
from ckptconv.formats.hdf5_file import MAGIC, Handle, failure, reported
from ckptconv.formats.hdf5_read import read_tree
from ckptconv.formats.hdf5_write import lay_out
from ckptconv.formats.json_tree import read_text, text_of
from ckptconv.formats.safetensors_file import constant
from ckptconv.rawtree import DictNode, Node, RawTree, Scalar
from ckptconv.source import open_source
from ckptconv.tensor import Extent

CONFIGS = ("model_config", "training_config")
TELLING = frozenset({"layer_names", "layer_names0", "model_config"})
"""Attributes of the root that no other layout has."""
_FIXED = "fixed_length"
"""Attribute of the tree: the configs whose texts are of fixed length."""


def names_at_root(path: Path) -> frozenset[str]:
    """Names of the attributes of the root; none where it is no HDF5 file that can be read."""
    if not path.is_file():
        return frozenset()
    try:
        source = open_source(path)
        head = bytearray(min(source.nbytes, len(MAGIC)))
        source.read_into(0, memoryview(head))
        if head != MAGIC:
            return frozenset()
        handle = Handle(Extent(source=source, offset=0, nbytes=source.nbytes), path.name)
        with reported(path.name):
            return frozenset(str(name) for name in handle.file.attrs)
    except (CkptError, OSError):
        return frozenset()


class H5:
    """The format `h5`."""

    name = "h5"
    summary = "Keras model or weights in the layout of Keras 2 (.h5, HDF5)"
    checksums: tuple[ChecksumKind, ...] = ()
    shards = False

    def sniff(self, path: Path) -> bool:
        """Whether it is an HDF5 file whose root says the layers' names or the model's config."""
        return bool(names_at_root(path) & TELLING)

    def read(self, path: Path) -> RawTree:
        """Groups, attributes and datasets, the configs parsed.

        Raises: those of `read_tree` and `json_tree.read_text`; missing-file.
        """
        source = open_source(path)
        root, note = read_tree(Extent(source=source, offset=0, nbytes=source.nbytes), source.name)
        told = root.state if isinstance(root.state, DictNode) else DictNode()
        configs: list[tuple[Node, Node]] = []
        attributes: dict[str, Scalar | tuple[str, ...]] = {}
        fixed = []
        for key in CONFIGS:
            text = told.get(key)
            if isinstance(text, str):
                text = text.encode("utf-8", "surrogateescape")
            elif isinstance(text, bytes):
                fixed.append(key)
            if isinstance(text, bytes) and key not in root:
                node, attributes[key] = read_text(text, f"{path.name}@{key}")
                configs.append((key, node))
        if fixed:
            attributes[_FIXED] = tuple(fixed)
        parsed = {key for key, _ in configs}
        state = tuple((key, value) for key, value in told.items if key not in parsed)
        tree = DictNode(
            items=(*configs, *root.items), args=root.args, state=DictNode(items=state) if state else None
        )
        return RawTree(format=self.name, root=tree, attributes=attributes, note=note, location=path.name)

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """One file.

        Raises: those of `lay_out`; unsupported-feature for a tree that is no file's.
        """
        root = raw.root
        if not isinstance(root, DictNode):
            raise failure("unsupported-feature", path.name, "its root is no group")
        fixed = raw.attributes.get(_FIXED, ())
        texts: list[tuple[Node, Node]] = []
        for key in CONFIGS:
            if key in root:
                text = text_of(root.get(key), raw.attributes.get(key), path.name)
                texts.append((key, text if isinstance(fixed, tuple) and key in fixed else text.decode()))
        written = {key for key, _ in texts}
        told = root.state.items if isinstance(root.state, DictNode) else ()
        items = tuple((key, node) for key, node in root.items if key not in written)
        tree = DictNode(items=items, args=root.args, state=DictNode(items=(*told, *texts)))
        new = lay_out(tree, raw.note, path.name)
        placements = tuple(
            Placement(key=key, offset=offset, tensor=tensor) for key, offset, tensor in new.tensors
        )
        file = TargetFile(name="", placements=placements, finish=constant(list(new.literals)))
        return Layout(kind="file", files=(file,))


FORMAT = register(H5())
