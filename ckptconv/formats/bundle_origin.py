"""Where a source bundle had its tensors, as attributes of a raw tree, so that it can be written so again.

- `num_shards`: as the header says;
- `shards`: of every tensor that is not in shard 0, `shard:key`;
- `slices`: of every partitioned variable the JSON list of key, shape, slices (per axis start and length, as
  stored) and the shard of each slice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from ckptconv.errors import FormatError
from ckptconv.formats.bundle_index import Slice
from ckptconv.rawtree import Scalar

Attributes = Mapping[str, Scalar | tuple[str, ...]]
T = TypeVar("T")


class Partition(NamedTuple):
    """How a variable is cut into slices."""

    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    shards: tuple[int, ...]


def attributes_of(
    num_shards: int, shards: Mapping[str, int], partitions: Mapping[str, Partition]
) -> dict[str, Scalar | tuple[str, ...]]:
    """The attributes; what is as in any small bundle is left out."""
    result: dict[str, Scalar | tuple[str, ...]] = {"num_shards": num_shards}
    moved = tuple(f"{shard}:{name}" for name, shard in shards.items() if shard)
    if moved:
        result["shards"] = moved
    if partitions:
        result["slices"] = tuple(json.dumps([name, *how]) for name, how in partitions.items())
    return result


def shards_of(attributes: Attributes) -> dict[str, int]:
    """Shard by key, where it is not 0.

    Raises: schema-invalid.
    """

    def parsed(line: str) -> tuple[str, int]:
        shard, name = line.split(":", 1)
        return name, _natural(int(shard))

    return dict(_lines(attributes, "shards", parsed))


def partitions_of(attributes: Attributes) -> dict[str, Partition]:
    """Partition by key.

    Raises: schema-invalid.
    """

    def parsed(line: str) -> tuple[str, Partition]:
        name, shape, slices, shards = json.loads(line)
        how = Partition(
            tuple(_natural(size) for size in shape),
            tuple(tuple((_natural(start), int(length)) for start, length in one) for one in slices),
            tuple(_natural(shard) for shard in shards),
        )
        if len(how.slices) != len(how.shards) or any(len(one) != len(how.shape) for one in how.slices):
            raise ValueError("slices do not fit the shape")
        return str(name), how

    return dict(_lines(attributes, "slices", parsed))


def _lines(attributes: Attributes, name: str, parsed: Callable[[str], T]) -> list[T]:
    lines = attributes.get(name, ())
    try:
        if not isinstance(lines, tuple):
            raise TypeError(f"a {type(lines).__name__}, expected texts")
        return [parsed(line) for line in lines]
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError.of(
            "schema-invalid",
            f"the attribute '{name}' of a bundle is not what reading one gives: {error}",
            f"Leave out '{name}': the bundle is then written in one shard, unpartitioned.",
            loc=("attributes", name),
        ) from error


def _natural(value: int) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
