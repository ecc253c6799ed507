"""Which folders are one checkpoint, by the files that only their producer writes: one row each.

Patterns are those of `fnmatch`, of names in the folder itself; with a slash, of names one directory below.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """One way in which a training program leaves a folder."""

    name: str
    marks: tuple[str, ...]
    """Names of which one is enough: no other producer writes it. The first one there is written last."""
    below: tuple[str, ...] = ()
    """Directories that belong to the checkpoint; others are left alone, and said to be there."""
    parts: tuple[str, ...] = ()
    """Directories that are one member each: folders of torch.distributed.checkpoint."""
    only: str | None = None
    """Where the one file of this name is the whole checkpoint, it is what the folder stands for."""
    summary: str
    source: str
    """Where the producer's writer stands."""


_FSDP = ("pytorch_model_fsdp_[0-9]*", "optimizer_[0-9]*")
"""accelerate's sharded model and optimizer (utils/fsdp_utils.py)."""


def _deepspeed(tag: str) -> tuple[str, ...]:
    """The directories of one tag in a trainer's folder."""
    return (tag, f"{tag}/zero", f"{tag}/zero/*")


PRODUCERS: tuple[Producer, ...] = (
    Producer(
        name="hf-trainer",
        marks=("trainer_state.json", "training_args.bin"),
        below=_deepspeed("global_step[0-9]*"),
        parts=_FSDP,
        summary="transformers.Trainer, checkpoint-N/",
        source="transformers 5.24 trainer.py _save_checkpoint",
    ),
    Producer(
        name="accelerate",
        marks=("random_states_[0-9]*.pkl", "optimizer.bin"),
        below=(
            *("unet", "unet_ema", "transformer", "transformer_ema", "controlnet", "text_encoder"),
            *_deepspeed("pytorch_model"),
        ),
        parts=_FSDP,
        summary="accelerate.Accelerator.save_state",
        source="accelerate 1.15 checkpointing.py save_accelerator_state",
    ),
    Producer(
        name="deepspeed",
        marks=(
            "mp_rank_[0-9]*_model_states.pt",
            "zero_pp_rank_[0-9]*_mp_rank_[0-9]*_model_states.pt",
            "zero_pp_rank_[0-9]*_mp_rank_[0-9]*_optim_states.pt",
            "bf16_zero_pp_rank_[0-9]*_mp_rank_[0-9]*_optim_states.pt",
        ),
        below=("zero", "zero/*"),
        summary="DeepSpeed's folder of one tag, ZeRO 0 to 3, and universal checkpoints",
        source="deepspeed runtime/engine.py save_checkpoint",
    ),
    Producer(
        name="megatron",
        marks=("mp_rank_[0-9]*/model_optim_rng.pt", "mp_rank_[0-9]*/model_rng.pt"),
        below=("mp_rank_[0-9]*",),
        only="mp_rank_[0-9]*/model_optim_rng.pt",
        summary="Megatron-LM's iter_N/",
        source="megatron/training/checkpointing.py get_checkpoint_name",
    ),
    Producer(
        name="diffusers",
        marks=("model_index.json",),
        below=("*",),
        summary="a diffusers pipeline",
        source="diffusers pipelines/pipeline_utils.py save_pretrained",
    ),
    Producer(
        name="peft",
        marks=("adapter_config.json",),
        summary="a PEFT adapter: adapter_model and its configuration",
        source="peft peft_model.py save_pretrained",
    ),
    Producer(
        name="transformers",
        marks=("pytorch_model.bin.index.json",),
        summary="save_pretrained in several .bin files",
        source="transformers modeling_utils.py save_pretrained",
    ),
)

MEMBERS: tuple[tuple[str, str], ...] = (
    ("*.safetensors", "safetensors"),
    ("tokenizer.json", "bytes"),
    ("vocab.json", "bytes"),
    ("*.json", "json"),
    ("*.pt", "pytorch"),
    ("*.pth", "pytorch"),
    ("*.bin", "pytorch"),
    ("*.pkl", "pytorch"),
    ("*", "bytes"),
)
"""Pattern of a member's name -> how it is read, the first that fits; what is no `pytorch` file is bytes."""
