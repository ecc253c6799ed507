"""TorchScript archives (`torch.jit.save`): the state_dict of the module that they hold.

Layout: PyTorch's zip (`pytorch`) with `constants.pkl`, and `code/__torch__/<module path>.py` per Python
module. `data.pkl` is the module: an instance of `__torch__.<path>.<Class>` whose state has parameters,
buffers, attributes and submodules side by side. Which is which the class says in the code's first lines:

    class Linear(Module):
      __parameters__ = ["weight", "bias", ]
      __buffers__ = []

The tree is what `torch.jit.load(...).state_dict()` has, in its order: per module the parameters, the buffers,
then the submodules; an `OrderedDict` of dotted names. Parameters are `torch.parameter`, buffers plain
tensors, non-persistent ones among them (TorchScript does not know the difference). Attributes: `buffers` has
the names of the buffers, `tensor_attributes` the paths of tensors that are neither (they belong to the
program and are left out of a state_dict). The program itself, `constants.pkl` and `extra/` are not read.

Refused: a class without its code or its lists, and a frozen module, whose weights are constants of its
program.

Source: torch 2.13 `torch/csrc/jit/serialization/` (`export_module.cpp`, `python_print.cpp`,
`import_source.cpp`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ckptconv.errors import Code, FormatError
from ckptconv.rawtree import DictNode, Node, Opaque, children
from ckptconv.tensor import TensorRef

Small = Callable[[str], bytes | None]
"""A record of the archive by its name, None where there is none."""

_CLASS = re.compile(
    r"^class (\w+)\((\w*)\):\n((?:[ \t]+__(?:parameters|buffers)__ = \[.*\]\n)*)", re.MULTILINE
)
_LIST = re.compile(r"__(parameters|buffers)__ = \[(.*)\]")
_NAME = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ROOT = "__torch__"


@dataclass(frozen=True, slots=True)
class _Lists:
    """What the code says of one class."""

    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()


@dataclass(slots=True)
class _Flat:
    """The state_dict as far as it is made."""

    items: list[tuple[Node, Node]] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def flattened(root: Node, small: Small, name: str) -> tuple[Node, dict[str, tuple[str, ...]]]:
    """The module's state_dict, and the attributes that tell of it; reads the code's records.

    Raises: corrupt-file, unsupported-feature.
    """
    flat = _Flat()
    _Walk(small, name).module(root, "", flat)
    if not flat.items and _has_constants(small):
        raise _error(
            "unsupported-feature",
            name,
            "constants.pkl",
            "the module has no parameters and no buffers: its weights are constants of its program",
            "Save it before torch.jit.freeze, or save model.state_dict() with torch.save.",
        )
    told = {"buffers": tuple(flat.buffers)}
    if flat.others:
        told["tensor_attributes"] = tuple(flat.others)
    return DictNode(items=tuple(flat.items), kind="collections.OrderedDict"), told


def _has_constants(small: Small) -> bool:
    return len(small("constants.pkl") or b"") > len(b"\x80\x02).")


class _Walk:
    """Walks the module tree of one archive."""

    def __init__(self, small: Small, name: str) -> None:
        self._small, self._name = small, name
        self._code: dict[str, dict[str, _Lists]] = {}

    def module(self, node: Node, prefix: str, flat: _Flat) -> None:
        """Add one module and those below it."""
        state = _state_of(node)
        if not isinstance(node, Opaque) or state is None:
            raise _error("corrupt-file", self._name, "data.pkl", "the archive holds no module")
        lists = self._lists(node.name)
        parts = {key: value for key, value in state.items if isinstance(key, str)}
        for key in (*lists.parameters, *lists.buffers):
            if key not in parts:
                raise _error(
                    "corrupt-file", self._name, "data.pkl", f"'{prefix}{key}' of {node.name} is not there"
                )
        for key in lists.parameters:
            self._parameter(parts[key], prefix + key, flat)
        for key in lists.buffers:
            tensor, _ = _tensor_of(parts[key])
            if tensor is not None:
                flat.items.append((prefix + key, tensor))
                flat.buffers.append(prefix + key)
        for key, value in parts.items():
            if key in lists.parameters or key in lists.buffers:
                continue
            if _is_module(value):
                self.module(value, f"{prefix}{key}.", flat)
            else:
                flat.others += _tensors_below(value, prefix + key)

    def _parameter(self, node: Node, name: str, flat: _Flat) -> None:
        tensor, requires_grad = _tensor_of(node)
        if tensor is not None:
            flat.items.append((name, Opaque(kind="torch.parameter", args=(tensor, requires_grad))))

    def _lists(self, class_: str) -> _Lists:
        """What the code says of a class. Raises: corrupt-file."""
        path, _, short = class_.rpartition(".")
        if path not in self._code:
            record = f"code/{path.replace('.', '/')}.py"
            raw = self._small(record)
            if raw is None:
                raise _error(
                    "corrupt-file", self._name, record, f"the code of {class_} is not in the archive"
                )
            try:
                self._code[path] = dict(_classes(raw.decode("utf-8")))
            except UnicodeDecodeError:
                raise _error("corrupt-file", self._name, record, "the code is not UTF-8") from None
        if short not in self._code[path]:
            raise _error(
                "corrupt-file",
                self._name,
                f"code/{path.replace('.', '/')}.py",
                f"the code does not say which attributes of {class_} are parameters and buffers",
            )
        return self._code[path][short]


def _classes(code: str) -> Iterator[tuple[str, _Lists]]:
    """Each module class of one file, with its two lists."""
    for found in _CLASS.finditer(code):
        lists = {kind: tuple(_NAME.findall(names)) for kind, names in _LIST.findall(found[3])}
        if lists.keys() == {"parameters", "buffers"}:
            yield found[1], _Lists(lists["parameters"], lists["buffers"])


def _is_module(node: Node) -> bool:
    return _state_of(node) is not None


def _state_of(node: Node) -> DictNode | None:
    """The attributes of an instance of one of the archive's own classes."""
    if isinstance(node, Opaque) and node.kind == "object" and node.name.partition(".")[0] == _ROOT:
        return node.state if isinstance(node.state, DictNode) else None
    return None


def _tensor_of(node: Node) -> tuple[TensorRef | None, bool]:
    """The tensor of an attribute, None where it is None; and whether it is trained."""
    if isinstance(node, TensorRef):
        return node, False
    if isinstance(node, Opaque) and node.kind == "torch.tensor" and isinstance(node.args[0], TensorRef):
        trained = isinstance(node.state, DictNode) and node.state.get("requires_grad") is True
        return node.args[0], trained
    return None, False


def _tensors_below(node: Node, path: str) -> Iterator[str]:
    """The paths of all tensors in an attribute."""
    if isinstance(node, TensorRef):
        yield path
        return
    for step, part in children(node):
        yield from _tensors_below(part, path if str(step).startswith("@") else f"{path}.{step}")


def _error(code: Code, name: str, record: str, message: str, hint: str = "") -> FormatError:
    error = FormatError.of(
        code,
        f"{message} [{name}]",
        hint or "Save the module again with torch.jit.save; nothing in it was run.",
        loc=(name, record),
    )
    assert isinstance(error, FormatError)
    return error
