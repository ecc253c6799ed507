"""The folder that DeepSpeed leaves of one tag, `global_step<N>/`: ZeRO 0 to 3, and universal checkpoints.

The folder is gathered into one training dictionary (`deepspeed_gather`), which a row of the table reads as it
reads a file; written, the dictionary is cut up again for as many ranks as there were (`deepspeed_places`).
The tag stands in the file `latest` of the directory above (`candidates`). A run's own keys (`client_state`)
stand beside DeepSpeed's in the model file and stay what they are. `global_steps` counts updates and those
that a loss scaler skipped; some of DeepSpeed's optimizers make one update with no gradients before the first.
Scalers, stages and addresses are objects of DeepSpeed that are described, not built: writing them needs
--allow opaque-globals. Writing needs a folder of the target's run (or the run's own) as template.
Source: deepspeed 0.19 `runtime/engine.py` (`save_checkpoint`, `load_checkpoint`, `_take_model_step`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.deepspeed_gather import gathered
from ckptconv.dialects.deepspeed_model import shapes_of
from ckptconv.dialects.deepspeed_places import FILES, MODULE, is_emptied, scattered
from ckptconv.dialects.torch_folder_parts import not_read
from ckptconv.dialects.torch_lower import is_carried
from ckptconv.dialects.torch_note import with_note
from ckptconv.dialects.torch_objects import refuse_repeated_keys
from ckptconv.dialects.torch_plain import TrainingDictionary
from ckptconv.dialects.torch_table import DEEPSPEED
from ckptconv.dialects.torch_values import own_residue, tensor_of
from ckptconv.document import Checkpoint
from ckptconv.errors import FormatError, MappingError
from ckptconv.formats.torch_folder import DIRECTORY
from ckptconv.note import KEY
from ckptconv.rawtree import DictNode, RawTree

_WEIGHTS = (
    "The weights are the float32 ones that the optimizer's ranks keep: ZeRO 3 leaves no others, and a "
    "16-bit run rounds them."
)


class DeepSpeed(TrainingDictionary):
    """One tag of a DeepSpeed run."""

    def __init__(self) -> None:
        super().__init__(DEEPSPEED)

    def detect(self, raw: RawTree) -> Detection | None:
        """By the files that only DeepSpeed writes."""
        if not isinstance(raw.root, DictNode) or raw.root.kind != DIRECTORY:
            return super().detect(raw)
        if raw.attributes.get("producer") != self.name:
            return None
        marks = [str(name) for name in raw.root.keys if str(name).endswith("_states.pt")]
        return Detection(score=100, evidence=f"a folder with {', '.join(marks[:3])}")

    def lift(self, raw: RawTree) -> Checkpoint:
        """The training run. I/O: reads 0-d counters.

        Raises: unsupported-feature, missing-file, corrupt-file, duplicate-key, progress-conflict.
        """
        if not isinstance(raw.root, DictNode) or raw.root.kind != DIRECTORY:
            _refuse_emptied(raw)
            return super().lift(raw)
        refuse_repeated_keys(raw.root)
        whole = gathered(raw.root)
        checkpoint = super().lift(replace(raw, root=with_note(whole, raw.note)))
        told = self.detect(raw)
        evidence = told.evidence if told is not None else ""
        return replace(
            checkpoint,
            provenance=replace(checkpoint.provenance, evidence=evidence),
            oddities=(*checkpoint.oddities, *_joined_weights(whole), *not_read(raw)),
        )

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The template's folder (or the run's own) with the document's values.

        Raises: template-required, template-mismatch, slots-missing, unequal-steps, precision-loss.
        """
        root = own_residue(checkpoint, self.name)
        if not isinstance(root, DictNode):
            raise MappingError.of(
                "template-required",
                "a folder of DeepSpeed needs a template: how many ranks share the run is its own business",
                "Pass --template with a folder of the target's run, saved after one update.",
                loc=("residue",),
            )
        raw = super().lower(checkpoint)
        assert isinstance(raw.root, DictNode)
        if FILES not in raw.root:
            return raw
        note = raw.root.get(KEY)
        files = scattered(raw.root, carried=is_carried(checkpoint, root))
        text = note if isinstance(note, str) else None
        return replace(raw, root=replace(files, kind=DIRECTORY), note=text)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`engine.load_checkpoint`, with the tag that the folder is called by."""
        path = PurePath(target)
        return f"engine.load_checkpoint({str(path.parent)!r}, tag={path.name!r})"


def _refuse_emptied(raw: RawTree) -> None:
    """Raises: missing-file for the model file of one rank of ZeRO 3, which has no weights."""
    root = raw.root if isinstance(raw.root, DictNode) else DictNode()
    module = root.get(MODULE)
    for shapes in shapes_of(root, "param_shapes", ()):
        for name, shape in shapes.items():
            found = tensor_of(module.get(name)) if isinstance(module, DictNode) else None
            if found is not None and found[0].shape != shape and not found[0].spec.numel:
                raise FormatError.of(
                    "missing-file",
                    f"'{name}' of shape {list(shape)} is not in this file: all ranks share it",
                    "Name the folder with the files of all ranks.",
                    loc=(MODULE, name),
                )


def _joined_weights(whole: DictNode) -> tuple[str, ...]:
    """What to say where the weights are those of the optimizer."""
    files = whole.get(FILES)
    for _, states in files.items if isinstance(files, DictNode) else ():
        module = states.get(MODULE) if isinstance(states, DictNode) else None
        if isinstance(module, DictNode) and any(is_emptied(value) for _, value in module.items):
            return (_WEIGHTS,)
    return ()


register(DeepSpeed())
