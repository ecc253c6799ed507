"""`.weights.h5`: the weights and optimizer of a Keras 3 model, one HDF5 group per layer.

`<path>/vars/<i>` are the variables of an object in the order in which it made them; `vars` has an attribute
`name` since Keras 3.6. Paths and dtypes: see `hdf5_read`; what they mean is the dialects' business.

`X.weights.json` and the files that it lists: see `weights_shards`. A weights file that is not there stands
for the index beside it.

Written: contiguous datasets, see `hdf5_write`; an index and files of at most `shard_nbytes` where the tree
has that attribute, or the name is an index's. The embedded note is a dataset of its own at the root.
Producers: Keras 3.0 to 3.15, tf_keras 2.21. Any other HDF5 file is read too.
"""

from __future__ import annotations

from pathlib import Path

from ckptconv.formats.base import ChecksumKind, Layout, Placement, TargetFile, register
from ckptconv.formats.h5 import TELLING, names_at_root
from ckptconv.formats.hdf5_file import MAGIC, failure
from ckptconv.formats.hdf5_read import read_tree
from ckptconv.formats.hdf5_write import lay_out
from ckptconv.formats.safetensors_file import constant, shard_limit
from ckptconv.formats.weights_shards import (
    INDEX_SUFFIX,
    index_of,
    is_index,
    lay_out_shards,
    read_shards,
)
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.source import open_source
from ckptconv.tensor import Extent


class WeightsH5:
    """The format `weights-h5`."""

    name = "weights-h5"
    summary = "Keras weights file (.weights.h5, HDF5), with the optimizer of a compiled model"
    checksums: tuple[ChecksumKind, ...] = ()
    shards = True

    def sniff(self, path: Path) -> bool:
        """Whether it begins as an HDF5 file does, and is not in the layout of `h5`; or is an index."""
        index = index_of(path)
        if index is not None:
            return is_index(index)
        try:
            if not path.is_file():
                return False
            with path.open("rb") as file:
                begins = file.read(len(MAGIC)) == MAGIC
        except OSError:
            return False
        return begins and not names_at_root(path) & TELLING

    def read(self, path: Path) -> RawTree:
        """Groups, attributes and datasets.

        Raises: those of `read_tree` and `read_shards`; missing-file.
        """
        index = index_of(path)
        if index is not None:
            root, note = read_shards(index)
            return RawTree(format=self.name, root=root, note=note, location=index.name)
        source = open_source(path)
        root, note = read_tree(Extent(source=source, offset=0, nbytes=source.nbytes), source.name)
        return RawTree(format=self.name, root=root, note=note, location=path.name)

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """One file, or several and their index.

        Raises: those of `lay_out`; usage.
        """
        if not isinstance(raw.root, DictNode):
            raise failure("unsupported-feature", path.name, "its root is no group")
        limit = shard_limit(raw)
        if limit is not None or path.name.endswith(INDEX_SUFFIX):
            return lay_out_shards(raw.root, raw.note, limit, path)
        new = lay_out(raw.root, raw.note, path.name)
        placements = tuple(
            Placement(key=key, offset=offset, tensor=tensor) for key, offset, tensor in new.tensors
        )
        file = TargetFile(name="", placements=placements, finish=constant(list(new.literals)))
        return Layout(kind="file", files=(file,))


FORMAT = register(WeightsH5())
