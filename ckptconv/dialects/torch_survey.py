"""Where models, optimizers and schedulers stand in a training dictionary.

A row of the table says it for a known dialect. In a plain loop's dictionary they are told by their keys
(`torch_keys`) and by what is in them; a dictionary of tensors under a key like `ema` is an average.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ckptconv.dialects import torch_keys
from ckptconv.dialects.torch_modules import is_averaged_model, is_module, is_module_state, is_state_dict
from ckptconv.dialects.torch_optimizer import is_optimizer
from ckptconv.dialects.torch_rows import Row, matching
from ckptconv.dialects.torch_scheduler import is_scheduler
from ckptconv.dialects.torch_values import keyed, tensor_of
from ckptconv.rawtree import DictNode, Node, Path


@dataclass(frozen=True, slots=True)
class Survey:
    """Where things stand in a training dictionary."""

    models: tuple[Path, ...]
    optimizers: tuple[Path, ...]
    schedulers: tuple[Path, ...]


def survey(root: DictNode, row: Row | None = None) -> Survey:
    """Where things stand, as a row says or as the dictionary's keys tell."""
    return _by_content(root) if row is None else _by_row(root, row)


def _by_row(root: DictNode, row: Row) -> Survey:
    models = [path for pattern in row.models for path, node in matching(root, pattern) if _is_model(node)]
    return Survey(
        tuple(models[:1]),
        tuple(p for pattern in row.optimizers for p, node in matching(root, pattern) if is_optimizer(node)),
        tuple(p for pattern in row.schedulers for p, node in matching(root, pattern) if is_scheduler(node)),
    )


def _by_content(root: DictNode) -> Survey:
    if is_optimizer(root):
        return Survey((), ((),), ())
    optimizers: list[Path] = []
    schedulers: list[Path] = []
    for path, node in keyed(root):
        if any(path[: len(found)] == found for found in (*optimizers, *schedulers)):
            continue
        if is_optimizer(node):
            optimizers.append(path)
        elif is_scheduler(node):
            schedulers.append(path)
    taken = (*optimizers, *schedulers)
    models = _models(root, 1, taken) or _models(root, 2, taken)
    if not models and not optimizers and loose(root).items:
        models = ((),)
    return Survey(models, tuple(optimizers), tuple(schedulers))


def _is_model(node: Node) -> bool:
    return is_state_dict(node, nested=True) or is_module_state(node) or is_module(node)


def _models(root: DictNode, depth: int, taken: tuple[Path, ...]) -> tuple[Path, ...]:
    """The entries at one depth that are models: by key and module's mark, else by content."""
    found = list(_like_models(root, depth, taken))
    found = [(path, node) for path, node in found if not is_averaged_model(node)] or found
    by_key = [path for path, _ in found if path[-1] in torch_keys.MODEL]
    by_mark = [
        path for path, node in found if path not in by_key and (is_module_state(node) or is_module(node))
    ]
    return tuple([*by_key, *by_mark] or [path for path, _ in found])


def _like_models(root: DictNode, depth: int, taken: tuple[Path, ...]) -> Iterator[tuple[Path, Node]]:
    for path, node in keyed(root, depth=depth):
        if len(path) != depth or not _is_model(node) or words(path) & torch_keys.AVERAGE_WORDS:
            continue
        if any(path == other[: len(path)] or other == path[: len(other)] for other in taken):
            continue
        if not any(isinstance(step, str) and _is_no_model(step) for step in path):
            yield path, node


def scalers(root: DictNode, row: Row | None = None) -> Iterator[tuple[Path, Node]]:
    """Where the state of a loss scaler may stand, the best first."""
    if row is None:
        yield from (((key,), root.get(key)) for key in torch_keys.SCALER)
    else:
        yield from (found for pattern in row.scaler for found in matching(root, pattern))


def _is_no_model(key: str) -> bool:
    return is_rng(key) or key in torch_keys.DATA or key in torch_keys.SCALER


def loose(root: DictNode) -> DictNode:
    """The dictionary's direct tensors that are no counters and no generator's state."""
    counters = {*torch_keys.STEP, *torch_keys.EPOCH, *torch_keys.SAMPLES, *torch_keys.TOKENS}
    return replace(
        root,
        items=tuple(
            (k, v)
            for k, v in root.items
            if isinstance(k, str) and k not in counters and not is_rng(k) and tensor_of(v) is not None
        ),
    )


@lru_cache(maxsize=4096)
def words(path: Path) -> frozenset[str]:
    """The words of a key: `optimizer_G`, `netG` and `ema.model` each have two."""
    text = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", ".".join(map(str, path)))
    return frozenset(word.lower() for word in re.split(r"[^A-Za-z0-9]+", text) if word)


def same_owner(a: Path, b: Path) -> bool:
    """Whether two keys name the same one of several: `netG` and `optimizer_g`, `generator` and `opt_gen`."""
    left, right = (sorted(words(path) - torch_keys.GENERIC_WORDS) for path in (a, b))
    if not left or not right:
        return left == right
    return all(x.startswith(y) or y.startswith(x) for x, y in zip(left, right, strict=False)) and len(
        left
    ) == len(right)


def is_rng(key: str) -> bool:
    """Whether a key holds a random generator's state."""
    return "rng" in key.lower() or "random_state" in key.lower()
