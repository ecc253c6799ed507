"""`.weights.h5`: the weights and optimizer of a Keras 3 model, one HDF5 group per layer.

`<path>/vars/<i>` are the variables of an object in the order in which it made them; `vars` has an attribute
`name` since Keras 3.6. Paths and dtypes: see `hdf5_read`; what they mean is the dialects' business.

Written: contiguous datasets, see `hdf5_write`. The embedded note is a dataset of its own at the root.
Producers: Keras 3.0 to 3.15, tf_keras 2.21. Any other HDF5 file is read too.
"""

from __future__ import annotations

from pathlib import Path

from ckptconv.formats.base import ChecksumKind, Layout, Placement, TargetFile, register
from ckptconv.formats.h5 import TELLING, names_at_root
from ckptconv.formats.hdf5_file import MAGIC, failure
from ckptconv.formats.hdf5_read import read_tree
from ckptconv.formats.hdf5_write import lay_out
from ckptconv.formats.safetensors_file import constant
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.tensor import Extent, FileSource


class WeightsH5:
    """The format `weights-h5`."""

    name = "weights-h5"
    summary = "Keras weights file (.weights.h5, HDF5), with the optimizer of a compiled model"
    suffixes: tuple[str, ...] = (".weights.h5",)
    checksums: tuple[ChecksumKind, ...] = ()
    shards = False

    def sniff(self, path: Path) -> bool:
        """Whether it begins as an HDF5 file does, and is not in the layout of `h5`."""
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

        Raises: those of `read_tree`; missing-file.
        """
        source = FileSource(path)
        root, note = read_tree(Extent(source=source, offset=0, nbytes=source.nbytes), source.name)
        return RawTree(format=self.name, root=root, note=note, location=path.name)

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """One file.

        Raises: those of `lay_out`.
        """
        if not isinstance(raw.root, DictNode):
            raise failure("unsupported-feature", path.name, "its root is no group")
        new = lay_out(raw.root, raw.note, path.name)
        placements = tuple(
            Placement(key=key, offset=offset, tensor=tensor) for key, offset, tensor in new.tensors
        )
        file = TargetFile(name="", placements=placements, finish=constant(list(new.literals)))
        return Layout(kind="file", files=(file,))


FORMAT = register(WeightsH5())
