"""From the bundle of a TensorFlow object graph to the document: shared by its four dialects.

Nothing is named by its key; everything by where the graph's edges put it. What no rule knows stays as an
extra array under its key. The graph itself stays in the residue, as the bytes that were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptconv.dialects.graph_bundle import Bundle, open_bundle
from ckptconv.dialects.graph_export import export_of, lists_of_export, with_names
from ckptconv.dialects.graph_model import (
    ModelVariables,
    Place,
    aliases,
    model_variables,
    param_names,
    readings,
    with_untracked,
)
from ckptconv.dialects.graph_note import with_note
from ckptconv.dialects.graph_optimizer import STATISTICS, lift_optimizer
from ckptconv.dialects.graph_progress import progress_of, scaling_of, user_counters
from ckptconv.dialects.keras_layers import Reading
from ckptconv.dialects.keras_optimizers import optimizer_nodes, optimizers
from ckptconv.dialects.object_paths import Reach, reach
from ckptconv.dialects.saved_model_classes import with_classes
from ckptconv.document import Block, Checkpoint, Param, Provenance, Residue
from ckptconv.formats.object_graph import OBJECT_GRAPH_KEY
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.tensor import TensorRef

_LAYERS_OF = {"keras3": "keras3", "tf_keras": "tf_keras", "tf_keras_legacy": "tf_keras"}


def lift(raw: RawTree, dialect: str, evidence: str, layers: str | None = None) -> Checkpoint:
    """The document of a bundle with an object graph.

    `layers`: column of the layer catalog; None: that of the optimizer's generation, or no layers at all.
    I/O: reads the object graph and the counters.
    Raises: unknown-dialect without an object graph; reference-broken, corrupt-file, order-ambiguous.
    """
    bundle, data = open_bundle(raw)
    graph = bundle.graph
    tensors = {node: bundle.tensor(node) for node in graph.variables}
    shapes = {node: tensor.shape for node, tensor in tensors.items()}
    export = export_of(graph, tensors, layers) if layers is not None else None
    lists = frozenset[int]() if export is None else lists_of_export(graph)
    found = reach(graph, frozenset(optimizer_nodes(graph)) | lists)
    sorted_out = model_variables(graph, found) if export is None else export.model
    nodes = optimizers(graph, sorted_out.params, shapes)
    trained = {variable for node in nodes for variable in node.variables}
    sorted_out = _claimed(sorted_out, trained)
    params = with_untracked(sorted_out.params, nodes)
    others = aliases(graph, found, params)
    named = param_names(graph, found, params, others, nodes)
    if export is not None:
        trained |= export.trained
        named.update(export.names.items())
    column = layers or (_LAYERS_OF[nodes[0].generation] if nodes else None)
    read = dict.fromkeys(params, Reading())
    if column is not None:
        read = readings(graph, found, params, named, shapes, column)
        read = with_classes(raw, graph, found, shapes, read, column)
    if export is not None and column is not None:
        read = with_names(read, export.names, column)
    documents = _params(bundle, params, others, named, read, trained)
    for copy, node in export.copies.items() if export is not None else ():
        if node in named:
            bundle.take(copy, ("param", named[node]))
    lifted = [lift_optimizer(bundle, node, nodes, named, params, read) for node in nodes]
    progress = progress_of(bundle, nodes, [one.optimizer for one in lifted])
    user = user_counters(bundle, [one.optimizer for one in lifted], sorted_out.user)
    scaling = scaling_of(bundle, nodes)
    extras = _extras(bundle)
    blocks = tuple(
        Block(name=bundle.source(node), library="tensorflow", tensors=(bundle.key(node),))
        for node in sorted_out.generators
    )
    root = bundle.lifter.residue()
    assert isinstance(root, DictNode)
    items = tuple((key, data if key == OBJECT_GRAPH_KEY else node) for key, node in root.items)
    checkpoint = Checkpoint(
        progress=user.apply(progress),
        params=documents,
        optimizers=tuple(one.optimizer for one in lifted),
        schedules=tuple(one.schedule for one in lifted if one.schedule is not None),
        loss_scaling=scaling,
        rng=blocks,
        extras=extras,
        residue=Residue(
            format=raw.format,
            dialect=dialect,
            root=replace(root, items=items),
            attributes=raw.attributes,
        ),
        provenance=Provenance(
            format=raw.format,
            dialect=dialect,
            evidence=evidence,
            source=raw.location.replace("\\", "/").rpartition("/")[2],
        ),
        oddities=(
            *(said for one in lifted for said in one.oddities),
            *user.oddities,
            *(_oddities(found, params, named, read) if export is None else export.said),
        ),
    )
    return with_note(checkpoint, raw.note)


def _claimed(sorted_out: ModelVariables, trained: set[int]) -> ModelVariables:
    """A variable beside the model that an optimizer trains is a parameter."""
    mine = tuple(node for node in sorted_out.user.values() if node in trained)
    user = {edge: node for edge, node in sorted_out.user.items() if node not in trained}
    return replace(sorted_out, params=(*sorted_out.params, *mine), user=user)


def _params(
    bundle: Bundle,
    params: Sequence[int],
    others: Mapping[tuple[int, str], int],
    named: Mapping[Place, str],
    read: Mapping[int, Reading],
    trained: set[int],
) -> dict[str, Param]:
    more: dict[int, list[str]] = {}
    for place, node in others.items():
        more.setdefault(node, []).append(named[place])
    result: dict[str, Param] = {}
    for node in params:
        reading, tensor, name = read[node], bundle.tensor(node), named[node]
        trainable: bool | None = None
        if node in trained:
            trainable = True
        elif trained or reading.role in STATISTICS:
            trainable = False
        param = Param(
            name=name,
            tensor=tensor,
            role=reading.role,
            layer=reading.layer,
            axes=reading.axes,
            evidence=reading.evidence,
            candidates=reading.candidates,
            trainable=trainable,
        )
        result[name] = param
        bundle.take(node, ("param", name))
        for other in more.get(node, ()):
            result[other] = replace(param, name=other, tied_to=name)
    return result


def _extras(bundle: Bundle) -> dict[str, TensorRef]:
    """Every array that nothing else took."""
    extras = {}
    for key, tensor in bundle.tensors.items():
        if key not in bundle.taken:
            extras[key] = tensor
            bundle.lifter.take((key,), ("extra", key))
    return extras


def _oddities(
    found: Reach,
    params: Sequence[int],
    named: Mapping[Place, str],
    read: Mapping[int, Reading],
) -> list[str]:
    """What the file shows to be missing from it."""
    untracked = [node for node in params if node not in found.parents]
    if not untracked:
        return []
    said = [
        f"{len(untracked)} trainable variables are saved through the optimizer alone: Keras 3 does not track "
        "layers in a plain list or dictionary, and restores them only together with the optimizer"
    ]
    normalized = [named[node] for node in untracked if read[node].role == "gamma"]
    if normalized:
        said.append(
            "if there are batch normalizations among them, their moving statistics are not in this file: "
            + ", ".join(normalized)
        )
    return said
