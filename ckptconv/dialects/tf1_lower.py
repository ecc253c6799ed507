"""From the document back to a name-based bundle: the residue's keys, `global_step` and powers rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ckptconv import dtypes
from ckptconv.dialects.beta_powers import power_after
from ckptconv.dialects.graph_lower import agreed
from ckptconv.dialects.graph_note import ATTRIBUTE, note_of
from ckptconv.dialects.residue import fill
from ckptconv.document import Checkpoint, value_of
from ckptconv.errors import CkptError, MappingError
from ckptconv.rawtree import DictNode, Lifted, Node, Path, RawTree, transform
from ckptconv.tensor import StoredTensor


def lower(checkpoint: Checkpoint, dialect: str) -> RawTree:
    """The bundle: the residue (own or the template's) with the document's values.

    Raises: template-required, template-mismatch, progress-conflict, hyperparameter-missing, and those of
    `residue.fill`.
    """
    residue = checkpoint.residue
    if residue is None or residue.format != "tensorflow":
        raise MappingError.of(
            "template-required",
            "a name-based bundle takes its variables' names from a checkpoint of the model's graph",
            "Build the graph with tf.compat.v1, initialize it, save it once with tf.compat.v1.train.Saver, "
            "and pass that file as --template.",
            loc=("residue",),
        )
    if residue.dialect != dialect:
        raise MappingError.of(
            "template-mismatch",
            f"the structure at hand is of the dialect '{residue.dialect}', asked for is '{dialect}'",
            "Pass a template of that dialect, or leave --to out.",
            loc=("residue",),
        )
    settled = _settled(checkpoint, residue.root)
    problems: list[CkptError] = []

    def power(path: Path, node: Node) -> Node:
        if not isinstance(node, Lifted) or "power" not in node.encoding:
            return node
        try:
            return _power(path, node, settled)
        except CkptError as error:
            problems.append(error)
            return node

    root = transform(residue.root, power)
    if problems:
        raise MappingError(*(problem for error in problems for problem in error.problems))
    return RawTree(
        format=residue.format,
        root=fill(root, settled),
        attributes={name: value for name, value in residue.attributes.items() if name != ATTRIBUTE},
        note=note_of(settled, residue),
    )


def _power(path: Path, node: Lifted, checkpoint: Checkpoint) -> Node:
    """A power of Adam's betas for the document's step; as it was where the step is the same."""
    told = node.encoding
    name, beta_name = str(node.to[1]), str(told["of"])
    try:
        optimizer = checkpoint.optimizer(name)
    except KeyError:
        raise MappingError.of(
            "reference-broken",
            f"'{path[0]}' follows the step of '{name}', which the document lacks",
            "The document was edited or the template is of another model: pass the matching one.",
            loc=path,
        ) from None
    step = value_of(optimizer.step)
    beta = value_of(optimizer.groups[0].hyperparameters.get(beta_name)) if optimizer.groups else None
    if beta is None:
        beta = told["beta"]
    if step == told["was"] and beta == told["beta"]:
        assert isinstance(told["power"], float)
        return _scalar(told["power"], str(told["dtype"]))
    if not isinstance(step, int) or step < 0:
        raise MappingError.of(
            "progress-unknown",
            f"'{path[0]}' is a power of the number of updates, which is {step}",
            "Pass --set step=N.",
            loc=path,
        )
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1:
        raise MappingError.of(
            "hyperparameter-missing",
            f"'{path[0]}' is {beta_name}^(step + 1), and {beta_name} is {beta}",
            f"Pass --set {beta_name}=VALUE, as the target's program has it.",
            loc=path,
        )
    return _scalar(float(power_after(step, float(beta))), str(told["dtype"]))


def _scalar(value: float, dtype: str) -> Node:
    return StoredTensor.of_array(np.array(value).astype(dtypes.BY_NAME[dtype].numpy))


def _settled(checkpoint: Checkpoint, root: Node) -> Checkpoint:
    """The document with one step, where the file counted the same in `global_step` and in the optimizer."""
    read = {node.to[0]: node.encoding["was"] for node in _lifted(root) if "was" in node.encoding}
    if len(checkpoint.optimizers) != 1 or "progress" not in read:
        return _one_step(checkpoint, read.get("step")) if "step" in read else checkpoint
    if read.get("step", read["progress"]) != read["progress"]:
        return checkpoint
    return _one_step(checkpoint, read["progress"])


def _one_step(checkpoint: Checkpoint, was: object) -> Checkpoint:
    if len(checkpoint.optimizers) != 1:
        return checkpoint
    optimizer = checkpoint.optimizers[0]
    step = agreed(optimizer.step, checkpoint.progress.step, was)
    return replace(
        checkpoint,
        optimizers=(replace(optimizer, step=step),),
        progress=replace(checkpoint.progress, step=step),
    )


def _lifted(root: Node) -> Iterator[Lifted]:
    if isinstance(root, DictNode):
        yield from (node for _, node in root.items if isinstance(node, Lifted))
