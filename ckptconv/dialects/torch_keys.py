"""The spellings that people use in PyTorch training dictionaries: one table per meaning.

Sources: the loops of pytorch/examples, torchvision references, timm, nanoGPT, fvcore and the tutorials of
pytorch.org; `torch.optim` and `torch.amp` of torch 2.13 for the keys of their state_dicts.
"""

from __future__ import annotations

MODEL: tuple[str, ...] = (
    "model",
    "model_state_dict",
    "state_dict",
    "net",
    "network",
    "module",
    "weights",
    "model_state",
    "model_dict",
    "net_state_dict",
    "network_state_dict",
    "params",
)
"""Entries that hold the model, best first."""

OPTIMIZER: tuple[str, ...] = (
    "optimizer",
    "optimizer_state_dict",
    "optim",
    "opt",
    "optimizer_state",
    "optim_state_dict",
    "opt_state_dict",
)
"""Entries that hold the only optimizer. Others are recognised by their structure."""

SCHEDULER: tuple[str, ...] = (
    "scheduler",
    "lr_scheduler",
    "scheduler_state_dict",
    "lr_scheduler_state_dict",
    "lr_sched",
    "sched",
    "scheduler_state",
)

STEP: tuple[str, ...] = (
    "step",
    "global_step",
    "iteration",
    "iter",
    "iter_num",
    "steps",
    "n_iter",
    "num_updates",
    "global_steps",
    "iterations",
    "it",
)
"""Counters that may count updates, batches or backward passes, finished or begun."""

EPOCH: tuple[str, ...] = ("epoch", "current_epoch", "epochs", "n_epoch", "last_epoch")
"""Counters that may count finished epochs or name the last one; the first that is there is read."""

SAMPLES: tuple[str, ...] = ("samples_seen", "consumed_samples", "num_samples_seen")
TOKENS: tuple[str, ...] = ("tokens_seen", "ntokens_seen", "num_tokens_seen", "consumed_tokens")

SCALER: tuple[str, ...] = (
    "scaler",
    "amp_scaler",
    "grad_scaler",
    "scaler_state_dict",
    "scaler_state",
    "loss_scaler",
)
"""`torch.amp.GradScaler.state_dict()`."""

DATA: tuple[str, ...] = (
    "dataloader",
    "data_loader",
    "train_loader",
    "loader",
    "sampler",
    "dataloader_state_dict",
    "sampler_state_dict",
    "dataset_state",
)
"""Entries that hold a data loader's position."""

AVERAGE_WORDS: frozenset[str] = frozenset({"ema", "swa", "averaged", "average", "avg", "shadow"})
"""A dictionary of tensors under a key with one of these words is an average of the weights, not the model."""

AVERAGE_COUNTED: dict[str, str] = {"averaging_state": "state_dict"}
"""Entry with the count of an average -> the entry that holds the average: Lightning's `WeightAveraging`."""

GENERIC_WORDS: frozenset[str] = frozenset(
    {
        *("model", "net", "network", "module", "weights", "state", "dict", "params"),
        *("optimizer", "optim", "opt", "scheduler", "sched", "lr"),
    }
)
"""Words of a key that do not tell one of several models or optimizers from another."""

LIBRARIES: tuple[tuple[str, str], ...] = (
    ("cuda", "torch-cuda"),
    ("numpy", "numpy"),
    ("np", "numpy"),
    ("python", "python"),
    ("random", "python"),
    ("torch", "torch-cpu"),
    ("cpu", "torch-cpu"),
)
"""Word of a generator's key -> library, the first that fits."""

TORCH_CPU_RNG_NBYTES = 5056
"""Length of `torch.get_rng_state()`, which tells it from other byte tensors."""

BUFFERS: frozenset[str] = frozenset({"running_mean", "running_var", "num_batches_tracked", "n_averaged"})
"""Last components of names that are never parameters of an optimizer."""

CELL: frozenset[str] = frozenset({"weight_ih", "weight_hh", "bias_ih", "bias_hh"})
"""Last components of names that only recurrent cells have."""

FSDP = "_fsdp_wrapped_module"
MARKS: frozenset[str] = frozenset({"_orig_mod", "_checkpoint_wrapped_module", FSDP, "_forward_module"})
"""Components that wrappers put into parameter names; nobody names a module so."""

FLAT: frozenset[str] = frozenset({"_flat_param", "flat_param"})
"""Last components of names that FSDP gives to several parameters in one."""

MASTER: tuple[str, ...] = ("master_param", "master_params", "master_weight", "fp32_param", "master")
"""Keys of a parameter's state that hold its float32 copy."""

SHAPED: frozenset[str] = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "step_size", "ax"),
        *MASTER,
    }
)
"""Keys of a parameter's state that always have the parameter's shape; others may not."""

HYPERPARAMETERS: tuple[tuple[str, str, int | None], ...] = (
    ("learning_rate", "lr", None),
    ("base_learning_rate", "initial_lr", None),
    ("beta_1", "betas", 0),
    ("beta_2", "betas", 1),
    ("epsilon", "eps", None),
    ("weight_decay", "weight_decay", None),
    ("momentum", "momentum", None),
    ("dampening", "dampening", None),
    ("nesterov", "nesterov", None),
    ("amsgrad", "amsgrad", None),
    ("maximize", "maximize", None),
)
"""Canonical name, key of a param_group, position in its tuple: what every algorithm of torch.optim shares."""

SWITCHES: frozenset[str] = frozenset(
    {
        *("params", "param_names", "foreach", "fused", "capturable", "differentiable"),
        *("decoupled_weight_decay", "wd_mult", "is_decoupled_lr", "is_expert_parallel", "default_config"),
    }
)
"""Keys of a param_group that choose an implementation or are read otherwise: no hyperparameters. Those of
Megatron say how it made the group: what `wd_mult` multiplies has been multiplied."""

SCHEDULER_MARKS: frozenset[str] = frozenset({"_step_count", "base_lrs", "_last_lr", "_schedulers"})
"""One of these stands in every scheduler's state_dict."""

MMENGINE_SCHEDULER: frozenset[str] = frozenset({"by_epoch", "last_step", "_global_step", "param_name"})
"""These stand together in the state_dict of a `_ParamScheduler` of MMEngine and nowhere else."""

SCHEDULER_BOOKKEEPING: frozenset[str] = frozenset(
    {
        "last_epoch",
        "_step_count",
        "_is_initial",
        "_get_lr_called_within_step",
        "verbose",
        "_last_lr",
        "base_lrs",
    }
)
"""Keys that are no parameters of the family."""
