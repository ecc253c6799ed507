"""The optimizers of an object graph: where each stands, which variable each slot belongs to, what it counts.

Three generations, told apart by the edges of the optimizer's node:

| | Keras 3 | tf_keras >= 2.11 | tf_keras legacy |
|---|---|---|---|
| step | `_iterations` (<= 3.4: `iterations`), `_variables/0` | `_iterations`, `_variables/0` | `iter` |
| learning rate | `_learning_rate`, `_variables/1` | `_learning_rate`, not in `_variables` | `learning_rate` |
| slots | lists beside `_trainable_variables` | full name `[scope/]slot/variable` | `slot_variables` |

Under a schedule there is no learning rate. A Keras 3 optimizer that was built has its variables in
`_trainable_variables`; an object with nothing but `iterations` is its counter, saved alone. tf_keras
keeps no list of its variables, and its slot lists (`_momentums`) are not always edges, so the names of the
slots decide there. `LossScaleOptimizer` of Keras 3 wraps an inner optimizer and never counts itself; that of
tf_keras is transparent.

Source: keras 3.15.1 `keras/src/optimizers/base_optimizer.py`, `loss_scale_optimizer.py`; tf_keras 2.21
`tf_keras/src/optimizers/optimizer.py`, `legacy/optimizer_v2.py`, `mixed_precision/loss_scale_optimizer.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from ckptconv.catalog.optimizer_rows import shape_of_slot
from ckptconv.catalog.slot_lists import slot_shapes
from ckptconv.catalog.wrappers import ACCUMULATED, AVERAGE
from ckptconv.dialects.keras_slot_names import Order, Shapes, match_by_name
from ckptconv.dialects.keras_slot_rows import in_one_row
from ckptconv.dialects.object_paths import Graph

Generation = Literal["keras3", "tf_keras", "tf_keras_legacy"]

_LEGACY_MARKS = frozenset(
    {
        *("iter", "decay", "beta_1", "beta_2", "learning_rate", "momentum", "rho", "momentum_cache", "beta"),
        *("l1_regularization_strength", "l2_regularization_strength", "learning_rate_power"),
    }
)
_BOOKKEEPING = frozenset(
    {"_variables", "_trainable_variables", "_trainable_variables_indices", "_index_dict", "_model_variables"}
)
_SETTINGS = frozenset({"_iterations", "iterations", "_learning_rate", "_current_learning_rate"})
_AROUND: Mapping[str, str] = {
    "_model_variables_moving_average": AVERAGE,
    "_accumulated_gradients": ACCUMULATED,
    "average": AVERAGE,
    "gradient_accumulator": ACCUMULATED,
}
"""Lists, and the names of their variables, that belong to no rule -> canonical slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerNode:
    """One optimizer, in the numbers of the graph's nodes."""

    node: int
    generation: Generation
    path: tuple[str, ...]
    """Edges from the root to the outermost wrapper."""
    step: int | None
    """The variable that counts; None where none was made yet."""
    learning_rate: int | None
    scalars: Mapping[str, int] = field(default_factory=dict)
    """Other hyperparameters that stand in variables, by edge (legacy: `beta_1`, `decay`, ...)."""
    variables: tuple[int, ...] = ()
    """The variables it trains, in its own order; what it has slots for where it keeps no list."""
    slots: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """Name of the list edge (Keras 3, tf_keras) or of the slot -> (variable, slot variable)."""
    lists: frozenset[str] = frozenset()
    """Names of the slot lists, the empty ones too."""
    named_slots: bool = False
    """Whether `slots` has the slots' own names (`m`) for want of list edges."""
    slot_names: frozenset[str] = frozenset()
    """The slots' own names, where their variables' full names have them."""
    scalar_state: Mapping[str, int] = field(default_factory=dict)
    """Edges to single variables beside counter and learning rate (Nadam's `_u_product`)."""
    around: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """Canonical slot that belongs to no rule -> (variable, slot variable)."""
    scope: str | None = None
    """What its variables' names begin with: the name the class gives itself."""
    built: bool = True
    order: Order = "named"
    loss_scale: int | None = None
    """Variable of the current loss scale."""
    growth_tracker: int | None = None
    """Variable that counts the updates since the scale last changed."""

    @property
    def accumulates(self) -> bool:
        """Whether it counts batches, and makes an update of several."""
        return ACCUMULATED in self.around


@lru_cache(maxsize=2)
def optimizer_nodes(graph: Graph) -> Mapping[int, tuple[str, ...]]:
    """Every optimizer, wrappers included, with the shortest path to it."""
    came: dict[int, tuple[int, str]] = {0: (0, "")}
    queue = deque([0])
    while queue:
        node = queue.popleft()
        for edge, child in graph.children[node]:
            if child not in came:
                came[child] = node, edge
                queue.append(child)
    found = {}
    for optimizer in (node for node in came if node and _is_optimizer(graph, node)):
        node, path = optimizer, []
        while node:
            node, edge = came[node]
            path.append(edge)
        found[optimizer] = tuple(reversed(path))
    return found


def _is_optimizer(graph: Graph, node: int) -> bool:
    edges = graph.edges(node)
    if graph.graph.nodes[node].slot_variables or "_iterations" in edges:
        return True
    if ("iterations" in edges and "_variables" in edges) or is_bare_counter(graph, node):
        return True
    step = edges.get("iter")
    return step in graph.variables and edges.keys() - {"iter"} <= _LEGACY_MARKS | {
        "loss_scale",
        "base_optimizer",
    }


def is_bare_counter(graph: Graph, node: int) -> bool:
    """Whether a node holds a Keras 3 counter under its old name, and no variables of an optimizer.

    No Keras writes it: people do, with `tf.train.Checkpoint(iterations=optimizer.iterations)`.
    """
    edges = graph.edges(node)
    return edges.get("iterations") in graph.variables and edges.keys() <= _SETTINGS


def has_unlisted_slots(graph: Graph, node: int) -> bool:
    """Whether slots of a Keras 3 optimizer stand in `_variables` alone: before 3.10 its lists are empty."""
    edges = graph.edges(node)
    lists = [child for edge, child in edges.items() if edge not in _BOOKKEEPING]
    singles = {child for child in lists if child in graph.variables}
    slots = set(graph.elements(edges.get("_variables"))) - singles
    return generation_of(graph, node) == "keras3" and bool(slots) and not any(map(graph.elements, lists))


def optimizers(graph: Graph, model_variables: Sequence[int], shapes: Shapes) -> tuple[OptimizerNode, ...]:
    """The optimizers in the order in which the graph reaches them; of a wrapped one the inner.

    `model_variables`: those of the models, in model order.

    Raises: order-ambiguous where slots cannot be given to variables.
    """
    paths = optimizer_nodes(graph)
    inner = {child: node for node in paths if (child := graph.child(node, "inner_optimizer")) is not None}
    wrappers = set(inner.values())
    result = []
    for node, path in paths.items():
        if node in wrappers:
            continue
        outer = inner.get(node)
        reader = _READERS[generation_of(graph, node)]
        found = reader(graph, node, path if outer is None else paths[outer], model_variables, shapes)
        scale, tracker = _scaling(graph, node, outer)
        result.append(replace(found, loss_scale=scale, growth_tracker=tracker))
    return tuple(result)


def _scaling(graph: Graph, node: int, outer: int | None) -> tuple[int | None, int | None]:
    """(scale, counter): Keras 3 keeps them in the wrapper, tf_keras in an object of their own."""
    if outer is not None:
        return graph.child(outer, "dynamic_scale"), graph.child(outer, "step_counter")
    scale = graph.child(node, "loss_scale")
    if scale is None:
        return None, None
    return graph.child(scale, "current_loss_scale"), graph.child(scale, "good_steps")


def generation_of(graph: Graph, node: int) -> Generation:
    """Which generation of optimizers a node is one of."""
    edges = graph.edges(node)
    if graph.graph.nodes[node].slot_variables or "iter" in edges:
        return "tf_keras_legacy"
    if "_trainable_variables" in edges or "iterations" in edges:
        return "keras3"
    variables = graph.elements(edges.get("_variables"))
    learning_rate = edges.get("_learning_rate")
    return "keras3" if learning_rate is not None and learning_rate in variables else "tf_keras"


def _keras3(
    graph: Graph,
    node: int,
    path: tuple[str, ...],
    model_variables: Sequence[int],
    shapes: Shapes,
) -> OptimizerNode:
    edges = graph.edges(node)
    own = graph.elements(edges.get("_variables"))
    variables = graph.elements(edges.get("_trainable_variables"))
    kinds = slot_shapes("keras3")
    lists = {
        edge: graph.elements(child)
        for edge, child in edges.items()
        if edge not in _BOOKKEEPING
        and child not in graph.variables
        and (graph.is_list(child) or not graph.children[child] or edge in kinds)
    }
    entries = {edge: _numbered(graph, edges[edge]) for edge in lists}
    scalars = _scalar_state(graph, edges)
    beside = {*(edges.get(edge) for edge in _SETTINGS), *scalars.values()}
    beside.update(slot for elements in lists.values() for slot in elements)
    rest = [variable for variable in own if variable not in beside]
    found = in_one_row(graph, rest, variables, lists, shapes)
    entries.update(found)
    lists.update({edge: tuple(numbers.values()) for edge, numbers in found.items()})
    slots = {}
    for edge, elements in lists.items():
        pairs = _pairs(entries[edge], variables, shapes, kinds.get(edge, "param"))
        if elements and pairs is not None:
            slots[edge] = pairs
    around = {_AROUND[edge]: slots.pop(edge) for edge in _AROUND if edge in slots}
    step = edges.get("_iterations", edges.get("iterations", own[0] if own else None))
    return OptimizerNode(
        node=node,
        generation="keras3",
        path=path,
        step=step,
        learning_rate=edges.get("_learning_rate"),
        variables=variables,
        slots=slots,
        lists=frozenset(lists) - _AROUND.keys(),
        scalar_state=scalars,
        around=around,
        scope=_scope(graph, step, ("iteration", "iterations")),
        built=bool(variables),
    )


def _numbered(graph: Graph, node: int) -> dict[int, int]:
    """The entries of a list by their numbers: a list may have gaps."""
    return {int(edge): child for edge, child in graph.children[node] if edge.isdecimal()}


def _pairs(
    entries: Mapping[int, int], variables: Sequence[int], shapes: Shapes, kind: str
) -> tuple[tuple[int, int], ...] | None:
    """(variable, slot variable) of a list; None where its entries are no slots of the variables."""
    if any(place >= len(variables) for place in entries):
        return None
    found = []
    for place, slot in entries.items():
        variable = variables[place]
        shape = shapes.get(variable)
        if shape is None:
            return None
        due = shape_of_slot(kind, shape)
        if due is not None and shapes.get(slot) == due:
            found.append((variable, slot))
        elif kind == "param":
            return None
    whole = kind != "param" or len(entries) == len(variables)
    return tuple(found) if whole and found else None


def _scalar_state(graph: Graph, edges: Mapping[str, int]) -> dict[str, int]:
    return {
        edge: child for edge, child in edges.items() if child in graph.variables and edge not in _SETTINGS
    }


def _scope(graph: Graph, step: int | None, names: tuple[str, ...]) -> str | None:
    """The part before the counter's own name in its full name: `adam` of `adam/iteration`."""
    if step not in graph.variables:
        return None
    assert step is not None
    parts = graph.variables[step].full_name.split("/")
    return parts[-2] if len(parts) > 1 and parts[-1] in names else None


def _tf_keras(
    graph: Graph,
    node: int,
    path: tuple[str, ...],
    model_variables: Sequence[int],
    shapes: Shapes,
) -> OptimizerNode:
    edges = graph.edges(node)
    step = edges.get("_iterations")
    own = tuple(v for v in graph.elements(edges.get("_variables")) if v != step)
    matched, scope, order = match_by_name(graph, own, model_variables, shapes)
    lists = {
        edge: graph.elements(child)
        for edge, child in edges.items()
        if edge not in _BOOKKEEPING and graph.is_list(child) and set(graph.elements(child)) <= set(own)
    }
    list_of = {slot: edge for edge, elements in lists.items() for slot in elements}
    by_edge = all(slot in list_of for slot, (name, _) in matched.items() if name not in _AROUND)
    slots: dict[str, list[tuple[int, int]]] = {}
    around: dict[str, list[tuple[int, int]]] = {}
    for slot, (name, variable) in matched.items():
        if name in _AROUND:
            around.setdefault(_AROUND[name], []).append((variable, slot))
        else:
            slots.setdefault(list_of[slot] if by_edge else name, []).append((variable, slot))
    held = [pair for pairs in (*slots.values(), *around.values()) for pair in pairs]
    variables = tuple(dict.fromkeys(variable for variable, _ in held))
    return OptimizerNode(
        node=node,
        generation="tf_keras",
        path=path,
        step=step,
        learning_rate=edges.get("_learning_rate"),
        variables=variables,
        slots={name: tuple(pairs) for name, pairs in slots.items()},
        lists=frozenset(lists) - _AROUND.keys() if by_edge else frozenset(slots),
        named_slots=not by_edge,
        slot_names=frozenset(name for name, _ in matched.values()) - _AROUND.keys(),
        scalar_state=_scalar_state(graph, edges),
        around={slot: tuple(pairs) for slot, pairs in around.items()},
        scope=scope,
        built=bool(own),
        order=order,
    )


def _legacy(
    graph: Graph,
    node: int,
    path: tuple[str, ...],
    model_variables: Sequence[int],
    shapes: Shapes,
) -> OptimizerNode:
    edges = graph.edges(node)
    position = {variable: place for place, variable in enumerate(model_variables)}
    slots: dict[str, list[tuple[int, int]]] = {}
    for slot in graph.graph.nodes[node].slot_variables:
        slots.setdefault(slot.name, []).append((slot.original, slot.slot))
    variables = dict.fromkeys(variable for pairs in slots.values() for variable, _ in pairs)
    last = len(position)
    step = edges.get("iter")
    return OptimizerNode(
        node=node,
        generation="tf_keras_legacy",
        path=path,
        step=step,
        learning_rate=edges.get("learning_rate"),
        scalars={
            edge: child
            for edge, child in edges.items()
            if child in graph.variables and edge not in ("iter", "learning_rate")
        },
        variables=tuple(sorted(variables, key=lambda variable: position.get(variable, last))),
        slots={name: tuple(pairs) for name, pairs in slots.items()},
        lists=frozenset(slots),
        scope=_scope(graph, step, ("iter",)),
        built=len(edges) > 1,
    )


_READERS = {"keras3": _keras3, "tf_keras": _tf_keras, "tf_keras_legacy": _legacy}
