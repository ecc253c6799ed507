"""Averages of the weights that stand beside a model (EMA, SWA, `AveragedModel`), matched to its parameters.

They are extras of the document (`state_dict_ema/conv.weight`, `model_ema/module.conv.weight`), parts of a
pickled module, or parameters of the same state_dict (`model_ema.`). An average has one tensor of the same
shape for every trained parameter of the model; buffers that it does not hold are the model's own. Names are
compared without dots, as those of latent-diffusion's `LitEma` are; a bare list (`shadow_params` of
`torch_ema` and diffusers) goes by the order of `model.parameters()`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from ckptconv.catalog.wrappers import AVERAGE, AVERAGED, EXTRA
from ckptconv.dialects import torch_keys
from ckptconv.dialects.torch_modules import PARTS, bare_names, optimizable
from ckptconv.dialects.torch_survey import words
from ckptconv.dialects.torch_values import number_of
from ckptconv.document import Checkpoint, Fact, Known, Param
from ckptconv.rawtree import Lifted, Node, Path, transform, walk
from ckptconv.tensor import TensorRef

_INSIDE = frozenset({*PARTS, "@state", "@args0"})
"""Steps of a path that a pickled module's state_dict does not have."""
_COUNT = "/n_averaged"
_MOST_OUTER = 2
"""Components that a wrapper may put before the model's own names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """One average of a model's weights."""

    key: str
    """Where it stands."""
    tensors: Mapping[str, TensorRef]
    """Parameter's name -> its average, for every trained parameter of the model and some buffers."""
    params: Mapping[str, Param]
    """The model that it is of."""


def averages(checkpoint: Checkpoint) -> tuple[Average, ...]:
    """Every average of the document's weights. I/O: none."""
    own = _slots(checkpoint)
    counted = set(_counts(checkpoint))
    for name, tensor in _named(checkpoint):
        steps = name.split("/")
        depth = next((i for i in range(len(steps)) if _is_average(steps[: i + 1], counted)), None)
        if depth is None or depth + 1 == len(steps):
            continue
        rest = [step for step in steps[depth + 1 :] if step not in _INSIDE]
        own.setdefault("/".join(steps[: depth + 1]), {})[".".join(rest)] = tensor
    found = []
    for key, tensors in own.items():
        params = {n: p for n, p in checkpoint.params.items() if not n.startswith(f"{key}.")}
        fit = _fit(dict(zip(bare_names(list(tensors)), tensors.values(), strict=True)), params)
        if fit is not None:
            found.append(Average(key=key, tensors=fit[0], params=fit[1]))
    return tuple(found)


def with_averages(checkpoint: Checkpoint) -> Checkpoint:
    """The document that says which averages of its weights there are, and how one is taken.

    What its optimizers train has its average, of the first, in a slot of theirs. I/O: reads a count.
    """
    found = averages(checkpoint)
    said = [
        f"An average of the weights stands under '{average.key}': --select "
        f"{'ema' if len(found) == 1 else average.key} takes it instead of the trained ones."
        for average in found
    ]
    checkpoint = replace(checkpoint, oddities=(*checkpoint.oddities, *said))
    return _in_slots(checkpoint, found[0]) if found else checkpoint


def _in_slots(checkpoint: Checkpoint, average: Average) -> Checkpoint:
    """The document whose optimizers hold the average of what they train; the rest are extras by its name."""
    owners = {name: o.name for o in reversed(checkpoint.optimizers) for name in o.params}
    keys = {id(tensor): key for key, tensor in checkpoint.extras.items()}
    moved: dict[Path, Lifted] = {}
    extras = dict(checkpoint.extras)
    held: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in average.tensors.items():
        key = keys.get(id(tensor))
        if key is None or not owners:
            continue  # parameters of the same state_dict, or nothing that an optimizer trains
        del extras[key]
        if name in owners:
            held.setdefault(owners[name], {})[name] = tensor
            moved["extra", key] = Lifted(to=("slot", owners[name], AVERAGE, name))
        else:
            extras[EXTRA + name] = tensor
            moved["extra", key] = Lifted(to=("extra", EXTRA + name))
    scalars: dict[str, Fact] = {}
    count = _counts(checkpoint).get(average.key, "")
    counter = extras.get(count)
    number = number_of(counter) if counter is not None else None
    if held and number is not None:
        del extras[count]
        moved["extra", count] = Lifted(to=("scalar", next(iter(held)), AVERAGED), encoding=number[1])
        scalars[AVERAGED] = Known(value=number[0], source=count.replace("/", "."))

    def settle(_: Path, node: Node) -> Node:
        there = moved.get(node.to) if isinstance(node, Lifted) else None
        if there is None or not isinstance(node, Lifted):
            return node
        return replace(there, encoding={**node.encoding, **there.encoding})

    residue = checkpoint.residue
    return replace(
        checkpoint,
        extras=extras,
        residue=replace(residue, root=transform(residue.root, settle)) if residue is not None else None,
        optimizers=tuple(
            replace(o, slots={**o.slots, AVERAGE: held[o.name]}, scalars={**o.scalars, **scalars})
            if o.name in held
            else o
            for o in checkpoint.optimizers
        ),
    )


def _slots(checkpoint: Checkpoint) -> dict[str, dict[str, TensorRef]]:
    """The average that the optimizers hold, by its key in the file."""
    tensors = {n: t for o in checkpoint.optimizers for n, t in o.slots.get(AVERAGE, {}).items()}
    if not tensors:
        return {}
    rest = {n.removeprefix(EXTRA): t for n, t in checkpoint.extras.items() if n.startswith(EXTRA)}
    root = checkpoint.residue.root if checkpoint.residue is not None else None
    path = next((p for p, leaf in walk(root) if isinstance(leaf, Lifted) and AVERAGE in leaf.to), (AVERAGE,))
    depth = next((i for i in range(len(path)) if _is_average(list(map(str, path[: i + 1])), set())), 0)
    return {"/".join(map(str, path[: depth + 1])): {**tensors, **rest}}


def _counts(checkpoint: Checkpoint) -> dict[str, str]:
    """Key of an average -> the extra that counts how often it was moved."""
    found = [name for name in checkpoint.extras if name.endswith(_COUNT)]
    keys = [name.removesuffix(_COUNT) for name in found]
    return {torch_keys.AVERAGE_COUNTED.get(key, key): name for key, name in zip(keys, found, strict=True)}


def _is_average(steps: list[str], counted: Collection[str]) -> bool:
    """Whether a place holds an average, as its last step says or as a count of averages in it tells."""
    return bool(words((steps[-1],)) & torch_keys.AVERAGE_WORDS) or "/".join(steps) in counted


def _named(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    yield from checkpoint.extras.items()
    for name, param in checkpoint.params.items():
        head, _, rest = name.partition(".")
        if words((head,)) & torch_keys.AVERAGE_WORDS:
            yield f"{head}/{rest}", param.tensor


def _fit(
    tensors: Mapping[str, TensorRef], params: Mapping[str, Param]
) -> tuple[dict[str, TensorRef], dict[str, Param]] | None:
    """The tensors by parameter, and the model whose trained parameters they all are."""
    for prefix in dict.fromkeys(["", *(f"{name.partition('.')[0]}." for name in params)]):
        model = {name: param for name, param in params.items() if name.startswith(prefix)}
        trained = optimizable(model)
        if not trained:
            continue
        for outer in range(_outer(tensors) + 1):
            matched = _by_name(tensors, model, prefix, outer)
            if matched.keys() >= set(trained):
                return matched, model
    return _in_order(tensors, params)


def _outer(tensors: Mapping[str, TensorRef]) -> int:
    """How many components all names share that have more: those that a wrapper put before them."""
    split = [name.split(".") for name in tensors if "." in name]
    depth = 0
    while depth < _MOST_OUTER and len({tuple(parts[: depth + 1]) for parts in split}) == 1:
        depth += 1
    return depth


def _by_name(
    tensors: Mapping[str, TensorRef], model: Mapping[str, Param], prefix: str, outer: int
) -> dict[str, TensorRef]:
    squashed: dict[str, list[str]] = {}
    for name in model:
        squashed.setdefault(name.removeprefix(prefix).replace(".", ""), []).append(name)
    matched = {}
    for name, tensor in tensors.items():
        names = squashed.get("".join(name.split(".")[outer:]), [])
        if len(names) == 1 and model[names[0]].tensor.shape == tensor.shape:
            matched[names[0]] = tensor
    return matched


def _in_order(
    tensors: Mapping[str, TensorRef], params: Mapping[str, Param]
) -> tuple[dict[str, TensorRef], dict[str, Param]] | None:
    """A list of as many tensors as there are trained parameters, each of its parameter's shape."""
    listed = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2].isdigit()}
    lists = {name.rpartition(".")[0] for name in listed}
    trained = optimizable(params)
    if len(lists) != 1 or len(listed) != len(trained):
        return None
    pairs = list(zip(trained, listed.values(), strict=True))
    if any(params[name].tensor.shape != tensor.shape for name, tensor in pairs):
        return None
    return dict(pairs), dict(params)
