"""What the dialects of Keras' own files share: lifting a model and its optimizer, and writing them back.

A dialect says where the parts of a file stand (`parts`); names, axes and order of the model's variables are
the business of `keras_file_model` or `h5_model`, the optimizer's that of `keras_file_optimizer`. A file is
written by filling the structure of the same file, or of a template, with a document's values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ckptconv.catalog.optimizers import row
from ckptconv.dialects.base import Detection
from ckptconv.dialects.graph_lower import agreed, with_micro_steps
from ckptconv.dialects.graph_note import ATTRIBUTE, note_of, with_note
from ckptconv.dialects.keras_file_model import Model
from ckptconv.dialects.keras_file_optimizer import Lifted, lift_optimizer
from ckptconv.dialects.keras_file_schedule import with_schedule
from ckptconv.dialects.keras_file_stored import NAME, Path, Stored
from ckptconv.dialects.residue import Lifter, fill
from ckptconv.document import (
    Block,
    Checkpoint,
    Param,
    Progress,
    Provenance,
    Residue,
    Unknown,
    module_of,
    value_of,
)
from ckptconv.errors import FormatError, MappingError, Problem
from ckptconv.rawtree import Lifted as Address
from ckptconv.rawtree import Node, RawTree, transform, walk
from ckptconv.tensor import TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generation of Keras and its optimizers."""

    name: str
    """Of the dialect."""
    framework: str
    package: str
    """What its users import."""
    load: str
    """The function that reads a whole model."""
    build: str = "model.optimizer.build(model.trainable_variables)"
    """What gives a compiled model's optimizer its variables."""


KERAS3 = Generation(name="keras3", framework="keras3", package="keras", load="keras.saving.load_model")
TF_KERAS = Generation(
    name="tf-keras", framework="tf_keras", package="tf_keras", load="tf_keras.models.load_model"
)
TF_KERAS_LEGACY = Generation(
    name="tf-keras-legacy",
    framework="tf_keras_legacy",
    package="tf_keras",
    load="tf_keras.models.load_model",
    build="model.optimizer._create_all_weights(model.trainable_variables)",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a file consists of."""

    model: Model
    at: Path
    """Where the root of the weights stands."""
    optimizer: Stored | None
    version: str
    unsaved: str = ""
    """Class of an optimizer that the file declares and has no variable of."""
    lacking: str = ""
    """Why there is no step, where there is no optimizer."""
    oddities: tuple[str, ...] = ()


class KerasFile:
    """A dialect of one generation in one format."""

    needs_template = True
    save_counter: str | None = None
    optimizer_config: Path = ()
    """Where the optimizer's config stands, in formats that have one."""
    optimizer_variables: str
    """What the keys of the optimizer's variables begin with."""

    def __init__(self, format_name: str, generation: Generation, summary: str) -> None:
        self.format = format_name
        self.name = generation.name
        self.framework: str | None = generation.framework
        self.generation = generation
        self.summary = summary

    def detect(self, raw: RawTree) -> Detection | None:
        """Whether this generation wrote the file."""
        raise NotImplementedError

    def parts(self, raw: RawTree) -> Parts:
        """Model, optimizer and version of a file.

        Raises: unknown-dialect, corrupt-file.
        """
        raise NotImplementedError

    def lift(self, raw: RawTree) -> Checkpoint:
        """The run. I/O: reads the optimizer's numbers.

        Raises: corrupt-file, unknown-dialect, and those of the embedded note.
        """
        detected = self.detect(raw)
        parts = self.parts(raw)
        model, optimizer = parts.model, None
        if parts.optimizer is not None:
            optimizer = lift_optimizer(parts.optimizer, model.variables, ordered=model.ordered)
        lifter = Lifter(raw.root)
        for one in model.variables:
            lifter.take((*parts.at, *one.path), ("param", one.name))
        if optimizer is not None:
            _take(lifter, optimizer)
        extras = _extras(raw.root, lifter)
        checkpoint = Checkpoint(
            progress=_progress(optimizer, parts),
            params=_params(model),
            layer_settings={module_of(one.name): one.settings for one in model.variables if one.settings},
            optimizers=() if optimizer is None else (optimizer.optimizer,),
            schedules=() if optimizer is None or optimizer.schedule is None else (optimizer.schedule,),
            loss_scaling={} if optimizer is None else optimizer.loss_scaling,
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
                producer=f"{self.generation.package} {parts.version}" if parts.version else "",
            ),
            oddities=(
                *(() if optimizer is None else optimizer.oddities),
                *_unsaved(parts),
                *parts.oddities,
                *model.oddities,
            ),
        )
        return with_note(checkpoint, raw.note)

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
                f"Build and compile the model in {self.generation.package}, run {self.generation.build}, "
                "save it, and pass that as --template.",
                loc=("residue",),
            )
        lifted = {leaf.to[0] for _, leaf in walk(residue.root) if isinstance(leaf, Address)}
        if any(one.slots for one in checkpoint.optimizers) and "slot" not in lifted:
            raise MappingError(self._unbuilt())
        settled = _settled(checkpoint, residue.root)
        told = self._with_arguments(residue.root, settled)
        root = fill(with_schedule(told, settled, self.optimizer_config), settled)
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
            known = row(optimizer.algorithm, optimizer.framework)
            values = {k: value_of(fact) for k, fact in optimizer.groups[0].hyperparameters.items()}
            unresolved = any(key.startswith(self.optimizer_variables) for key in template.extras)
            if known is not None and known.slots_present(values) and not optimizer.slots and not unresolved:
                return (self._unbuilt(),)
        return ()

    def _unbuilt(self) -> Problem:
        return Problem(
            code="template-unbuilt",
            loc=("template", NAME),
            message="the template's optimizer has no variables for its state, or their order is unknown",
            hint=f"Compile the model and run {self.generation.build} before saving it.",
        )

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """Lines that load the file whole, or into a model whose optimizer is built."""
        raise NotImplementedError

    def loading_weights(self, checkpoint: Checkpoint, target: str) -> str:
        """Lines that load weights into a model of the user's."""
        build = f"{self.generation.build}\n" if checkpoint.optimizers else ""
        return f"{build}model.load_weights({target!r})"

    def _with_arguments(self, root: Node, checkpoint: Checkpoint) -> Node:
        """The residue whose config takes arguments that are null there and that the run has a value for."""
        if len(checkpoint.optimizers) != 1 or not checkpoint.optimizers[0].groups:
            return root
        optimizer = checkpoint.optimizers[0]
        known = row(optimizer.algorithm, optimizer.framework)
        wanted: dict[str, Node] = {}
        for name, entry in known.hyperparameters.items() if known is not None else ():
            value = value_of(optimizer.groups[0].hyperparameters.get(name))
            neutral = known.neutral.get(name) if known is not None else None
            if entry.argument and isinstance(value, (bool, int, float)) and value != neutral:
                wanted[entry.argument] = Address(to=("hyperparameter", optimizer.name, 0, name))
        begin, count = self.optimizer_config, len(self.optimizer_config)

        def put(path: tuple[str | int, ...], node: Node) -> Node:
            mine = node is None and count and path[:count] == begin and path[-2:-1] == ("config",)
            return wanted.get(str(path[-1])) if mine else node

        return transform(root, put)


def _take(lifter: Lifter, optimizer: Lifted) -> None:
    for one in optimizer.taken:
        number: dict[str, str | int | float | tuple[int, ...]] = {}
        if one.number is not None:
            number = {"as": "tensor", "dtype": one.number.dtype.name, "shape": one.number.shape}
        if one.was is not None:
            number["was"] = one.was
        if one.nullable:
            number["nullable"] = True
        lifter.take(one.path, one.to, **number)


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
            candidates=one.candidates,
            trainable=one.trainable,
        )
        for one in model.variables
    }


def _progress(optimizer: Lifted | None, parts: Parts) -> Progress:
    if optimizer is None:
        return Progress(step=Unknown(reason=parts.lacking or "there is no optimizer in the file"))
    return Progress(
        step=optimizer.optimizer.step,
        micro_steps=optimizer.micro_steps,
        accumulation=optimizer.accumulation,
        loss_scale=optimizer.loss_scale,
    )


def _unsaved(parts: Parts) -> tuple[str, ...]:
    if not parts.unsaved:
        return ()
    said = f"the config declares the optimizer {parts.unsaved}, and the file has none of its variables"
    return (f"{said}: {parts.lacking}" if parts.lacking else said,)


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


def no_model(raw: RawTree) -> FormatError:
    """The error for a file without a model."""
    error = FormatError.of(
        "unknown-dialect",
        f"'{raw.location}' holds no weights of a model",
        "See it with 'ckptconv inspect --raw'.",
        loc=(raw.location,),
    )
    assert isinstance(error, FormatError)
    return error
