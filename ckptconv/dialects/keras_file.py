"""Keras' own files, `.keras` and `.weights.h5`: the model, its optimizer, and back.

`.keras` holds all that a run needs: names and kinds of layers (*declared*), class and arguments of the
optimizer (recorded, and rewritten with the values of the run that is written), counter, slots; the learning
rate is a variable in Keras 3 and stands in the config alone in tf_keras. A `.weights.h5` has no config: what
its groups' names tell is taken, the rest is not guessed.

What the files lack: epochs, data position, states of random generators. tf_keras saves nothing of a legacy
optimizer (`tf_keras.optimizers.legacy`): the config tells its class, counter and slots are lost.
See `keras_file_model`, `keras_file_optimizer`.

Covered: keras 3.0 to 3.15, tf_keras 2.21 and keras 2.12 to 2.15.
Source: keras 3.15.1 `keras/src/saving/saving_lib.py`, tf_keras 2.21 `tf_keras/src/saving/saving_lib.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.keras_config import flags, model_layer, plain_class, text
from ckptconv.dialects.keras_file_base import KERAS3, TF_KERAS, KerasFile, Parts, no_model
from ckptconv.dialects.keras_file_groups import model_by_groups, told
from ckptconv.dialects.keras_file_model import VARS, below, declared_model, numbered
from ckptconv.dialects.keras_file_stored import INNER, NAME, Path, Stored
from ckptconv.document import Checkpoint
from ckptconv.rawtree import DictNode, Node, RawTree, walk
from ckptconv.tensor import TensorRef


class ModelFile(KerasFile):
    """`.keras`: weights, config and the version that wrote them."""

    optimizer_config = ("config", "compile_config", NAME)
    optimizer_variables = f"weights/{NAME}/{VARS}/"

    def detect(self, raw: RawTree) -> Detection | None:
        """By the recorded version."""
        version = text(below(raw.root, "metadata", "keras_version"))
        if not version.startswith(_MAJOR[self.name]):
            return None
        return Detection(score=100, evidence=f"saved by Keras {version}")

    def parts(self, raw: RawTree) -> Parts:
        framework = self.generation.framework
        weights, config = below(raw.root, "weights"), below(raw.root, "config")
        if not isinstance(weights, DictNode):
            raise no_model(raw)
        declared = below(config, *self.optimizer_config[1:])
        stored = _stored(weights, ("weights",), framework, declared, self.optimizer_config)
        unsaved = stored is None and declared is not None
        legacy = unsaved and "legacy" in text(_innermost(declared).get("module"))
        return Parts(
            model=model_by_groups(weights, framework)
            if (whole := model_layer(config)) is None
            else declared_model(weights, whole, framework),
            at=("weights",),
            optimizer=stored,
            version=text(below(raw.root, "metadata", "keras_version")),
            unsaved=_class_said(declared) if unsaved else "",
            lacking=_LEGACY if legacy else "",
        )

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        return f"import {self.generation.package}\n\nmodel = {self.generation.load}({target!r})"


class WeightsFile(KerasFile):
    """`.weights.h5`: groups of numbered variables."""

    optimizer_variables = f"{NAME}/{VARS}/"

    def detect(self, raw: RawTree) -> Detection | None:
        """By what only one generation writes: names of groups (Keras 3.6), metrics (tf_keras)."""
        root = raw.root
        groups = {path[:-1]: node for path, node in walk(root) if len(path) > 1 and path[-2] == VARS}
        if not groups or not isinstance(root, DictNode):
            return None
        second = below(root, NAME, VARS, "1")
        if "metrics" in root:
            found = (TF_KERAS, 70, "only tf_keras saves the model's metrics")
        elif any(told(below(root, *map(str, path))) for path in groups):
            found = (KERAS3, 70, "groups of variables say the names of their layers")
        elif isinstance(second, TensorRef) and second.shape != ():
            found = (TF_KERAS, 50, "the optimizer has no learning rate among its variables")
        else:
            found = (KERAS3, 60, "groups 'vars' of numbered variables")
        generation, score, evidence = found
        return Detection(score=score, evidence=evidence) if generation is self.generation else None

    def parts(self, raw: RawTree) -> Parts:
        if not isinstance(raw.root, DictNode):
            raise no_model(raw)
        framework = self.generation.framework
        return Parts(
            model=model_by_groups(raw.root, framework),
            at=(),
            optimizer=_stored(raw.root, (), framework, None, ()),
            version="",
        )

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        return self.loading_weights(checkpoint, target)


def _stored(weights: DictNode, at: Path, framework: str, declared: Node, config: Path) -> Stored | None:
    """The optimizer of a file's groups; of a wrapper the one inside it."""
    outer, inner = (NAME, VARS), (NAME, INNER, VARS)
    rows = {where: numbered(below(weights, *where)) for where in (inner, outer)}
    where = inner if rows[inner] else outer
    if not rows[where]:
        return None
    own = len(rows[outer]) - len(rows[inner]) if where == inner else 0
    same = [one.spec for _, one in rows[outer][own:]] == [one.spec for _, one in rows[inner]]
    return Stored(
        framework=framework,
        variables=tuple(((*at, *where, number), tensor) for number, tensor in rows[where]),
        again=(tuple((*at, *outer, number) for number, _ in rows[outer][own:]),)
        if where == inner and same and own >= 0
        else (),
        scaler=tuple(((*at, *outer, number), tensor) for number, tensor in rows[outer][: max(own, 0)]),
        config=declared,
        at=config,
        scope=told(below(weights, *where)),
    )


def _innermost(declared: Node) -> Mapping[str, Node]:
    found = flags(declared)
    while isinstance(inner := flags(found.get("config")).get(INNER), DictNode):
        found = flags(inner)
    return found


def _class_said(declared: Node) -> str:
    return plain_class(declared) if isinstance(declared, DictNode) else text(declared)


_LEGACY = "a legacy optimizer is not saved in .keras: its counter and slots are lost"

_MAJOR = {KERAS3.name: "3.", TF_KERAS.name: "2."}
"""Generation -> what the versions begin with that its files record."""

for _dialect in (
    ModelFile("keras", KERAS3, "whole Keras 3 model: model.save('x.keras')"),
    ModelFile("keras", TF_KERAS, "whole tf_keras model: model.save('x.keras')"),
    WeightsFile("weights-h5", KERAS3, "Keras 3 weights and optimizer: model.save_weights('x.weights.h5')"),
    WeightsFile("weights-h5", TF_KERAS, "tf_keras weights and optimizer: model.save_weights('x.weights.h5')"),
):
    register(_dialect)
