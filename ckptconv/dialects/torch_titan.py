"""A checkpoint of torchtitan in one file: what `dcp_to_torch_save` makes of its folder.

    {"<name>": T, .., "optimizer": {"state.<name>.exp_avg": T, .., "param_groups.<name>.lr": .., ..},
     "lr_scheduler": {..}, "dataloader": {..}, "train_state": {"step": N, "ntokens_seen": N}}

The weights stand at the root and the optimizer is flat, as in the folder (`dcp_forms`); both are as they were
when the file is written again. `ntokens_seen` is one rank's count and not the run's: it stays as it is.
Source: torchtitan `components/checkpoint.py`, `components/optimizer.py`.
"""

from __future__ import annotations

from dataclasses import replace

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.dcp_forms import FORMS, folded, unfolded
from ckptconv.dialects.torch_plain import TrainingDictionary
from ckptconv.dialects.torch_rows import there
from ckptconv.dialects.torch_table import TORCHTITAN
from ckptconv.document import Checkpoint, value_of
from ckptconv.rawtree import DictNode, RawTree


class Titan(TrainingDictionary):
    """The training dictionary of torchtitan."""

    def __init__(self) -> None:
        super().__init__(TORCHTITAN)

    def detect(self, raw: RawTree) -> Detection | None:
        """By the keys of the row."""
        told = all(there(raw.root, key) for key in TORCHTITAN.signature.has)
        return super().detect(_unfolded(raw)) if told else None

    def lift(self, raw: RawTree) -> Checkpoint:
        """The training run. I/O: reads 0-d counters. Raises: duplicate-key, corrupt-file, unknown-dialect."""
        return super().lift(_unfolded(raw))

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The run's own file or the template's, in its forms. Raises: as every training dictionary."""
        raw = super().lower(checkpoint)
        forms = raw.attributes.get(FORMS)
        assert isinstance(raw.root, DictNode)
        return replace(raw, root=folded(raw.root, forms if isinstance(forms, tuple) else (), {}))

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """Into a folder that torchtitan loads."""
        step = value_of(checkpoint.progress.step)
        return (
            "from torch.distributed.checkpoint.format_utils import torch_save_to_dcp\n\n"
            f"torch_save_to_dcp({target!r}, 'outputs/checkpoint/step-{step}')"
        )


def _unfolded(raw: RawTree) -> RawTree:
    if not isinstance(raw.root, DictNode):
        return raw
    root, forms = unfolded(raw.root)
    return replace(raw, root=root, attributes={**raw.attributes, FORMS: forms})


register(Titan())
