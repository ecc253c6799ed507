"""The neutral directory and the document: every fact, tensor and residue, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptconv.bitcast import AsBytes, FromBytes
from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.safetensors_weights import param_tensors
from ckptconv.document import Checkpoint
from ckptconv.errors import FormatError, Problem
from ckptconv.formats.neutral import MANIFEST, SECTIONS
from ckptconv.formats.safetensors_file import dedupe
from ckptconv.formats.safetensors_header import file_order, tag_of
from ckptconv.manifest import from_json, to_json
from ckptconv.rawtree import DictNode, Node, Path, RawTree
from ckptconv.residue_json import STATE_FILE, residue_bytes
from ckptconv.strictjson import dump_document, parse
from ckptconv.tensor import MissingTensor, TensorRef, TensorSpec

_HINT = "Manifest and tensor files do not belong together: copy the whole directory again."


def _escaped(name: str) -> str:
    """A name without `/`, so that a key of several names is read in one way only."""
    return name.replace("~", "~0").replace("/", "~1")


def slot_key(optimizer: str, slot: str, param: str, *, several: bool) -> str:
    """Key of a slot's tensor in the optimizer files; `several`: there is more than one optimizer."""
    key = f"{param}/{_escaped(slot)}"
    return f"{_escaped(optimizer)}/{key}" if several else key


class _Finder:
    """Finds the tensors of a manifest in a raw tree, and says what does not fit."""

    def __init__(self, root: DictNode, *, several: bool) -> None:
        self._several = several
        self._left: dict[tuple[str, str], TensorRef] = {}
        self.problems: list[Problem] = []
        for section in SECTIONS:
            node = root.get(section)
            for key, tensor in node.items if isinstance(node, DictNode) else ():
                assert isinstance(key, str)
                assert isinstance(tensor, TensorRef)
                self._left[section, key] = tensor

    def place(self, address: Path) -> tuple[str, str]:
        """Section and key of a `Checkpoint.lookup` address."""
        match address:
            case ("param", str(name)):
                return "weights", name
            case ("slot", str(optimizer), str(slot), str(param)):
                return "optimizer", slot_key(optimizer, slot, param, several=self._several)
        return "extras", str(address[1])

    def __call__(self, address: Path, spec: TensorSpec) -> TensorRef:
        place = self.place(address)
        tensor = self._left.pop(place, None)
        bare = tag_of(spec) is None
        wanted = AsBytes().spec((spec,)) if bare else spec
        if tensor is None:
            self._wrong(place, f"'{place[1]}' of the manifest is not in the {place[0]} files")
        elif tensor.spec != wanted:
            expected = f"{wanted.dtype.name} {list(wanted.shape)}"
            got = f"{tensor.dtype.name} {list(tensor.shape)}"
            self._wrong(place, f"'{place[1]}' should be {expected}, it is {got}")
        elif bare:
            return tensor.apply(FromBytes(spec.dtype.name, spec.shape, spec.encoded_nbytes))
        else:
            return tensor
        return MissingTensor(spec=spec, name=place[1])

    def finish(self) -> None:
        """Raises: reference-broken for everything that was not found, did not fit, or was not asked for."""
        for place in self._left:
            self._wrong(place, f"'{place[1]}' of the {place[0]} files is not in the manifest")
        if self.problems:
            raise FormatError(*self.problems)

    def _wrong(self, place: tuple[str, str], message: str) -> None:
        problem = Problem(code="reference-broken", loc=place, message=message, hint=_HINT)
        self.problems.append(problem)


class Neutral:
    """The dialect object."""

    name = "neutral"
    format = "neutral"
    framework: str | None = None
    summary = "the neutral document with its tensors and residue"
    needs_template = False
    save_counter: str | None = None

    def detect(self, raw: RawTree) -> Detection | None:
        """The manifest says it."""
        return Detection(score=100, evidence=MANIFEST)

    def lift(self, raw: RawTree) -> Checkpoint:
        """The document as it was stored.

        Raises: SchemaError with everything that is wrong with the manifest; reference-broken where manifest
        and tensors disagree; corrupt-file for a damaged residue.
        """
        root = raw.root
        text = root.get("manifest") if isinstance(root, DictNode) else None
        if not isinstance(root, DictNode) or not isinstance(text, str):
            raise FormatError.of("corrupt-file", "the tree has no manifest", _HINT, loc=("manifest",))
        manifest = parse(text, MANIFEST)
        optimizers = manifest.get("optimizers") if isinstance(manifest, dict) else None
        finder = _Finder(root, several=isinstance(optimizers, list) and len(optimizers) > 1)
        state = root.get("state")
        checkpoint = from_json(manifest, finder, state if isinstance(state, bytes) else None)
        finder.finish()
        return checkpoint

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The whole document; needs no residue and no template."""
        several = len(checkpoint.optimizers) > 1
        residue = checkpoint.residue
        manifest = to_json(checkpoint, state_file=None if residue is None else STATE_FILE)
        slots = {
            slot_key(optimizer.name, slot, param, several=several): tensor
            for optimizer in checkpoint.optimizers
            for slot, by_param in optimizer.slots.items()
            for param, tensor in by_param.items()
        }
        sections: dict[str, Mapping[str, TensorRef]] = {
            "weights": param_tensors(checkpoint.params),
            "optimizer": slots,
            "extras": checkpoint.extras,
        }
        parts: list[tuple[Node, Node]] = [
            ("manifest", dump_document(manifest)),
            ("state", None if residue is None else residue_bytes(residue)),
            *((name, DictNode(items=tuple(_stored(tensors)))) for name, tensors in sections.items()),
        ]
        return RawTree(format=self.format, root=DictNode(items=tuple(parts)))

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """None: it is a document already."""
        return ()

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """How to open it."""
        return f"import ckptconv\ncheckpoint = ckptconv.open({target!r})\n"


def _stored(tensors: Mapping[str, TensorRef]) -> Iterator[tuple[Node, Node]]:
    """The tensors as a section has them: in file order, twins last, foreign dtypes as bytes."""
    plain = {
        key: tensor.apply(AsBytes()) if tag_of(tensor.spec) is None else tensor
        for key, tensor in tensors.items()
    }
    kept, aliases = dedupe(plain)
    yield from ((key, kept[key]) for key in file_order({key: t.spec for key, t in kept.items()}))
    yield from ((key, plain[key]) for key in aliases)


DIALECT = register(Neutral())
