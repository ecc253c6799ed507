"""What every op asks of its inputs before it promises a result."""

from __future__ import annotations

from ckptconv.errors import MappingError, Problem
from ckptconv.tensor import TensorSpec


def misfit(op: object, spec: TensorSpec, hint: str = "Check the mapping or the template.") -> MappingError:
    what = f"{spec.dtype.name} of shape {list(spec.shape)}"
    return MappingError(
        Problem(code="shape-mismatch", loc=(), message=f"{op} does not fit {what}", hint=hint)
    )


def fixed(op: object, spec: TensorSpec) -> TensorSpec:
    """The spec, if its elements are of one length, so that they can be taken apart."""
    if spec.encoded_nbytes is not None:
        raise misfit(op, spec, "Strings and variants can only be copied whole.")
    return spec
