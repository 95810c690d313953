"""Suggests a known key for an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# Names of keys in other training programs, which difflib would not match.
_ALIASES = {
    "lr": "optimizer.lr", "learning_rate": "optimizer.lr", "min_lr": "optimizer.min_lr",
    "weight_decay": "optimizer.weight_decay", "wd": "optimizer.weight_decay",
    "momentum": "optimizer.momentum", "opt": "optimizer.name", "optimizer": "optimizer.name",
    "warmup_epochs": "optimizer.warmup_epochs", "clip_grad": "optimizer.clip_norm",
    "epochs": "training.epochs", "num_epochs": "training.epochs", "epoch_size": "training.epochs",
    "b": "training.batch_size", "batch_size": "training.batch_size",
    "train_batch_size": "training.batch_size", "eval_batch_size": "evaluation.batch_size",
    "gradient_accumulation_steps": "training.accumulate", "accum_iter": "training.accumulate",
    "smoothing": "training.label_smoothing", "label_smoothing": "training.label_smoothing",
    "model_ema_decay": "training.ema_decay", "ema_decay": "training.ema_decay",
    "loss_scale": "training.loss_scale", "freeze": "training.freeze",
    "runtime": "runtime.device", "device": "runtime.device", "device_target": "runtime.device",
    "device_id": "runtime.device_id", "gpu": "runtime.device_id", "mode": "runtime.mode",
    "seed": "runtime.seed", "amp": "runtime.precision", "amp_level": "runtime.precision",
    "precision": "runtime.precision", "fp16": "runtime.precision",
    "data": "data.path", "data_dir": "data.path", "data_path": "data.path",
    "data_url": "data.path", "dataset": "data.source", "dataset_path": "data.path",
    "train_dir": "data.train_folder", "val_dir": "data.val_folder",
    "workers": "data.workers", "num_workers": "data.workers",
    "num_parallel_workers": "data.workers", "classes": "data.classes",
    "model": "model.name", "arch": "model.name", "model_name": "model.name",
    "num_classes": "model.num_classes", "img_size": "model.image_size",
    "image_size": "model.image_size", "input_size": "model.image_size",
    "drop_path": "model.drop_path_rate", "drop_path_rate": "model.drop_path_rate",
    "mixup": "augment.mixup", "cutmix": "augment.cutmix", "aa": "augment.rand_augment",
    "rand_augment": "augment.rand_augment", "reprob": "augment.erasing_prob",
    "color_jitter": "augment.color_jitter", "hflip": "augment.hflip",
    "pretrained": "finetune", "finetuning": "finetune", "pretrain_path": "finetune",
    "checkpoint": "ckpt", "checkpoint_path": "ckpt", "ckpt_path": "ckpt", "weights": "ckpt",
    "load_from": "ckpt", "resume_from": "resume", "output_dir": "output", "save_dir": "output",
    "out": "output", "train_url": "output", "work_dir": "output", "yml": "config", "cfg": "config",
    "config_path": "config", "topk": "top_k", "image": "input", "image_path": "input",
    "file_name": "output", "file_format": "format",
}  # fmt: skip


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """Return the known key that an unknown one probably means, or None."""
    alias = _ALIASES.get(key.replace("-", "_"))
    if alias in known:
        return alias
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return near[0] if near else None
