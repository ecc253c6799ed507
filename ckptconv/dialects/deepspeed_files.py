"""The files of a DeepSpeed folder by what they are, and what the number of ranks allows.

    mp_rank_00_model_states.pt                         model, counters, schedule (ZeRO 0 to 2)
    zero_pp_rank_<R>_mp_rank_00_model_states.pt        the same of each rank (ZeRO 3)
    [bf16_|fp16_]zero_pp_rank_<R>_mp_rank_00_optim_states.pt    a rank's share of the optimizer (ZeRO 1 to 3)
    zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt, zero/optimizer_state.pt     a universal checkpoint

Refused, since no file tells how the parts fit together: tensor and pipeline parallel runs (`mp_rank_01`,
`layer_<N>-model_<M>-model_states.pt`), experts (`layer_<N>_expert_<E>_..`, `expp_rank_<R>_..`).
Source: deepspeed 0.19 `runtime/engine.py` (`_get_ckpt_name`, `_get_rank_zero_ckpt_name`,
`_get_expert_ckpt_name`), `runtime/pipe/module.py` (`ckpt_layer_path`), `checkpoint/ds_to_universal.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptconv.errors import CkptError, FormatError
from ckptconv.rawtree import DictNode

_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,9})_)?mp_rank_(\d{1,9})_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_|fp16_|)zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_optim_states\.pt")
_PARALLEL = re.compile(r"(?:layer_\d+|expert_\d+|expp_rank_\d+).*_states\.pt")
_UNIVERSAL = re.compile(r"zero/([^/]+)/([^/]+)\.pt")
COMMON = "zero/optimizer_state.pt"

_WHOLE = "Load the run with DeepSpeed and save a universal checkpoint of it (ds_to_universal)."
_COPY = "Copy the whole folder again: each rank leaves files of its own."


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Names of the files, those of ranks in the order of ranks."""

    models: tuple[str, ...]
    optimizers: tuple[str, ...] = ()
    universal: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Parameter -> what is kept of it -> file."""
    by_rank: bool = False
    """Whether each rank has a file of the model (ZeRO 3)."""

    @classmethod
    def of(cls, folder: DictNode) -> Files:
        """The files of the folder.

        Raises: unsupported-feature, missing-file, corrupt-file.
        """
        models: dict[int | None, str] = {}
        optimizers: dict[str, dict[int, str]] = {}
        universal: dict[str, dict[str, str]] = {}
        for name in (key for key in folder.keys if isinstance(key, str)):
            if told := _MODEL.fullmatch(name):
                _refuse_parallel(name, int(told[2]))
                models[None if told[1] is None else int(told[1])] = name
            elif told := _OPTIMIZER.fullmatch(name):
                _refuse_parallel(name, int(told[3]))
                optimizers.setdefault(told[1], {})[int(told[2])] = name
            elif told := _UNIVERSAL.fullmatch(name):
                universal.setdefault(told[1], {})[told[2]] = name
            elif _PARALLEL.fullmatch(name):
                _refuse_parallel(name, None)
        if len(optimizers) > 1:
            kinds = " and ".join(f"'{min(files.values())}'" for files in optimizers.values())
            raise FormatError.of(
                "corrupt-file",
                f"there are {kinds}: files of two runs, one saved over the other",
                "Remove those that the newer run did not write.",
                loc=(min(next(iter(optimizers.values())).values()),),
            )
        shares = next(iter(optimizers.values()), {})
        _refuse_gaps(shares, "zero_pp_rank_{}_mp_rank_00_optim_states.pt")
        if None in models:
            return cls(models=(models[None],), optimizers=_ranked(shares), universal=universal)
        ranks = {rank: name for rank, name in models.items() if rank is not None}
        _refuse_gaps(ranks, "zero_pp_rank_{}_mp_rank_00_model_states.pt")
        if not ranks:
            raise _missing("mp_rank_00_model_states.pt", "the model's states are not there")
        if shares and len(shares) != len(ranks):
            message = f"{len(ranks)} ranks left a model file, {len(shares)} an optimizer file"
            raise _missing(f"zero_pp_rank_{min(len(ranks), len(shares))}", message)
        return cls(models=_ranked(ranks), optimizers=_ranked(shares), universal=universal, by_rank=True)

    def refuse_other_count(self, stated: Iterable[int]) -> None:
        """Raises: missing-file where there are not as many ranks; unsupported-feature for experts."""
        counts = set(stated)
        if len(counts) > 1:
            raise FormatError.of(
                "unsupported-feature",
                f"groups of parameters are cut into {sorted(counts)} parts: experts with ranks of their own",
                _WHOLE,
                loc=(self.optimizers[0], "partition_count"),
            )
        if counts and counts != {len(self.optimizers)}:
            message = f"the optimizer is cut into {counts.pop()} parts, {len(self.optimizers)} are there"
            raise _missing(f"zero_pp_rank_{len(self.optimizers)}_mp_rank_00_optim_states.pt", message)


def _ranked(files: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(files[rank] for rank in sorted(files))


def _refuse_gaps(files: Mapping[int, str], pattern: str) -> None:
    for rank in range(len(files)):
        if rank not in files:
            raise _missing(pattern.format(rank), f"rank {max(files)} left a file, rank {rank} did not")


def _refuse_parallel(name: str, rank: int | None) -> None:
    if rank == 0:
        return
    what = (
        "is of a tensor or pipeline parallel run"
        if rank is not None
        else "holds layers or experts by themselves"
    )
    raise FormatError.of(
        "unsupported-feature",
        f"'{name}' {what}: nothing tells how its tensors fit together",
        _WHOLE,
        loc=(name,),
    )


def _missing(name: str, message: str) -> CkptError:
    return FormatError.of("missing-file", message, _COPY, loc=(name,))
