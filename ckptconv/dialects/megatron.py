"""A checkpoint of Megatron-LM's `torch` format: `iter_N/mp_rank_00/model_optim_rng.pt` of an only rank.

    {"args": Namespace, "checkpoint_version": 3.0, "iteration": N, "model": {..}, "optimizer": {..},
     "opt_param_scheduler": {.., "num_steps": SAMPLES}, "rng_state": [..], ..}

The optimizer is in forms of its own (`megatron_forms`), the schedule counts samples (`megatron_schedule`).
Folders of the `torch_dist` format are `dcp_megatron`.

Refused: more than one rank of tensors, pipelines or experts, in a folder or in one rank's file. Which axis of
a weight the ranks share, and how, is the model's knowledge and in no file. `iteration` of a `release` is none
that training goes on from. Source: Megatron-LM `megatron/training/checkpointing.py` `generate_state_dict`,
`get_checkpoint_name`, `fix_query_key_value_ordering`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.megatron_forms import folded, unfolded, unreadable
from ckptconv.dialects.megatron_schedule import with_schedule
from ckptconv.dialects.torch_plain import TrainingDictionary
from ckptconv.dialects.torch_rows import ATTRIBUTES, matching, there
from ckptconv.dialects.torch_table import MEGATRON
from ckptconv.dialects.torch_values import number_of
from ckptconv.document import Checkpoint, value_of
from ckptconv.errors import FormatError
from ckptconv.formats.dcp_write import CONFIG
from ckptconv.formats.torch_folder import DIRECTORY
from ckptconv.rawtree import DictNode, RawTree

COUNTED = "steps_in_groups"
"""Attribute of the residue: the optimizers whose groups hold the step."""
_RELEASE = "release"
_INTERLEAVED = 2.0
"""From this `checkpoint_version` on the rows of queries, keys and values lie as they do now."""
_RANKS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
"""Arguments that say of how many ranks the model is."""
_SAVE_WHOLE = (
    "Save with --ckpt-format torch_dist, which tells how the parts lie, or make one rank of them: Megatron's "
    "tools/checkpoint/convert.py --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1."
)
_RESTORE = """import pathlib, shutil

folder = pathlib.Path("checkpoints")  # --load
iteration = folder / "iter_{step:07d}"
{copy}
(folder / "latest_checkpointed_iteration.txt").write_text("{step}")"""
_COPY_FILE = """(iteration / "mp_rank_00").mkdir(parents=True)
shutil.copy({target!r}, iteration / "mp_rank_00" / "model_optim_rng.pt")"""
_COPY_FOLDER = "shutil.copytree({target!r}, iteration)"


class Megatron(TrainingDictionary):
    """The training dictionary of Megatron-LM."""

    def __init__(self) -> None:
        super().__init__(MEGATRON)

    def detect(self, raw: RawTree) -> Detection | None:
        """By the keys of the row, or as the folder of several ranks."""
        if isinstance(raw.root, DictNode) and raw.root.kind == DIRECTORY:
            if raw.attributes.get("producer") != self.name:
                return None
            return Detection(score=100, evidence=f"a folder of {MEGATRON.producer}'s ranks")
        told = all(there(raw.root, key) for key in MEGATRON.signature.has)
        return super().detect(raw) if told else None

    def lift(self, raw: RawTree) -> Checkpoint:
        """The training run. I/O: reads 0-d counters.

        Raises: unsupported-feature, order-ambiguous, duplicate-key, corrupt-file, unknown-dialect.
        """
        _refuse_ranks(raw)
        assert isinstance(raw.root, DictNode)
        root, counted = unfolded(raw.root)
        attributes = {**raw.attributes, **({COUNTED: counted} if counted else {})}
        released = PurePath(raw.location).parent.parent.name == _RELEASE
        told = replace(raw, root=root, attributes=attributes)
        checkpoint = _Released().lift(told) if released else super().lift(told)
        checkpoint = with_schedule(checkpoint, raw.root)
        odd = (*checkpoint.oddities, *unreadable(raw.root), *_said_of_rows(raw.root))
        return replace(checkpoint, oddities=odd)

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The run's own file or the template's, in its forms. Raises: as every training dictionary."""
        raw = super().lower(checkpoint)
        counted = raw.attributes.get(COUNTED)
        assert isinstance(raw.root, DictNode)
        attributes = {key: value for key, value in raw.attributes.items() if key != COUNTED}
        root = folded(raw.root, counted if isinstance(counted, tuple) else ())
        return replace(raw, root=root, attributes=attributes)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """Into a folder that Megatron-LM loads."""
        step, residue = value_of(checkpoint.progress.step), checkpoint.residue
        is_folder = residue is not None and isinstance(residue.root, DictNode) and CONFIG in residue.root
        copy = (_COPY_FOLDER if is_folder else _COPY_FILE).format(target=target)
        return _RESTORE.format(step=step if isinstance(step, int) else 0, copy=copy)


class _Released(TrainingDictionary):
    """A finished model: Megatron-LM goes on from no iteration of it."""

    def __init__(self) -> None:
        super().__init__(replace(MEGATRON, counters=()))


def _refuse_ranks(raw: RawTree) -> None:
    """Raises: unsupported-feature for what is only a part of a model."""
    if not isinstance(raw.root, DictNode):
        raise FormatError.of("unknown-dialect", "the file holds no dictionary", "Name it.", loc=())
    name = PurePath(raw.location).name
    if raw.root.kind == DIRECTORY:
        ranks = sorted({str(key).partition("/")[0] for key in raw.root.keys if "/" in str(key)})
        message = f"'{name}' holds {len(ranks)} ranks ({', '.join(ranks[:4])}), one is read"
        raise FormatError.of("unsupported-feature", message, _SAVE_WHOLE, loc=(name,))
    for argument in () if CONFIG in raw.root else _RANKS:  # a folder of torch_dist has the whole model
        for path, node in matching(raw.root, ("args", ATTRIBUTES, argument)):
            count = number_of(node)
            if count is not None and count[0] > 1:
                message = f"'{argument}' is {count[0]}: the file is one rank's part of the model"
                raise FormatError.of("unsupported-feature", message, _SAVE_WHOLE, loc=path)


def _said_of_rows(root: DictNode) -> tuple[str, ...]:
    version = number_of(root.get("checkpoint_version"))
    if version is None or version[0] >= _INTERLEAVED:
        return ()
    return (
        f"checkpoint_version is {version[0]}: the rows of query_key_value are in an order that Megatron-LM "
        "changes when it loads them. They are as they are stored.",
    )


register(Megatron())
