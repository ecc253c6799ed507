"""The document <-> its JSON form.

What can be told once is told once: slots name their parameters as `all`, a slot's dtype and shape are its
parameter's unless said otherwise, and an optimizer's step that is `progress.step` refers to it, so that one
edit changes every place that is written from it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ckptconv.document import (
    PROGRESS_FIELDS,
    SCHEMA_VERSION,
    Block,
    Checkpoint,
    Layout,
    Param,
    Progress,
    Provenance,
    Schedule,
    Site,
)
from ckptconv.errors import SchemaError
from ckptconv.facts import fact_from_json, fact_to_json, facts_from_json, facts_to_json
from ckptconv.optimizer_json import optimizer_from_json, optimizer_to_json, spec_from_json, spec_to_json
from ckptconv.rawtree import Path
from ckptconv.residue_json import residue_from_json, residue_to_json
from ckptconv.strictjson import Json
from ckptconv.tensor import BufferSource, Extent, MissingTensor, StoredTensor, TensorRef, TensorSpec
from ckptconv.validation import checked

Tensors = Callable[[Path, TensorSpec], TensorRef] | Mapping[Path, TensorRef] | None
"""Where a document's tensors are, by `Checkpoint.lookup` address; None makes a skeleton."""


INLINE_NBYTES = 8 << 10
"""Largest array that a skeleton keeps the values of; the state of torch's generator has 5,056 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of a neutral directory, as the manifest lists it."""

    path: str
    nbytes: int
    digest: str | None = None
    """`sha256:<hex>` or `crc32c:<hex>`, where it is known."""
    tensor_crc32c: str | None = None
    """Of each tensor, eight hexadecimal digits one after another, where they are known."""


def to_json(
    checkpoint: Checkpoint,
    *,
    files: Iterable[FileEntry] = (),
    state_file: str | None = None,
    values: bool = False,
) -> dict[str, Json]:
    """The manifest: valid against the schema, tensors left out.

    `state_file` is the name under which the caller stores `residue_bytes`; without it the residue is inline.
    `values`: with those that a skeleton keeps, see `keeps_value`. I/O: reads these.
    """
    return {
        "schema": "ckptconv/checkpoint",
        "schema_version": SCHEMA_VERSION,
        "kind": checkpoint.kind,
        "progress": progress_to_json(checkpoint.progress),
        "params": [_param_to_json(param, values) for param in checkpoint.params.values()],
        **({"flow": [_site_to_json(site) for site in checkpoint.flow]} if checkpoint.flow else {}),
        **_layer_settings_to_json(checkpoint.layer_settings),
        "optimizers": [optimizer_to_json(o, checkpoint) for o in checkpoint.optimizers],
        "schedules": [schedule_to_json(schedule) for schedule in checkpoint.schedules],
        **({"loss_scaling": facts_to_json(checkpoint.loss_scaling)} if checkpoint.loss_scaling else {}),
        "rng": [_block_to_json(block) for block in checkpoint.rng],
        "data": [_block_to_json(block) for block in checkpoint.data],
        "extras": [
            {
                "name": key,
                **spec_to_json(tensor.spec),
                **(_value_to_json(tensor, is_param=False) if values else {}),
            }
            for key, tensor in checkpoint.extras.items()
        ],
        **(
            {"described": [_block_to_json(block) for block in checkpoint.described]}
            if checkpoint.described
            else {}
        ),
        "residue": residue_to_json(checkpoint.residue, state_file),
        "provenance": provenance_to_json(checkpoint.provenance),
        "files": [_file_to_json(file) for file in files],
        "oddities": list(checkpoint.oddities),
        "extensions": dict(checkpoint.extensions),
    }


def _file_to_json(file: FileEntry) -> dict[str, Json]:
    checksums = {} if file.tensor_crc32c is None else {"tensor_crc32c": file.tensor_crc32c}
    return {"path": file.path, "bytes": file.nbytes, "digest": file.digest, **checksums}


def from_json(obj: Json, tensors: Tensors = None, state: bytes | None = None) -> Checkpoint:
    """The document of a parsed manifest of any listed version; `state` is the content of its residue file.

    Raises: SchemaError with everything that is wrong; reference-broken for a tensor that is not in `tensors`;
    corrupt-file for a residue that is none.
    """
    manifest = checked(obj)
    find = _finder(tensors)
    progress = progress_from_json(manifest["progress"])
    params = {item["name"]: _param_from_json(item, find) for item in manifest["params"]}
    specs = {name: param.tensor.spec for name, param in params.items()}
    return Checkpoint(
        progress=progress,
        params=params,
        flow=tuple(_site_from_json(site) for site in manifest.get("flow", ())),
        layer_settings={one["module"]: one["settings"] for one in manifest.get("layer_settings", ())},
        optimizers=tuple(optimizer_from_json(o, progress, specs, find) for o in manifest["optimizers"]),
        schedules=tuple(schedule_from_json(schedule) for schedule in manifest["schedules"]),
        loss_scaling=facts_from_json(manifest.get("loss_scaling", {})),
        rng=tuple(_block_from_json(block) for block in manifest["rng"]),
        data=tuple(_block_from_json(block) for block in manifest["data"]),
        extras={e["name"]: _tensor_from_json(e, ("extra", e["name"]), find) for e in manifest["extras"]},
        described=tuple(_block_from_json(block) for block in manifest.get("described", [])),
        residue=residue_from_json(manifest["residue"], state),
        provenance=provenance_from_json(manifest["provenance"]),
        oddities=tuple(manifest["oddities"]),
        extensions=dict(manifest["extensions"]),
    )


def _finder(tensors: Tensors) -> Callable[[Path, TensorSpec], TensorRef]:
    if tensors is None:
        return lambda address, spec: MissingTensor(spec=spec, name=".".join(map(str, address[1:])))
    if not isinstance(tensors, Mapping):
        return tensors
    given = tensors

    def find(address: Path, spec: TensorSpec) -> TensorRef:
        tensor = given.get(address)
        if tensor is None or tensor.spec != spec:
            got = "nothing" if tensor is None else f"{tensor.dtype.name} {list(tensor.shape)}"
            raise SchemaError.of(
                "reference-broken",
                f"{address} is {spec.dtype.name} {list(spec.shape)} in the document, {got} beside it",
                "The document and its tensors do not belong together.",
                loc=address,
            )
        return tensor

    return find


def progress_to_json(progress: Progress) -> dict[str, Json]:
    """All fields, in their order."""
    return {name: fact_to_json(getattr(progress, name)) for name in PROGRESS_FIELDS}


def progress_from_json(progress: Mapping[str, Json]) -> Progress:
    """The inverse."""
    return Progress(**{name: fact_from_json(progress[name]) for name in PROGRESS_FIELDS})


def _param_to_json(param: Param, values: bool) -> dict[str, Json]:
    return {
        "name": param.name,
        "role": param.role,
        "layer": param.layer,
        "axes": None if param.axes is None else list(param.axes),
        "evidence": param.evidence,
        "trainable": param.trainable,
        **spec_to_json(param.tensor.spec),
        **(_value_to_json(param.tensor, is_param=True) if values else {}),
        "tied_to": param.tied_to,
        **(
            {"candidates": [_layout_to_json(layout) for layout in param.candidates]}
            if param.candidates
            else {}
        ),
    }


def keeps_value(tensor: TensorRef, *, is_param: bool) -> bool:
    """Whether a skeleton has the tensor's values: small arrays that no source of another framework gives.

    Among the parameters these are counters; everything among the extras may be one.
    """
    if isinstance(tensor, MissingTensor) or tensor.spec.nbytes > INLINE_NBYTES:
        return False
    return not is_param or tensor.dtype.kind in ("int", "uint", "bool")


def _value_to_json(tensor: TensorRef, *, is_param: bool) -> dict[str, Json]:
    if not keeps_value(tensor, is_param=is_param):
        return {}
    data = b"".join(window.tobytes() for window in tensor.windows())
    return {"value": base64.b64encode(data).decode("ascii")}


def _tensor_from_json(
    item: Mapping[str, Json], address: Path, find: Callable[[Path, TensorSpec], TensorRef]
) -> TensorRef:
    spec = spec_from_json(item)
    found = find(address, spec)
    if "value" not in item or not isinstance(found, MissingTensor):
        return found
    source = BufferSource(base64.b64decode(item["value"]), item["name"])
    return StoredTensor.dense(spec, Extent(source=source, offset=0, nbytes=source.nbytes))


def _layout_to_json(layout: Layout) -> dict[str, Json]:
    return {"layer": layout.layer, "role": layout.role, "axes": list(layout.axes)}


def _param_from_json(item: Mapping[str, Json], find: Callable[[Path, TensorSpec], TensorRef]) -> Param:
    axes = item["axes"]
    return Param(
        name=item["name"],
        tensor=_tensor_from_json(item, ("param", item["name"]), find),
        role=item["role"],
        layer=item["layer"],
        axes=None if axes is None else tuple(axes),
        evidence=item["evidence"],
        trainable=item["trainable"],
        tied_to=item["tied_to"],
        candidates=tuple(
            Layout(layer=layout["layer"], role=layout["role"], axes=tuple(layout["axes"]))
            for layout in item.get("candidates", ())
        ),
    )


def _layer_settings_to_json(settings: Mapping[str, Mapping[str, float]]) -> dict[str, Json]:
    listed: list[Json] = [{"module": name, "settings": dict(known)} for name, known in settings.items()]
    return {"layer_settings": listed} if listed else {}


def _site_to_json(site: Site) -> dict[str, Json]:
    return {"param": site.param, "after": list(site.after), **({"part": site.part} if site.part else {})}


def _site_from_json(item: Mapping[str, Json]) -> Site:
    return Site(param=item["param"], after=tuple(item["after"]), part=item.get("part", ""))


def schedule_to_json(schedule: Schedule) -> dict[str, Json]:
    """One schedule; the unit stands beside its position."""
    return {
        "name": schedule.name,
        "family": schedule.family,
        "position": {**fact_to_json(schedule.position), "unit": schedule.unit},
        "parameters": facts_to_json(schedule.parameters),
        "optimizer": schedule.optimizer,
    }


def schedule_from_json(item: Mapping[str, Json]) -> Schedule:
    """The inverse."""
    return Schedule(
        name=item["name"],
        family=item["family"],
        position=fact_from_json(item["position"]),
        unit=item["position"]["unit"],
        parameters=facts_from_json(item["parameters"]),
        optimizer=item["optimizer"],
    )


def _block_to_json(block: Block) -> dict[str, Json]:
    return {"name": block.name, "library": block.library, "tensors": list(block.tensors)}


def _block_from_json(item: Mapping[str, Json]) -> Block:
    return Block(name=item["name"], library=item["library"], tensors=tuple(item["tensors"]))


def provenance_to_json(provenance: Provenance) -> dict[str, Json]:
    """Where the document comes from."""
    return {
        "format": provenance.format,
        "dialect": provenance.dialect,
        "evidence": provenance.evidence,
        "source": provenance.source,
        "producer": provenance.producer,
        "supplied": [{"field": name, "by": who} for name, who in provenance.supplied],
        "history": list(provenance.history),
    }


def provenance_from_json(item: Mapping[str, Json]) -> Provenance:
    """The inverse."""
    return Provenance(
        format=item["format"],
        dialect=item["dialect"],
        evidence=item["evidence"],
        source=item["source"],
        producer=item["producer"],
        supplied=tuple((entry["field"], entry["by"]) for entry in item["supplied"]),
        history=tuple(item["history"]),
    )
