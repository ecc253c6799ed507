"""Folders of weights that are more than one file of them: an adapter of PEFT's, a pipeline of diffusers'.

    adapter_config.json  adapter_model.safetensors | adapter_model.bin         PEFT, `save_pretrained`
    model_index.json  unet/  vae/  text_encoder/  scheduler/  tokenizer/  ...  diffusers, `save_pretrained`

A model of a pipeline stands in the folder of its name, `unet.conv_in.weight` in the document; its file is
`diffusion_pytorch_model` or, of transformers' models, `model` or `pytorch_model`, whole or in shards.
`--select unet` takes one of them. The folder of one component alone is read as any folder of weights.
Neither holds progress. Written are folders that were read, or that serve as template.
Source: peft 0.21.2 `peft_model.py`, diffusers 0.42.1 `pipelines/pipeline_utils.py`, `utils/constants.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckptconv.dialects import torch_adapter
from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.residue import Lifter, fill
from ckptconv.dialects.torch_folder_parts import (
    WEIGHTS,
    folder_of,
    lift_weights,
    not_read,
    raw_of,
    weights_of,
)
from ckptconv.dialects.torch_modules import Module
from ckptconv.dialects.torch_objects import named_code, refuse_repeated_keys
from ckptconv.dialects.torch_plain import provenance
from ckptconv.dialects.torch_values import lift_rest, own_residue, with_layouts
from ckptconv.document import Checkpoint, Progress, Residue, Unknown
from ckptconv.errors import FormatError, MappingError, Problem
from ckptconv.rawtree import DictNode, RawTree

_NO_RUN = Unknown(reason="the folder holds weights only")
_COMPONENT_FILES = tuple(
    f"{stem}{suffix}"
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
)


class _HubFolder:
    """What the two have in common."""

    format = "pytorch"
    framework: str | None = "torch"
    needs_template = True
    save_counter: str | None = None
    name: str
    producer: str
    mark: str

    def detect(self, raw: RawTree) -> Detection | None:
        """By the file that only its library writes."""
        if raw.attributes.get("producer") != self.name or not isinstance(raw.root, DictNode):
            return None
        return Detection(score=100, evidence=f"a folder with {self.mark}")

    def lift(self, raw: RawTree) -> Checkpoint:
        """The weights. Reads nothing. Raises: unknown-dialect, duplicate-key."""
        root = folder_of(raw)
        refuse_repeated_keys(root)
        lifter = Lifter(root)
        modules = tuple(self.modules(root, lifter))
        if not modules:
            raise FormatError.of(
                "unknown-dialect",
                f"the folder has '{self.mark}' and no file with weights that is known beside or below it",
                "Copy the folder again, with its subfolders.",
                loc=(raw.location.rpartition("/")[2],),
            )
        extras = lift_rest(root, lifter, {k: v for module in modules for k, v in module.parts.items()})
        told = torch_adapter.settings(root)
        return Checkpoint(
            progress=Progress(step=_NO_RUN, epochs=_NO_RUN),
            params={name: param for module in modules for name, param in module.params.items()},
            extras=extras,
            described=tuple(block for module in modules for block in module.described),
            residue=Residue(
                format=self.format, dialect=self.name, root=lifter.residue(), attributes=raw.attributes
            ),
            provenance=provenance(raw, self.name, self.detect(raw), producer=self.producer),
            oddities=(
                *torch_adapter.said(told),
                *self.said(modules),
                *not_read(raw),
                *named_code(replace(root, kind="dict")),
            ),
            extensions={torch_adapter.EXTENSION: told} if told else {},
        )

    def modules(self, root: DictNode, lifter: Lifter) -> Iterator[Module]:
        """The models in the folder."""
        raise NotImplementedError

    def said(self, modules: tuple[Module, ...]) -> tuple[str, ...]:
        """What to say of several of them."""
        return ()

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The template's folder (or the one that was read) with the document's weights."""
        root, residue = own_residue(checkpoint, self.name), checkpoint.residue
        if root is None or residue is None:
            raise MappingError.of(
                "template-required",
                f"a folder with '{self.mark}' needs a template: its configuration is the library's own",
                "Pass --template with such a folder, or --to safetensors.",
                loc=("residue",),
            )
        filled = with_layouts(fill(root, checkpoint), root)
        return raw_of(filled, RawTree(format=self.format, root=None, attributes=residue.attributes))

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """None: names are all that it gives."""
        return ()


class Adapter(_HubFolder):
    """`PeftModel.save_pretrained`."""

    name = "peft"
    producer = "peft"
    mark = torch_adapter.CONFIG
    summary = "folder of a PEFT adapter (LoRA and others): its own weights, not merged into a base model"

    def modules(self, root: DictNode, lifter: Lifter) -> Iterator[Module]:
        found = weights_of(root, tuple(name for name in WEIGHTS if name.startswith("adapter_model")))
        if found is not None:
            yield lift_weights(root, found[1], lifter)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`PeftModel.from_pretrained`, which needs the base model."""
        return f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, {target!r})"


class Pipeline(_HubFolder):
    """`DiffusionPipeline.save_pretrained`."""

    name = "diffusers"
    producer = "diffusers"
    mark = "model_index.json"
    summary = "folder of a diffusers pipeline: unet, vae, text_encoder, ...; --select takes one of them"

    def modules(self, root: DictNode, lifter: Lifter) -> Iterator[Module]:
        seen: dict[object, str] = {}
        for component in dict.fromkeys(str(name).partition("/")[0] for name in root.keys if "/" in str(name)):
            found = weights_of(root, tuple(f"{component}/{name}" for name in _COMPONENT_FILES))
            if found is not None:
                yield lift_weights(root, found[1], lifter, prefix=f"{component}.", seen=seen)

    def said(self, modules: tuple[Module, ...]) -> tuple[str, ...]:
        names = [str(module.key[0]).partition("/")[0] for module in modules]
        each = [f"{name} ({len(m.params)} arrays)" for name, m in zip(names, modules, strict=True)]
        return (f"The pipeline has {', '.join(each)}: --select {names[0]} takes that one alone.",)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`DiffusionPipeline.from_pretrained`."""
        return (
            "from diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({target!r})"
        )


register(Adapter())
register(Pipeline())
