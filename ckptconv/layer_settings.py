"""What the target's layers must be told that no file of theirs holds: epsilon and momentum of normalizations.

The source tells it by live objects, a skeleton or a config. Said is what differs from the target's, or from
its class's default where nothing tells the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ckptconv.catalog import layers
from ckptconv.catalog.layer_settings import alike
from ckptconv.document import Checkpoint, module_of
from ckptconv.ties import Pair

_SHOWN = 5


def required(
    source: Checkpoint, template: Checkpoint, pairs: Sequence[Pair], framework: str
) -> tuple[str, ...]:
    """Lines of code of the target's framework, one for all layers of a kind with the same settings."""
    found: dict[tuple[str, tuple[tuple[str, float], ...]], dict[str, None]] = {}
    for pair in pairs:
        kind = pair.reading.kind if pair.reading is not None else template.params[pair.target].layer
        told = source.layer_settings.get(module_of(pair.source), {})
        own = template.layer_settings.get(module_of(pair.target), {})
        arguments = tuple(
            (setting.key, setting.argument(told[name]))
            for name, setting in layers.settings(framework, kind).items()
            if name in told and not alike(told[name], own.get(name, setting.usual))
        )
        if arguments:
            found.setdefault((kind, arguments), {})[module_of(pair.target)] = None
    line = _LINES.get(framework, _constructor)
    return tuple(
        line(layers.classes_of(framework, kind)[0], dict(arguments), tuple(names))
        for (kind, arguments), names in found.items()
    )


def _given(arguments: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _attributes(_: str, arguments: Mapping[str, float], names: Sequence[str]) -> str:
    """For modules, which are found by their names: to run once the model is made."""
    return f"for name in {list(names)}: vars(model.get_submodule(name)).update({_given(arguments)})"


def _constructor(name: str, arguments: Mapping[str, float], names: Sequence[str]) -> str:
    package, _, cls = name.partition(".")
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{package}.layers.{cls}({_given(arguments)})  # {', '.join(names[:_SHOWN])}{more}"


_LINES: Mapping[str, Callable[[str, Mapping[str, float], Sequence[str]], str]] = {"torch": _attributes}
"""Framework -> how its code says it, where it is not in the layer's constructor."""
