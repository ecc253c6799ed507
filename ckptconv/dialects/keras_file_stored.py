"""An optimizer of a Keras file before it has a meaning: its variables in their row, and its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptconv.document import Value
from ckptconv.errors import FormatError
from ckptconv.rawtree import Node
from ckptconv.tensor import TensorRef

NAME = "optimizer"
INNER = "inner_optimizer"
Path = tuple[str, ...]
Variables = Sequence[tuple[Path, TensorRef]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An optimizer as a file has it; every path begins at the root of the tree."""

    framework: str
    variables: tuple[tuple[Path, TensorRef], ...]
    """In the order in which the optimizer keeps them."""
    again: tuple[tuple[Path, ...], ...] = ()
    """Other places of the same variables, one row each."""
    config: Node = None
    """What declares class and arguments: `{"class_name": ..., "config": {...}}`, or the name of a class."""
    at: Path = ()
    """Where that stands."""
    scope: str = ""
    """The name that the optimizer gives itself, where there is no config."""
    scaler: tuple[tuple[Path, TensorRef], ...] = ()
    """The variables of the LossScaleOptimizer of Keras 3 around it."""
    counter: bool = True
    """Whether the first variable counts: some classes of Keras before 2.3 keep no counter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A leaf that became part of the document."""

    path: Path
    to: tuple[str | int, ...]
    number: TensorRef | None = None
    """The variable, where it is a counter or a hyperparameter."""
    was: int | None = None
    nullable: bool = False
    """Whether nothing may stand there."""


def number_in(tensor: TensorRef, path: Path) -> int | float:
    """The number that a variable holds. Raises: corrupt-file."""
    if tensor.spec.numel != 1 or tensor.dtype.kind not in ("int", "uint", "float"):
        raise no_number(tensor, path)
    value: Value = tensor.read().reshape(-1)[0].item()
    assert isinstance(value, (int, float))
    return value


def no_number(tensor: TensorRef, path: Path) -> FormatError:
    """The error for a variable that holds no number, or none that counts."""
    error = FormatError.of(
        "corrupt-file",
        f"'{'/'.join(path)}' is {tensor.dtype.name} {list(tensor.shape)}, expected one number",
        "Save the model again.",
        loc=path,
    )
    assert isinstance(error, FormatError)
    return error
