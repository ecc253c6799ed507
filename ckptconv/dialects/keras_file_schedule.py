"""The schedule of a Keras 3 optimizer in a `.keras` file: the constructor in the optimizer's config.

An optimizer under a schedule has no variable for the learning rate; `load_model` makes the schedule of
`compile_config.optimizer.config.learning_rate`. A `.weights.h5` has no config and holds none.
"""

from __future__ import annotations

from ckptconv.catalog.schedule_config import Declared, from_keras_config
from ckptconv.catalog.schedule_keras import keras_code
from ckptconv.catalog.schedule_rates import NotExpressibleError, curve_of, is_known
from ckptconv.catalog.schedule_source import named_rates
from ckptconv.document import Checkpoint, Schedule, value_of
from ckptconv.errors import CkptError
from ckptconv.formats.json_tree import node_of
from ckptconv.rawtree import DictNode, ListNode, Node, Path, transform

PLACE = "learning_rate"
"""Argument of the optimizer that a schedule stands in."""


def declared(config: Node) -> Declared | None:
    """The schedule that a config's argument says; None for a number or a class of one's own."""
    return from_keras_config(_plain(config))


def with_schedule(root: Node, checkpoint: Checkpoint, at: Path) -> Node:
    """The residue whose optimizer's arguments, below `at`, say the document's schedule.

    What says the same rates already stays as it is. Raises: schedule-unsupported.
    """
    if (
        len(checkpoint.schedules) != 1
        or len(checkpoint.optimizers) != 1
        or not checkpoint.optimizers[0].groups
    ):
        return root
    schedule, facts = checkpoint.schedules[0], checkpoint.optimizers[0].groups[0].hyperparameters
    curve, base = curve_of(schedule), value_of(facts.get("base_learning_rate"))
    if not is_known(curve) or not isinstance(base, (int, float)):
        return root
    named, position = named_rates(facts), value_of(schedule.position)

    def put(path: Path, node: Node) -> Node:
        mine = path[: len(at)] == at and path[-2:] == ("config", PLACE) and isinstance(node, DictNode)
        if not mine or declared(node) == Declared(curve=curve, base=float(base), named=named):
            return node
        try:
            code = keras_code(curve, float(base), position if isinstance(position, int) else 0, named)
        except NotExpressibleError as error:
            raise _unsupported(schedule, error) from error
        return node_of(code.call.config())

    return transform(root, put)


def _unsupported(schedule: Schedule, error: NotExpressibleError) -> CkptError:
    return CkptError.of(
        "schedule-unsupported",
        f"the config cannot say the document's schedule ({schedule.family}): {error}",
        "Write a schedule that Keras has, or a .weights.h5, which holds none.",
        loc=("schedules", schedule.name),
    )


def _plain(node: Node) -> object:
    if isinstance(node, DictNode):
        return {str(key): _plain(value) for key, value in node.items}
    return [_plain(value) for value in node.items] if isinstance(node, ListNode) else node
