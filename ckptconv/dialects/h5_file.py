"""The `.h5` files of Keras: a whole model with its optimizer, or weights alone; and back.

The model's config, the optimizer's class and arguments, and the learning rate of tf_keras stand in JSON texts
(recorded, and rewritten with the values of the run that is written); names and order in arrays of names.

    keras3            Keras 3, `model.save('x.h5')`
    tf-keras          Keras 2.11 to 2.15, tf_keras: the counter is `iteration`, slots parameter by parameter
    tf-keras-legacy   Keras 2.0 to 2.10, `tf_keras.optimizers.legacy`: the counter is `iter`, or `iterations`
                      before 2.4; slots one after the other

What the files lack: epochs, data position; in weights alone the optimizer. Keras before 2.3 keeps no counter
of RMSprop, Adagrad and Adadelta, and none of Nadam's product.

Source: keras 3.15.1 `keras/src/legacy/saving`, tf_keras 2.21 `tf_keras/src/saving/legacy/hdf5_format.py`,
keras 2.0.9 to 2.3.1 `keras/engine/saving.py`, `keras/optimizers.py`.
"""

from __future__ import annotations

import re

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.h5_model import leaf_of, model_of, names_of, stored_in
from ckptconv.dialects.keras_config import flags, model_layer, plain_class, text
from ckptconv.dialects.keras_file_base import (
    KERAS3,
    TF_KERAS,
    TF_KERAS_LEGACY,
    Generation,
    KerasFile,
    Parts,
    no_model,
)
from ckptconv.dialects.keras_file_model import below
from ckptconv.dialects.keras_file_stored import INNER, Path, Stored
from ckptconv.document import Checkpoint
from ckptconv.rawtree import DictNode, Node, RawTree

_WEIGHTS, _STATE = "model_weights", "optimizer_weights"
_CONFIG = ("training_config", "optimizer_config")
_COUNTERS = re.compile(r"iter(ations?)?(_\d+)?")
_OUTER = {KERAS3.framework: 4}
"""Variables of a LossScaleOptimizer of its own, before those of the optimizer inside it."""


_SLOTS = """
import h5py

optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
optimizer.build(model.trainable_variables)
with h5py.File({target!r}) as file:
    state = file["optimizer_weights"]
    optimizer.set_weights([state[name][()] for name in state.attrs["weight_names"]])
model.optimizer = optimizer"""
"""What makes up for Keras 3, whose `load_model` builds the optimizer of an `.h5` for no parameters."""
_LOST = "load_model of Keras 3 restores the counter of an .h5 and leaves its slots out"


class H5File(KerasFile):
    """A dialect of the format `h5`."""

    optimizer_config = _CONFIG
    optimizer_variables = f"{_STATE}/"

    def detect(self, raw: RawTree) -> Detection | None:
        """By the recorded version, and the optimizer's names or config."""
        root = raw.root
        if not isinstance(root, DictNode):
            return None
        version = _version(root)
        generation, why = (KERAS3, "") if version.startswith("3.") else _older(root)
        if generation is not self.generation:
            return None
        said = (
            f"saved by Keras {version}" if version else "no version: saved by Keras before 2.0, or by others"
        )
        return Detection(score=100 if version else 40, evidence=said + why)

    def parts(self, raw: RawTree) -> Parts:
        root = raw.root
        if not isinstance(root, DictNode):
            raise no_model(raw)
        whole = isinstance(root.get(_WEIGHTS), DictNode)
        at: Path = (_WEIGHTS,) if whole else ()
        weights = below(root, *at)
        if not isinstance(weights, DictNode):
            raise no_model(raw)
        framework = self.generation.framework
        declared = below(root, *_CONFIG)
        stored = _stored(root, framework, declared)
        unsaved = stored is None and isinstance(declared, DictNode)
        lacking = "" if whole else "the file holds weights alone, as save_weights('x.h5') writes them"
        return Parts(
            model=model_of(weights, at, model_layer(root.get("model_config")), framework),
            at=at,
            optimizer=stored,
            version=_version(root),
            unsaved=plain_class(declared) if unsaved and isinstance(declared, DictNode) else "",
            lacking="it had done no update when the model was saved" if unsaved else lacking,
            oddities=(_LOST,) if stored is not None and self.generation is KERAS3 else (),
        )

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`load_model` of a whole model, else `load_weights`."""
        residue = checkpoint.residue
        if residue is None or not isinstance(residue.root, DictNode) or "model_config" not in residue.root:
            return f"model.load_weights({target!r})"
        load = f"import {self.generation.package}\n\nmodel = {self.generation.load}({target!r})"
        slots = any(optimizer.slots for optimizer in checkpoint.optimizers)
        return load + _SLOTS.format(target=target) if slots and self.generation is KERAS3 else load


def _version(root: DictNode) -> str:
    for group in (root, root.get(_WEIGHTS)):
        state = group.state if isinstance(group, DictNode) else None
        told = state.get("keras_version") if isinstance(state, DictNode) else None
        if isinstance(told, bytes):
            told = told.decode("utf-8", "replace")
        if text(told):
            return text(told)
    return ""


def _older(root: DictNode) -> tuple[Generation, str]:
    """Which generation of optimizers a file of Keras 2 has."""
    names = names_of(root.get(_STATE), "weight_names", (_STATE,))
    if names:
        first = leaf_of(tuple(names[0].split("/")))
        return (
            TF_KERAS if first == "iteration" else TF_KERAS_LEGACY
        ), f"; its optimizer begins with '{names[0]}'"
    declared = flags(below(root, *_CONFIG))
    if not declared:
        return TF_KERAS, ""
    arguments = flags(declared.get("config"))
    newer = "is_legacy_optimizer" in arguments or isinstance(arguments.get(INNER), DictNode)
    return (TF_KERAS if newer else TF_KERAS_LEGACY), "; by its optimizer's arguments"


def _stored(root: DictNode, framework: str, declared: Node) -> Stored | None:
    """The optimizer; of a wrapper the one inside it. Raises: corrupt-file."""
    group = root.get(_STATE)
    variables = stored_in(group, (_STATE,), (_STATE,))
    wrapped = isinstance(flags(flags(declared).get("config")).get(INNER), DictNode)
    variables = variables[_OUTER.get(framework, 0) if wrapped else 0 :]
    if not variables:
        return None
    path, first = variables[0]
    whole = first.spec.numel == 1 and first.dtype.kind in ("int", "uint")
    return Stored(
        framework=framework,
        variables=tuple(variables),
        config=declared,
        at=_CONFIG,
        scope=path[-2] if len(path) > 2 else "",
        counter=whole or _COUNTERS.fullmatch(leaf_of(path)) is not None,
    )


for _dialect in (
    H5File("h5", KERAS3, "Keras 3 model in HDF5: model.save('x.h5')"),
    H5File("h5", TF_KERAS, "tf_keras model (TF >= 2.11) or weights in HDF5: model.save('x.h5')"),
    H5File("h5", TF_KERAS_LEGACY, "Keras 2.0 to 2.10 model, or legacy optimizer, in HDF5"),
):
    register(_dialect)
