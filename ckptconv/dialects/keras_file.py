"""Keras 3's own files, `.keras` and `.weights.h5`: the model, its optimizer, and back.

`.keras` holds all that a run needs: names and kinds of layers (*declared*), class and arguments of the
optimizer (recorded, and rewritten with the values of the run that is written), counter, learning rate, slots.
A `.weights.h5` has no config: what its groups' names tell is taken, the rest is not guessed.
What the files lack: epochs, data position. See `keras_file_model`, `keras_file_optimizer`.

Covered: keras 3.0 to 3.15. Files of tf_keras are recognised by their version and refused.
Source: keras 3.15.1 `keras/src/saving/saving_lib.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptconv.catalog.optimizers import row
from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.graph_lower import agreed, with_micro_steps
from ckptconv.dialects.graph_note import ATTRIBUTE, note_of, with_note
from ckptconv.dialects.keras_file_model import VARS, Model, below, model_of, text
from ckptconv.dialects.keras_file_optimizer import NAME, Lifted, lift_optimizer
from ckptconv.dialects.keras_file_schedule import with_schedule
from ckptconv.dialects.residue import Lifter, fill
from ckptconv.document import (
    Absent,
    Block,
    Checkpoint,
    Fact,
    Param,
    Progress,
    Provenance,
    Residue,
    Unknown,
    value_of,
)
from ckptconv.errors import FormatError, MappingError, Problem
from ckptconv.rawtree import DictNode, Node, RawTree, transform, walk
from ckptconv.rawtree import Lifted as Address
from ckptconv.tensor import TensorRef

_BUILD = "model.optimizer.build(model.trainable_variables)"

_METRICS = "metrics"
"""Group of a compiled tf_keras model; Keras 3 has none."""


class KerasFile:
    """The dialect `keras3` of one of the two formats."""

    name = "keras3"
    framework: str | None = "keras3"
    needs_template = True
    save_counter: str | None = None

    def __init__(self, format_name: str, summary: str) -> None:
        self.format = format_name
        self.summary = summary

    def detect(self, raw: RawTree) -> Detection | None:
        """By the recorded version, or by groups of variables where there is none."""
        if not isinstance(raw.root, DictNode):
            return None
        if self.format == "keras":
            version = text(below(raw.root, "metadata", "keras_version"))
            return Detection(score=100, evidence=f"saved by Keras {version}") if version[:2] == "3." else None
        if _METRICS in raw.root:
            return None  # only tf_keras saves its metrics, and its optimizer's variables are in another order
        if any(len(path) > 1 and path[-2] == VARS for path, _ in walk(raw.root)):
            return Detection(score=60, evidence="groups 'vars' of numbered variables")
        return None

    def lift(self, raw: RawTree) -> Checkpoint:
        """The run. I/O: reads the optimizer's numbers.

        Raises: corrupt-file, unknown-dialect, and those of the embedded note.
        """
        detected = self.detect(raw)
        weights, config, at = self._parts(raw)
        model = model_of(weights, config)
        optimizer = lift_optimizer(weights, config, model.variables, ordered=model.ordered)
        lifter = Lifter(raw.root)
        for one in model.variables:
            lifter.take((*at, *one.path), ("param", one.name))
        if optimizer is not None:
            _take(lifter, optimizer, at)
        extras = _extras(raw.root, lifter)
        version = text(below(raw.root, "metadata", "keras_version"))
        checkpoint = Checkpoint(
            progress=_progress(optimizer),
            params=_params(model),
            optimizers=() if optimizer is None else (optimizer.optimizer,),
            schedules=() if optimizer is None or optimizer.schedule is None else (optimizer.schedule,),
            rng=tuple(
                Block(name=key, library="tensorflow", tensors=(key,))
                for key in extras
                if "seed_generator" in key
            ),
            extras=extras,
            residue=Residue(
                format=raw.format, dialect=self.name, root=lifter.residue(), attributes=raw.attributes
            ),
            provenance=Provenance(
                format=raw.format,
                dialect=self.name,
                evidence=detected.evidence if detected else "named by the caller",
                source=raw.location.rpartition("/")[2],
                producer=f"keras {version}" if version else "",
            ),
            oddities=() if optimizer is None else optimizer.oddities,
        )
        return with_note(checkpoint, raw.note)

    def _parts(self, raw: RawTree) -> tuple[DictNode, DictNode | None, tuple[str, ...]]:
        """The tree of the weights, the config, and where the former stands."""
        if self.format == "keras" and isinstance(raw.root, DictNode):
            weights, config = raw.root.get("weights"), raw.root.get("config")
            if isinstance(weights, DictNode):
                return weights, config if isinstance(config, DictNode) else None, ("weights",)
        elif isinstance(raw.root, DictNode):
            return raw.root, None, ()
        raise FormatError.of(
            "unknown-dialect",
            f"'{raw.location}' holds no weights of a model",
            "See it with 'ckptconv inspect --raw'.",
            loc=(raw.location,),
        )

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The file of the residue's structure, with the document's values.

        Raises: template-required, template-mismatch, template-unbuilt, progress-conflict, residue-stale, and
        those of `residue.fill`.
        """
        residue = checkpoint.residue
        if residue is None or residue.format != self.format or residue.dialect != self.name:
            raise MappingError.of(
                "template-required",
                f"a {self.format} file takes its structure from one of the same model",
                f"Build and compile the model in Keras, run {_BUILD}, save it, and pass that as --template.",
                loc=("residue",),
            )
        lifted = {leaf.to[0] for _, leaf in walk(residue.root) if isinstance(leaf, Address)}
        if any(one.slots for one in checkpoint.optimizers) and "slot" not in lifted:
            raise MappingError(_unbuilt())
        settled = _settled(checkpoint, residue.root)
        told = with_schedule(_with_arguments(residue.root, settled), settled, _CONFIG)
        root = fill(told, settled)
        return RawTree(
            format=residue.format,
            root=root,
            attributes={key: value for key, value in residue.attributes.items() if key != ATTRIBUTE},
            note=note_of(settled, residue),
        )

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """What a model saved before its optimizer had variables lacks."""
        if not template.params:
            hint = "Run model.build(input_shape) before saving it."
            message = "the template's model has no variables"
            return (Problem(code="template-unbuilt", loc=("template", "params"), message=message, hint=hint),)
        for optimizer in template.optimizers:
            known = row(optimizer.algorithm, "keras3")
            values = {k: value_of(fact) for k, fact in optimizer.groups[0].hyperparameters.items()}
            unresolved = any(
                key.startswith(f"{NAME}/{VARS}/") for key in map(_below_weights, template.extras)
            )
            if known is not None and known.slots_present(values) and not optimizer.slots and not unresolved:
                return (_unbuilt(),)
        return ()

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`load_model`, or `load_weights` into a model whose optimizer is built."""
        if self.format == "keras":
            return f"import keras\n\nmodel = keras.saving.load_model({target!r})"
        build = f"{_BUILD}\n" if checkpoint.optimizers else ""
        return f"{build}model.load_weights({target!r})"


def _below_weights(key: str) -> str:
    return key.removeprefix("weights/")


def _unbuilt() -> Problem:
    return Problem(
        code="template-unbuilt",
        loc=("template", NAME),
        message="the template's optimizer has no variables for its state, or their order is not in the file",
        hint=f"Compile the model and run {_BUILD} before saving it.",
    )


def _take(lifter: Lifter, optimizer: Lifted, at: tuple[str, ...]) -> None:
    for one in optimizer.weights:
        number: dict[str, str | int | float | tuple[int, ...]] = {}
        if one.number is not None:
            number = {"as": "tensor", "dtype": one.number.dtype.name, "shape": one.number.shape}
        if one.was is not None:
            number["was"] = one.was
        lifter.take((*at, *one.path), one.to, **number)
    for one in optimizer.config:
        lifter.take(("config", *optimizer.at, *one.path), one.to)


def _extras(root: Node, lifter: Lifter) -> dict[str, TensorRef]:
    """Every array that nothing else took, by its path."""
    found = {}
    for path, leaf in walk(root):
        if isinstance(leaf, TensorRef) and not lifter.has(path):
            key = "/".join(map(str, path))
            found[key] = leaf
            lifter.take(path, ("extra", key))
    return found


def _params(model: Model) -> dict[str, Param]:
    return {
        one.name: Param(
            name=one.name,
            tensor=one.tensor,
            role=one.role,
            layer=one.layer,
            axes=one.axes,
            evidence=one.evidence,
            trainable=one.trainable,
        )
        for one in model.variables
    }


def _progress(optimizer: Lifted | None) -> Progress:
    if optimizer is None:
        return Progress(step=Unknown(reason="there is no optimizer in the file"))
    wrapped = "inner_optimizer" in optimizer.at
    scale: Fact = Absent(reason="the optimizer is not in a LossScaleOptimizer")
    if wrapped:
        scale = Unknown(reason="the scale is one of the extra arrays of the LossScaleOptimizer")
    return Progress(
        step=optimizer.optimizer.step,
        micro_steps=optimizer.micro_steps,
        accumulation=optimizer.accumulation,
        loss_scale=scale,
    )


def _settled(checkpoint: Checkpoint, root: Node) -> Checkpoint:
    """The document with one opinion of the step."""
    addresses = [leaf for _, leaf in walk(root) if isinstance(leaf, Address)]
    if any(leaf.to == ("progress", "micro_steps") for leaf in addresses):
        return with_micro_steps(checkpoint)
    was = next((leaf.encoding.get("was") for leaf in addresses if leaf.to[0] == "step"), None)
    if len(checkpoint.optimizers) != 1 or was is None:
        return checkpoint
    optimizer = checkpoint.optimizers[0]
    step = agreed(optimizer.step, checkpoint.progress.step, was)
    return replace(
        checkpoint,
        optimizers=(replace(optimizer, step=step),),
        progress=replace(checkpoint.progress, step=step),
    )


_CONFIG = ("config", "compile_config", NAME)
"""Where the optimizer's config stands."""


def _with_arguments(root: Node, checkpoint: Checkpoint) -> Node:
    """The residue whose config takes arguments that are null there and that the run has a value for."""
    if len(checkpoint.optimizers) != 1 or not checkpoint.optimizers[0].groups:
        return root
    optimizer = checkpoint.optimizers[0]
    known = row(optimizer.algorithm, "keras3")
    wanted: dict[str, Node] = {}
    for name, entry in known.hyperparameters.items() if known is not None else ():
        value = value_of(optimizer.groups[0].hyperparameters.get(name))
        neutral = known.neutral.get(name) if known is not None else None
        if entry.argument and isinstance(value, (bool, int, float)) and value != neutral:
            wanted[entry.argument] = Address(to=("hyperparameter", optimizer.name, 0, name))

    def put(path: tuple[str | int, ...], node: Node) -> Node:
        mine = node is None and path[:3] == _CONFIG and path[-2:-1] == ("config",)
        return wanted.get(str(path[-1])) if mine else node

    return transform(root, put)


KERAS: Mapping[str, KerasFile] = {
    "keras": KerasFile("keras", "whole Keras 3 model: model.save('x.keras')"),
    "weights-h5": KerasFile(
        "weights-h5", "Keras 3 weights and optimizer: model.save_weights('x.weights.h5')"
    ),
}
for _dialect in KERAS.values():
    register(_dialect)
