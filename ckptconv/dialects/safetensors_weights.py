"""Weights in safetensors: the tensors are the parameters; what else is known is in the embedded note."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.residue import Lifter, fill
from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Param, Progress, Provenance, Residue, Unknown
from ckptconv.errors import FormatError, Problem
from ckptconv.formats.safetensors_file import identity
from ckptconv.note import KEY, edit_note, read_note, tied, write_note
from ckptconv.rawtree import DictNode, RawTree, Scalar
from ckptconv.tensor import TensorRef

_WEIGHTS_ONLY = Unknown(reason="safetensors holds weights only")


class Weights:
    """The dialect object."""

    name = "weights"
    format = "safetensors"
    framework: str | None = None
    summary = "parameters by name; progress in the embedded note"
    needs_template = False
    save_counter: str | None = None

    def detect(self, raw: RawTree) -> Detection | None:
        """Every safetensors file is taken for weights."""
        if not isinstance(raw.root, DictNode):
            return None
        return Detection(score=50, evidence=f"{len(raw.root.items)} named tensors")

    def lift(self, raw: RawTree) -> Checkpoint:
        """Parameters, ties, and what the note tells of progress.

        Raises: corrupt-file, schema-version, schema-invalid for a note that is none.
        """
        assert isinstance(raw.root, DictNode)
        lifter = Lifter(raw.root)
        params: dict[str, Param] = {}
        first: dict[object, str] = {}
        for name, tensor in raw.root.items:
            assert isinstance(name, str)
            assert isinstance(tensor, TensorRef)
            lifter.take((name,), ("param", name))
            key = identity(tensor)
            params[name] = Param(name=name, tensor=tensor, tied_to=None if key is None else first.get(key))
            if key is not None:
                first.setdefault(key, name)
        attributes: dict[str, Scalar | tuple[str, ...]] = dict(raw.attributes)
        progress = Progress(**dict.fromkeys(PROGRESS_FIELDS, _WEIGHTS_ONLY))
        provenance = Provenance(format=self.format, dialect=self.name, source=raw.location)
        if raw.note is not None:
            note = read_note(raw.note)
            attributes[KEY] = raw.note
            progress = note.progress
            params = tied(params, note.ties)
            provenance = replace(
                provenance, producer=note.provenance.producer, history=note.provenance.history
            )
        return Checkpoint(
            progress=progress,
            params=params,
            residue=Residue(
                format=self.format, dialect=self.name, root=lifter.residue(), attributes=attributes
            ),
            provenance=provenance,
        )

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The parameters under their names, and the note; nothing else of the document."""
        residue = checkpoint.residue
        if residue is not None and (residue.format, residue.dialect) == (self.format, self.name):
            attributes = dict(residue.attributes)
            old = attributes.pop(KEY, None)
            note = edit_note(old, checkpoint) if isinstance(old, str) else write_note(checkpoint)
            root = fill(residue.root, checkpoint)
            return RawTree(format=self.format, root=root, attributes=attributes, note=note)
        return RawTree(
            format=self.format,
            root=DictNode(items=tuple(param_tensors(checkpoint.params).items())),
            attributes={"format": "pt"},
            note=write_note(checkpoint),
        )

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """None: names are all that it gives."""
        return ()

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """Nothing: every framework reads it."""
        return ""


def param_tensors(params: Mapping[str, Param]) -> dict[str, TensorRef]:
    """Tensor of each parameter; a tied one is its group's, so that it is stored once."""
    result: dict[str, TensorRef] = {}
    for name, param in params.items():
        if param.tied_to is not None and param.tied_to not in params:
            raise FormatError.of(
                "reference-broken",
                f"'{name}' is tied to '{param.tied_to}', which is not there",
                "Write the whole tie group.",
                loc=("params", name, "tied_to"),
            )
        first = params[param.tied_to].tensor if param.tied_to is not None else param.tensor
        result[name] = first if first.spec == param.tensor.spec else param.tensor
    return result


DIALECT = register(Weights())
