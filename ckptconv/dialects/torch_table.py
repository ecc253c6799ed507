"""The PyTorch training dictionaries that a known program writes: one row each, see `torch_rows`.

Every convention was read in the producer's source at the place named in its row, both where it saves and
where it resumes. A file that no row knows is a plain loop's, whose counters stay ambiguous.
"""

from __future__ import annotations

from ckptconv.dialects.megatron_forms import rule
from ckptconv.dialects.torch_rows import ANY, ATTRIBUTES, LAST, Counter, Row, Signature, When

_FIT = ("loops", "fit_loop")

LIGHTNING = Row(
    name="lightning",
    summary="checkpoint of a Lightning trainer: model, optimizers, schedulers, loops",
    producer="Lightning",
    signature=Signature(has=(("state_dict",), ("pytorch-lightning_version",)), score=100),
    models=(("state_dict",),),
    optimizers=(("optimizer_states", ANY),),
    schedulers=(("lr_schedulers", ANY),),
    scaler=(
        ("MixedPrecision",),
        ("MixedPrecisionPlugin",),
        ("NativeMixedPrecisionPlugin",),
        ("native_amp_scaling_state",),
    ),
    counters=(
        Counter(key=("global_step",), counts="updates"),
        Counter(key=(*_FIT, "epoch_progress", "current", "processed"), counts="epochs"),
        Counter(key=(*_FIT, "epoch_loop.batch_progress", "current", "processed"), counts="batch_in_epoch"),
        Counter(key=(*_FIT, "epoch_loop.batch_progress", "total", "processed"), counts="iterations"),
    ),
    source="https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/pytorch/trainer/"
    "connectors/checkpoint_connector.py",
)
"""What `lightning` reads: its loops, which need more than a row, stand in `lightning_loops`."""

TORCHTITAN = Row(
    name="torchtitan",
    summary="torchtitan: weights at the root, optimizer, lr_scheduler, dataloader, train_state",
    producer="torchtitan",
    signature=Signature(has=(("train_state", "step"), ("optimizer",), ("dataloader",))),
    models=(("model",),),
    optimizers=(("optimizer",),),
    schedulers=(("lr_scheduler",),),
    schedule_unit="update",
    counters=(Counter(key=("train_state", "step"), counts="updates"),),
    source="https://github.com/pytorch/torchtitan/blob/main/torchtitan/trainer.py",
)
"""Folders of torch.distributed.checkpoint, and what `dcp_to_torch_save` makes of one (`torch_titan`)."""

MEGATRON = Row(
    name="megatron",
    summary="Megatron-LM: model, optimizer, opt_param_scheduler, iteration, args; torch and torch_dist",
    producer="Megatron-LM",
    signature=Signature(
        has=(("checkpoint_version",), ("iteration",)),
        one_of=(("model",), ("opt_param_scheduler",), ("optimizer",)),
        score=96,
    ),
    models=(("model",),),
    optimizers=(("optimizer",), ("optimizer", ANY), ("optimizer", ANY, "optimizer")),
    rule=rule,
    scaler=(("optimizer", "grad_scaler"), ("optimizer", 0, "grad_scaler")),
    counters=(
        Counter(key=("iteration",), counts="updates"),
        Counter(key=("args", ATTRIBUTES, "consumed_train_samples"), counts="samples"),
        Counter(key=("opt_param_scheduler", "num_steps"), counts="samples"),
    ),
    source="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/checkpointing.py",
)
"""Files of one rank (`megatron`) and folders of torch_dist (`dcp_megatron`)."""

DEEPSPEED = Row(
    name="deepspeed",
    summary="DeepSpeed's folder of one tag: ZeRO 0 to 3 joined from its ranks, universal checkpoints",
    producer="DeepSpeed",
    signature=Signature(has=(("ds_version",), ("global_steps",), ("module",)), score=96),
    models=(("module",),),
    optimizers=(("optimizer",), ("optimizer", "optimizer_state_dict")),
    schedulers=(("lr_scheduler",),),
    scaler=(("deepspeed.scaler",), ("optimizer", "cur_scale")),
    schedule_unit="update",
    counters=(
        Counter(key=("global_steps",), counts="updates"),
        Counter(key=("lr_scheduler", "last_batch_iteration"), counts="updates", plus=-1),
        Counter(key=("skipped_steps",), counts="skipped_steps"),
        Counter(key=("global_samples",), counts="samples"),
    ),
    updates_before=1,
    source="https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/engine.py",
)
"""What `deepspeed` reads of a folder that it has gathered, or of the model file alone."""

HF_TRAINER = Row(
    name="hf-trainer",
    summary="folder of a transformers Trainer: checkpoint-N/",
    producer="transformers",
    signature=Signature(one_of=(("trainer_state.json",), ("training_args.bin",)), score=100),
    scaler=(("scaler.pt",),),
    schedule_unit="update",
    counters=(
        Counter(key=("trainer_state.json", "global_step"), counts="updates"),
        Counter(key=("scheduler.pt", "last_epoch"), counts="updates"),
        Counter(key=("trainer_state.json", "epoch"), counts="epochs"),
        Counter(
            key=("trainer_state.json", "num_input_tokens_seen"),
            counts="tokens",
            unset=(0, "the Trainer was not told to count tokens"),
        ),
    ),
    source="https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py",
)
"""What `hf_trainer` reads of a folder."""

ACCELERATE = Row(
    name="accelerate",
    summary="folder of accelerate's Accelerator.save_state",
    producer="accelerate",
    signature=Signature(one_of=(("random_states_0.pkl",), ("optimizer.bin",)), score=100),
    scaler=(("scaler.pt",),),
    counters=(
        Counter(key=("optimizer.bin", "state", ANY, "step"), counts="updates"),
        Counter(key=("dl_state_dict.bin", "_num_yielded"), counts="batch_in_epoch"),
    ),
    source="https://github.com/huggingface/accelerate/blob/main/src/accelerate/checkpointing.py",
)
"""What `accelerate` reads of a folder; the `step` in its `random_states_0.pkl` is no progress."""

ROWS: tuple[Row, ...] = (
    Row(
        name="timm",
        summary="timm training script: state_dict, state_dict_ema, optimizer, amp_scaler",
        producer="timm",
        signature=Signature(
            has=(("state_dict",), ("arch",), ("epoch",)),
            one_of=(("version",), ("metric",), ("args",), ("state_dict_ema",), ("amp_scaler",), ("amp",)),
            score=91,
        ),
        models=(("state_dict",), ("state_dict_ema",)),
        optimizers=(("optimizer",),),
        schedulers=(("lr_scheduler",),),
        scaler=(("amp_scaler",),),
        counters=(
            Counter(key=("epoch",), counts="epochs", when=When(file="recovery-*-*.pth.tar")),
            Counter(key=("epoch",), counts="epochs", plus=-1, when=When(key=("version",), at_least=2)),
            Counter(key=("saver", "pending", 0), counts="epochs", plus=-1),
            Counter(key=("epoch",), counts="epochs", when=When(key=("version",), below=2)),
        ),
        source="https://github.com/huggingface/pytorch-image-models/blob/main/timm/utils/checkpoint_saver.py",
    ),
    Row(
        name="torchvision",
        summary="torchvision references, DeiT, MAE, DETR: model, optimizer, lr_scheduler, args",
        producer="torchvision references",
        signature=Signature(
            has=(("model",), ("epoch",), ("optimizer",)), named=((("args",), "argparse.Namespace"),)
        ),
        models=(("model",), ("model_ema",)),
        optimizers=(("optimizer",),),
        schedulers=(("lr_scheduler",),),
        scaler=(("scaler",),),
        counters=(Counter(key=("epoch",), counts="epochs", plus=-1),),
        source="https://github.com/pytorch/vision/blob/main/references/classification/train.py",
    ),
    Row(
        name="imagenet",
        summary="the PyTorch ImageNet example and its copies: arch, state_dict, best_acc1",
        producer="pytorch/examples imagenet",
        signature=Signature(
            has=(("epoch",), ("arch",), ("state_dict",)), one_of=(("best_acc1",), ("best_prec1",)), score=92
        ),
        models=(("state_dict",),),
        optimizers=(("optimizer",),),
        schedulers=(("scheduler",),),
        schedule_unit="epoch",
        counters=(Counter(key=("epoch",), counts="epochs"),),
        source="https://github.com/pytorch/examples/blob/main/imagenet/main.py",
    ),
    Row(
        name="mmengine",
        summary="MMEngine runner: meta, state_dict, optimizer, param_schedulers, message_hub",
        producer="MMEngine",
        signature=Signature(
            has=(("meta",), ("state_dict",)),
            one_of=(("message_hub",), ("meta", "mmengine_version")),
            score=93,
        ),
        models=(("state_dict",), ("ema_state_dict",)),
        optimizers=(("optimizer",), ("optimizer", ANY)),
        schedulers=(("param_schedulers", ANY), ("param_schedulers", ANY, ANY)),
        scaler=(("optimizer", "loss_scaler"), ("optimizer", ANY, "loss_scaler")),
        counters=(
            Counter(key=("meta", "epoch"), counts="epochs"),
            Counter(key=("message_hub", "runtime_info", "epoch"), counts="epochs", plus=-1),
            Counter(key=("meta", "iter"), counts="iterations"),
            Counter(key=("message_hub", "runtime_info", "iter"), counts="iterations", plus=-1),
        ),
        source="https://github.com/open-mmlab/mmengine/blob/main/mmengine/runner/runner.py",
    ),
    Row(
        name="mmcv",
        summary="MMCV 1.x runner: meta, state_dict, optimizer",
        producer="MMCV",
        signature=Signature(has=(("meta", "mmcv_version"), ("state_dict",))),
        models=(("state_dict",),),
        optimizers=(("optimizer",), ("optimizer", ANY)),
        scaler=(("meta", "fp16", "loss_scaler"),),
        counters=(
            Counter(key=("meta", "epoch"), counts="epochs", plus=1, when=When(file="iter_*.pth")),
            Counter(key=("meta", "epoch"), counts="epochs"),
            Counter(key=("meta", "iter"), counts="iterations", plus=-1, when=When(file="iter_*.pth")),
            Counter(key=("meta", "iter"), counts="iterations"),
        ),
        source="https://github.com/open-mmlab/mmcv/blob/1.x/mmcv/runner/iter_based_runner.py",
    ),
    Row(
        name="detectron2",
        summary="Detectron2 trainer: model, trainer (iteration, optimizer, scheduler), iteration",
        producer="Detectron2",
        signature=Signature(has=(("model",), ("trainer", "iteration"), ("iteration",))),
        models=(("model",), ("ema_state",)),
        optimizers=(("trainer", "_trainer", "optimizer"), ("trainer", "optimizer"), ("optimizer",)),
        schedulers=(("trainer", "hooks", "LRScheduler"), ("scheduler",)),
        scaler=(("trainer", "_trainer", "grad_scaler"), ("trainer", "grad_scaler")),
        schedule_unit="update",
        counters=(
            Counter(key=("iteration",), counts="updates", plus=-1),
            Counter(key=("trainer", "iteration"), counts="updates", plus=-1),
            Counter(key=("trainer", "_trainer", "iteration"), counts="updates", plus=-1),
        ),
        source="https://github.com/facebookresearch/detectron2/blob/main/detectron2/engine/train_loop.py",
    ),
    Row(
        name="fvcore",
        summary="fvcore Checkpointer, Detectron2 before 0.3: model, optimizer, scheduler, iteration",
        producer="fvcore",
        signature=Signature(
            has=(("model",), ("optimizer",), ("iteration",)),
            file=("model_[0-9][0-9][0-9][0-9][0-9][0-9][0-9].pth", "model_final.pth"),
        ),
        models=(("model",),),
        optimizers=(("optimizer",),),
        schedulers=(("scheduler",),),
        scaler=(("grad_scaler",),),
        schedule_unit="update",
        counters=(Counter(key=("iteration",), counts="updates", plus=-1),),
        source="https://github.com/facebookresearch/fvcore/blob/main/fvcore/common/checkpoint.py",
    ),
    Row(
        name="ultralytics",
        summary="Ultralytics YOLO: whole pickled modules, ema, updates, train_args",
        producer="Ultralytics",
        signature=Signature(
            has=(("epoch",), ("date",)),
            one_of=(("train_args",), ("opt",), ("updates",), ("ema",)),
            score=94,
        ),
        models=(("model",), ("ema",)),
        optimizers=(("optimizer",),),
        scaler=(("scaler",),),
        counters=(
            Counter(
                key=("epoch",),
                counts="epochs",
                plus=-1,
                unset=(-1, "it was stripped of the optimizer: a finished model, no run"),
            ),
            Counter(key=("updates",), counts="updates"),
        ),
        source="https://github.com/ultralytics/ultralytics/blob/main/ultralytics/engine/trainer.py",
    ),
    Row(
        name="fairseq",
        summary="fairseq trainer: model, optimizer_history, last_optimizer_state, extra_state",
        producer="fairseq",
        signature=Signature(has=(("model",), ("optimizer_history",), ("extra_state",)), score=95),
        models=(("model",), ("extra_state", "ema")),
        optimizers=(("last_optimizer_state",),),
        scaler=(("last_optimizer_state", "loss_scale"),),
        counters=(
            Counter(key=("optimizer_history", LAST, "num_updates"), counts="updates"),
            Counter(key=("extra_state", "train_iterator", "epoch"), counts="epochs", plus=1),
            Counter(key=("extra_state", "train_iterator", "iterations_in_epoch"), counts="batch_in_epoch"),
        ),
        source="https://github.com/facebookresearch/fairseq/blob/main/fairseq/trainer.py",
    ),
    Row(
        name="ignite",
        summary="PyTorch-Ignite Checkpoint handler: trainer, model, optimizer",
        producer="PyTorch-Ignite",
        signature=Signature(
            has=(("trainer", "iteration"), ("trainer", "epoch_length")),
            one_of=(("trainer", "max_epochs"), ("trainer", "max_iters")),
        ),
        models=(("model",), ("ema_model",), ("model_ema",)),
        optimizers=(("optimizer",),),
        schedulers=(("lr_scheduler",), ("scheduler",)),
        scaler=(("scaler",), ("grad_scaler",)),
        counters=(
            Counter(
                key=("trainer", "iteration"),
                counts="iterations",
                per_epoch=("trainer", "epoch_length"),
            ),
        ),
        source="https://github.com/pytorch/ignite/blob/master/ignite/engine/engine.py",
    ),
    Row(
        name="nanogpt",
        summary="nanoGPT: model, optimizer, model_args, iter_num, config",
        producer="nanoGPT",
        signature=Signature(has=(("model",), ("model_args",), ("iter_num",), ("optimizer",))),
        models=(("model",),),
        optimizers=(("optimizer",),),
        counters=(Counter(key=("iter_num",), counts="updates"),),
        tokens_per_update=(
            ("config", "batch_size"),
            ("config", "block_size"),
            ("config", "gradient_accumulation_steps"),
        ),
        source="https://github.com/karpathy/nanoGPT/blob/master/train.py",
    ),
    Row(
        name="open-clip",
        summary="open_clip training: epoch, name, state_dict, optimizer, scaler",
        producer="open_clip",
        signature=Signature(
            has=(("epoch",), ("name",), ("state_dict",)),
            only=("epoch", "name", "state_dict", "optimizer", "scaler", "ckptconv"),
        ),
        models=(("state_dict",),),
        optimizers=(("optimizer",),),
        scaler=(("scaler",),),
        counters=(Counter(key=("epoch",), counts="epochs"),),
        source="https://github.com/mlfoundations/open_clip/blob/main/src/open_clip_train/main.py",
    ),
    Row(
        name="composer",
        summary="MosaicML Composer: state (timestamp, model, optimizers by class, schedulers), rng",
        producer="Composer",
        signature=Signature(has=(("state", "timestamp", "Timestamp"), ("state", "model"))),
        models=(("state", "model"),),
        optimizers=(("state", "optimizers", ANY),),
        schedulers=(("state", "schedulers", ANY),),
        scaler=(("state", "scaler", ANY),),
        counters=(
            Counter(key=("state", "timestamp", "Timestamp", "batch"), counts="updates"),
            Counter(key=("state", "timestamp", "Timestamp", "epoch"), counts="epochs"),
            Counter(key=("state", "timestamp", "Timestamp", "epoch_in_iteration"), counts="epochs"),
            Counter(key=("state", "timestamp", "Timestamp", "batch_in_epoch"), counts="batch_in_epoch"),
            Counter(key=("state", "timestamp", "Timestamp", "sample"), counts="samples"),
            Counter(
                key=("state", "timestamp", "Timestamp", "token"),
                counts="tokens",
                unset=(0, "no token was counted"),
            ),
        ),
        within_epoch=(
            ("state", "timestamp", "Timestamp", "sample_in_epoch"),
            ("state", "timestamp", "Timestamp", "token_in_epoch"),
        ),
        source="https://github.com/mosaicml/composer/blob/main/composer/core/time.py",
    ),
)

TABLE: tuple[Row, ...] = (LIGHTNING, HF_TRAINER, ACCELERATE, TORCHTITAN, MEGATRON, DEEPSPEED, *ROWS)
"""Every row, for people."""
