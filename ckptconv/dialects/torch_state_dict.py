"""A bare `model.state_dict()` saved by itself: weights and buffers, nothing of the run.

The only PyTorch dialect that can be written from a document alone: an `OrderedDict` of the parameters in
order, under their names, tied ones sharing their storage. It carries no note: `load_state_dict(strict=True)`
refuses keys that are no parameter's. Read back into its own kind, wrapper prefixes, `_metadata` and
`nn.Parameter` wrappings are as they were.
"""

from __future__ import annotations

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.residue import Lifter, fill, untold
from ckptconv.dialects.torch_modules import (
    is_module,
    is_module_state,
    is_state_dict,
    lift_module,
    state_dict_of,
)
from ckptconv.dialects.torch_objects import named_code, refuse_repeated_keys
from ckptconv.dialects.torch_plain import provenance
from ckptconv.dialects.torch_values import lift_rest, own_residue, with_layouts
from ckptconv.document import Checkpoint, Progress, Residue, Unknown
from ckptconv.errors import FormatError, LossError, MappingError, Problem
from ckptconv.formats.torch_folder import DIRECTORY
from ckptconv.note import EXTENSION
from ckptconv.rawtree import DictNode, Node, Opaque, RawTree

_NO_RUN = Unknown(reason="a bare state_dict holds weights only")


class StateDict:
    """Weights of one model, by name."""

    name = "state-dict"
    format = "pytorch"
    framework: str | None = "torch"
    needs_template = False
    save_counter: str | None = None
    summary = "bare model.state_dict(): weights and buffers only"

    def detect(self, raw: RawTree) -> Detection | None:
        """By a dictionary that has only named tensors."""
        if is_module_state(raw.root):
            return Detection(score=80, evidence="an OrderedDict with the _metadata of Module.state_dict()")
        if is_state_dict(raw.root) and raw.attributes.get("container") != DIRECTORY:
            return Detection(score=55, evidence="a dictionary of named tensors")
        return None

    def lift(self, raw: RawTree) -> Checkpoint:
        """The weights. Reads nothing. Raises: duplicate-key, unknown-dialect."""
        if not isinstance(raw.root, DictNode) and not is_module(raw.root):
            raise FormatError.of(
                "unknown-dialect",
                "the file holds no state_dict and no module",
                "See: ckptconv inspect --raw.",
                loc=(),
            )
        refuse_repeated_keys(raw.root)
        lifter = Lifter(raw.root)
        module = lift_module(raw.root, (), lifter, buffers=_buffers(raw))
        extras = lift_rest(raw.root, lifter, module.parts)
        return Checkpoint(
            progress=Progress(step=_NO_RUN, epochs=_NO_RUN),
            params=module.params,
            extras=extras,
            described=module.described,
            residue=Residue(
                format=self.format, dialect=self.name, root=lifter.residue(), attributes=raw.attributes
            ),
            provenance=provenance(raw, self.name, self.detect(raw)),
            oddities=named_code(raw.root),
        )

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The state_dict as it was, or one made of the document's parameters."""
        residue = checkpoint.residue
        root = own_residue(checkpoint, self.name)
        if root is not None and residue is not None:
            _refuse_untold(checkpoint, root)
            return RawTree(
                format=self.format,
                root=with_layouts(fill(root, checkpoint), root),
                attributes=residue.attributes,
            )
        return RawTree(format=self.format, root=state_dict_of(checkpoint.params))

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """None: names are all that it gives."""
        return ()

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`torch.load` and `load_state_dict`."""
        return f"import torch\n\nmodel.load_state_dict(torch.load({target!r}))"


class WholeModule(StateDict):
    """A module pickled with its classes: `torch.save(model, path)`. The classes stay descriptions."""

    name = "module"
    needs_template = True
    summary = "whole pickled module: torch.save(model); its classes are described, not imported"

    def detect(self, raw: RawTree) -> Detection | None:
        """By an object that has a module's attributes."""
        if not isinstance(raw.root, Opaque) or not is_module(raw.root):
            return None
        return Detection(score=100, evidence=f"a pickled {raw.root.name}")

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The module as it was, with the document's parameters. Raises: template-required."""
        if own_residue(checkpoint, self.name) is None:
            raise MappingError.of(
                "template-required",
                "a pickled module needs a template: its classes and attributes are the program's own",
                "Pass --template with such a file, or --to pytorch:state-dict.",
                loc=("residue",),
            )
        return super().lower(checkpoint)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`torch.load` of a module, which imports its classes."""
        return f"import torch\n\nmodel = torch.load({target!r}, weights_only=False)"


def _buffers(raw: RawTree) -> frozenset[str]:
    """The names that a TorchScript archive tells to be buffers."""
    told = raw.attributes.get("buffers")
    return frozenset(told) if isinstance(told, tuple) else frozenset()


def _refuse_untold(checkpoint: Checkpoint, root: Node) -> None:
    """Raises: state-dropped for what was supplied to a file that has no place for it, not even a note."""
    lost = untold(checkpoint, root) if EXTENSION not in checkpoint.extensions else ()
    if lost:
        raise LossError.of(
            "state-dropped",
            f"a bare state_dict has no place for '{lost[0]}', which was supplied",
            f"Leave --set {lost[0]} out, or write to safetensors or neutral.",
            loc=("progress", lost[0]),
        )


register(StateDict())
register(WholeModule())
