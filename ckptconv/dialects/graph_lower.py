"""From the document back to the bundle of an object graph: the residue filled, every counter rewritten.

An optimizer's step stands in the document twice, in its own record and as the run's progress; whoever edits
one of them means both. The residue remembers what was read, so the edited one is known; two different edits
are a conflict. A template whose optimizer has no variables yet has no place for slots: that is said, with
the lines that make them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckptconv.dialects.graph_bundle import graph_of_bytes
from ckptconv.dialects.graph_export import lists_of_export
from ckptconv.dialects.graph_note import ATTRIBUTE, note_of
from ckptconv.dialects.keras_optimizers import Generation, OptimizerNode, optimizer_nodes, optimizers
from ckptconv.dialects.object_paths import Graph
from ckptconv.dialects.residue import fill
from ckptconv.document import Checkpoint, Fact, Known, Optimizer, Residue, value_of
from ckptconv.errors import MappingError, Problem
from ckptconv.formats.object_graph import OBJECT_GRAPH_KEY
from ckptconv.formats.string_tensor import of_strings
from ckptconv.rawtree import DictNode, Lifted, Node, RawTree

_BUILD_MODEL = "model.build(input_shape)"
_BUILD_OPTIMIZER: dict[Generation, str] = {
    "keras3": "optimizer.build(model.trainable_variables)",
    "tf_keras": "optimizer.build(model.trainable_variables)",
    "tf_keras_legacy": "optimizer._create_all_weights(model.trainable_variables)",
}
"""What makes the optimizer's variables; of a legacy one without a training step nothing public does."""
_SERVED = """import tensorflow as tf

model = tf.saved_model.load(folder)  # the exported SavedModel
tf.train.Checkpoint(model).read({target!r}).assert_consumed()"""


def lower(checkpoint: Checkpoint, dialect: str) -> RawTree:
    """The bundle: the residue (own or the template's) with the document's values.

    Raises: template-required, template-mismatch, template-unbuilt, progress-conflict, residue-stale, and
    those of `residue.fill`.
    """
    residue = checkpoint.residue
    if residue is None or residue.format != "tensorflow":
        raise MappingError.of(
            "template-required",
            f"a bundle of the dialect '{dialect}' takes its object graph from a checkpoint of the model",
            "Build model and optimizer in the target's framework, save them once with tf.train.Checkpoint, "
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
    problems = [problem for problem in unbuilt(checkpoint) if _matters(problem, checkpoint, residue)]
    if problems:
        raise MappingError(*problems)
    settled = _settled(checkpoint, residue.root)
    filled = fill(residue.root, settled)
    assert isinstance(filled, DictNode)
    items: list[tuple[Node, Node]] = [
        (key, of_strings([node]) if key == OBJECT_GRAPH_KEY and isinstance(node, bytes) else node)
        for key, node in filled.items
    ]
    return RawTree(
        format=residue.format,
        root=replace(filled, items=tuple(items)),
        attributes={name: value for name, value in residue.attributes.items() if name != ATTRIBUTE},
        note=note_of(settled, residue),
    )


def unbuilt(checkpoint: Checkpoint) -> tuple[Problem, ...]:
    """What a template lacks because it was saved before model and optimizer had variables.

    Raises: template-unbuilt never; it returns those problems, each with the lines that make the variables.
    """
    residue = checkpoint.residue
    if residue is None or not isinstance(residue.root, DictNode):
        return ()
    data = residue.root.get(OBJECT_GRAPH_KEY)
    if not isinstance(data, bytes):
        return ()
    problems = []
    if not checkpoint.params:
        problems.append(
            _unbuilt(
                "params", "the template's model has no variables", f"Run {_BUILD_MODEL} before saving it."
            )
        )
    graph = graph_of_bytes(data)
    shapes: dict[int, tuple[int, ...]] = dict.fromkeys(graph.variables, ())
    known = optimizer_nodes(graph)
    empty = [edge for edge, child in graph.children[0] if "optimizer" in edge and _is_empty(graph, child)]
    for edge in empty:
        problems.append(_unbuilt_optimizer(edge, "tf_keras_legacy"))
    if not known or not checkpoint.optimizers:
        return tuple(problems)
    named = {optimizer.name: optimizer for optimizer in checkpoint.optimizers}
    for node in optimizers(graph, (), shapes):
        name = "optimizer" if len(named) == 1 and "optimizer" in named else "/".join(node.path)
        optimizer = named.get(name)
        if optimizer is not None and _lacks_variables(node, optimizer):
            problems.append(_unbuilt_optimizer(name, node.generation))
    return tuple(problems)


def is_built(checkpoint: Checkpoint) -> bool:
    """Whether a template has a place for everything that its model and optimizer keep."""
    return not unbuilt(checkpoint)


def _is_empty(graph: Graph, node: int) -> bool:
    return (
        not graph.children[node]
        and node not in graph.variables
        and not graph.graph.nodes[node].slot_variables
    )


def _lacks_variables(node: OptimizerNode, optimizer: Optimizer) -> bool:
    """Whether the optimizer would have slots if it were built."""
    if node.generation != "tf_keras_legacy":
        return not node.built
    momentum = value_of(optimizer.groups[0].hyperparameters.get("momentum")) if optimizer.groups else None
    return not node.slots and (not node.built or "beta_1" in node.scalars or bool(momentum))


def _unbuilt_optimizer(name: str, generation: Generation) -> Problem:
    return _unbuilt(
        name,
        f"the template's optimizer '{name}' has no variables for its state",
        f"Run {_BUILD_OPTIMIZER[generation]} (after {_BUILD_MODEL}) before saving the template.",
    )


def _unbuilt(where: str, message: str, hint: str) -> Problem:
    return Problem(code="template-unbuilt", loc=("template", where), message=message, hint=hint)


def _matters(problem: Problem, checkpoint: Checkpoint, residue: Residue) -> bool:
    """Whether the document has something for the missing place; an unbuilt run goes back as it was."""
    lifted = {node.to[0] for node in _lifted(residue.root)}
    if problem.loc[1] == "params":
        return bool(checkpoint.params) and "param" not in lifted
    return any(optimizer.slots for optimizer in checkpoint.optimizers) and "slot" not in lifted


def _lifted(root: Node) -> Iterator[Lifted]:
    if isinstance(root, DictNode):
        yield from (node for _, node in root.items if isinstance(node, Lifted))


def _settled(checkpoint: Checkpoint, root: Node) -> Checkpoint:
    """The document with one opinion of each counter."""
    micro = any(node.to == ("progress", "micro_steps") for node in _lifted(root))
    if micro:
        checkpoint = with_micro_steps(checkpoint)
    read = {
        str(node.to[1]): node.encoding["was"]
        for node in _lifted(root)
        if node.to[0] == "step" and "was" in node.encoding
    }
    if len(checkpoint.optimizers) != 1 or not read:
        return checkpoint
    optimizer = checkpoint.optimizers[0]
    step = agreed(optimizer.step, checkpoint.progress.step, read.get(optimizer.name))
    return replace(
        checkpoint,
        optimizers=(replace(optimizer, step=step),),
        progress=replace(checkpoint.progress, step=step),
    )


def agreed(own: Fact, progress: Fact, was: object) -> Fact:
    """The optimizer's and the run's step made one: the edited one wins."""
    mine, theirs = value_of(own), value_of(progress)
    if theirs is None or mine == theirs:
        return own
    if mine is None or mine == was:
        return progress
    if theirs == was:
        return own
    raise MappingError.of(
        "progress-conflict",
        f"the optimizer's step is {mine}, the run's is {theirs}, and the file said {was}",
        "Edit both alike, or one of them.",
        loc=("progress", "step"),
    )


def with_micro_steps(checkpoint: Checkpoint) -> Checkpoint:
    """The count of batches that fits the count of updates, where gradients are accumulated.

    Raises: residue-stale where a changed step cannot be written without the number of batches per update.
    """
    progress = checkpoint.progress
    micro, step, per_update = (
        value_of(fact) for fact in (progress.micro_steps, progress.step, progress.accumulation)
    )
    if not isinstance(step, int):
        return checkpoint
    if isinstance(per_update, int) and per_update > 0:
        if not isinstance(micro, int) or micro // per_update != step:
            micro_fact = Known(
                value=step * per_update,
                status="derived",
                formula="step * accumulation",
                source="progress.step",
            )
            return replace(checkpoint, progress=replace(progress, micro_steps=micro_fact))
        return checkpoint
    if isinstance(micro, int) and not _possible(micro, step):
        raise MappingError.of(
            "residue-stale",
            f"the optimizer counts {micro} batches: no number per update makes that {step} updates",
            "Pass --set accumulation=N (gradient_accumulation_steps), or --set micro_steps=N.",
            loc=("progress", "micro_steps"),
        )
    return checkpoint


def _possible(micro: int, step: int) -> bool:
    """Whether `micro // k == step` for some k."""
    return micro < 1 if step == 0 and micro < 1 else step == 0 or micro // (step + 1) < micro // step


def restore_lines(checkpoint: Checkpoint, target: str, generation: Generation | None) -> str:
    """Python that restores the written bundle, with the keywords that its root has."""
    residue = checkpoint.residue
    data = residue.root.get(OBJECT_GRAPH_KEY) if residue and isinstance(residue.root, DictNode) else None
    if not isinstance(data, bytes):
        return ""
    graph = graph_of_bytes(data)
    if lists_of_export(graph):
        return _SERVED.format(target=target)
    found = optimizer_nodes(graph)
    arguments, build = [], []
    if graph.root_is_model:
        arguments.append("model")
    for edge, child in graph.children[0]:
        if edge in ("save_counter", "root") or (graph.root_is_model and child not in found):
            continue
        if child in graph.variables:
            tensor = checkpoint.lookup(_address(residue, graph.variables[child].key))
            dtype = getattr(getattr(tensor, "dtype", None), "name", "int64")
            arguments.append(f"{edge}=tf.Variable(0, dtype=tf.{dtype})")
        elif not graph.root_is_model:
            arguments.append(f"{edge}={edge}")
            if child in found and generation is not None:
                build.append(_BUILD_OPTIMIZER[generation].replace("optimizer.", f"{edge}."))
    how = "restore" if graph.child(0, "save_counter") is not None else "read"
    lines = ["import tensorflow as tf", "", *build]
    lines.append(f"checkpoint = tf.train.Checkpoint({', '.join(arguments)})")
    lines.append(f"checkpoint.{how}({target!r}).assert_consumed()")
    return "\n".join(lines)


def _address(residue: Residue | None, key: str) -> tuple[str | int, ...]:
    node = residue.root.get(key) if residue and isinstance(residue.root, DictNode) else None
    return node.to if isinstance(node, Lifted) else ("extra", key)
