"""What may happen to a tensor on its way: values that say what they do, their inverse, or what they lose."""

from ckptconv.ops.arithmetic import Add, Cast, Scale, Shift
from ckptconv.ops.layout import Concat, Permute, Reorder, Reshape, Slice
from ckptconv.ops.normalized import SpectralNorm, WeightNorm

__all__ = [
    "Add",
    "Cast",
    "Concat",
    "Permute",
    "Reorder",
    "Reshape",
    "Scale",
    "Shift",
    "Slice",
    "SpectralNorm",
    "WeightNorm",
]
