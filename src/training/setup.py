"""Builds the training step from a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from mindspore import nn, ops

from src.build import accelerate, build_model, compiled_library, image_size
from src.config import Config
from src.distributed import Ranks
from src.errors import join_names
from src.models.sync_batchnorm import synchronise_batchnorm
from src.training.freeze import freeze
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import build_optimizer
from src.training.preprocess import Preprocess
from src.training.schedule import learning_rates
from src.training.train_loader import TrainLoader
from src.training.train_step import TrainStep
from src.weights import load_weights
from src.weights.origin import are_same_classes, class_names_of


@dataclass
class TrainingSetup:
    """What is built once for a run.

    Args:
        step: the training step.
        learning_rates: float32 [total steps].
        frozen: cells that stay in evaluation mode.
        num_parameters: trainable parameters of the network before freezing.
        notes: lines for the log.
    """

    step: TrainStep
    learning_rates: np.ndarray
    frozen: list[nn.Cell]
    num_parameters: int
    notes: list[str] = field(default_factory=list)

    def set_train(self) -> None:
        """Set training mode, except for frozen cells and the moving average."""
        self.step.set_train(True)
        for cell in self.frozen:
            cell.set_train(False)
        if self.step.ema_net is not None:
            self.step.ema_net.set_train(False)


def build_training(
    config: Config, ranks: Ranks, loader: TrainLoader, finetune: str | None
) -> TrainingSetup:
    """Build the training step with rank 0's weights on every rank.

    Args:
        config: the configuration, with resolved classes.
        ranks: the ranks that share every step.
        loader: the training batches.
        finetune: a weight file to start from, or None.

    Raises:
        UserError: invalid model keys, or weights that do not fit.
    """
    notes: list[str] = []
    net = build_model(config)
    num_parameters = sum(p.size for p in net.trainable_params())
    if finetune is not None:
        notes += load_pretrained(net, finetune, config)
    if config.training.sync_batchnorm and ranks.world > 1:
        synchronise_batchnorm(net, ranks.world)
    ranks.broadcast(net.get_parameters())
    accelerate(net, config.runtime)
    frozen = freeze(net, config.training.freeze)
    ema_net = None
    if config.training.ema_decay > 0:
        ema_net = accelerate(build_model(config), config.runtime)
        weights = {weight.name: weight for weight in net.get_parameters()}
        for average in ema_net.get_parameters():
            average.set_data(weights[average.name].copy())
        ema_net.update_parameters_name("ema.")
        ema_net.set_train(False)
    rates = _learning_rates(config, loader, notes)
    optimizer = build_optimizer(config.optimizer, net.trainable_params())
    scale = config.training.loss_scale
    step = TrainStep(
        net,
        LabelSmoothingCrossEntropy(config.training.label_smoothing),
        optimizer,
        rates,
        clip_norm=config.optimizer.clip_norm,
        ema_net=ema_net,
        ema_decay=config.training.ema_decay,
        loss_scale=None if scale == "dynamic" else scale,
        accumulate=config.training.accumulate,
        preprocess=Preprocess(
            image_size(config.model),
            config.data.mean,
            config.data.std,
            erasing=config.augment.erasing_prob > 0,
        ),
        mixing=bool(loader.mixing),
        seed=config.runtime.seed,
        rank=ranks.rank,
        world=ranks.world,
        library=compiled_library(config.runtime),
    )
    if frozen:
        trained = sum(p.size for p in optimizer.parameters)
        notes.append(f"{trained:,} parameters are trained, the others are frozen")
    return TrainingSetup(step, rates, frozen, num_parameters, notes)


def _learning_rates(config: Config, loader: TrainLoader, notes: list[str]) -> np.ndarray:
    keys, images = config.optimizer, loader.images_per_step
    peak = keys.lr * images / (keys.lr_batch_size or images)
    if keys.lr_batch_size is not None:
        notes.append(
            f"learning rate {peak:.3e}: {keys.lr:.3e} at {keys.lr_batch_size} images, scaled to "
            f"{images} images per step ({loader.ranks.world} devices x "
            f"{config.training.batch_size} images x {config.training.accumulate} accumulated)"
        )
    if keys.warmup_epochs >= config.training.epochs:
        notes.append(
            f"optimizer.warmup_epochs {keys.warmup_epochs}: not below training.epochs "
            f"{config.training.epochs}, so the learning rate never reaches {peak:.3e}"
        )
    if peak < keys.min_lr and keys.decay_epochs != 0:
        notes.append(
            f"optimizer.min_lr {keys.min_lr:.3e} is above the learning rate {peak:.3e}, which "
            "therefore rises; lower it"
        )
    return learning_rates(
        peak=peak,
        warmup_start=keys.warmup_lr,
        minimum=keys.min_lr,
        epochs=config.training.epochs,
        warmup_epochs=keys.warmup_epochs,
        steps_per_epoch=loader.steps_per_epoch,
        per=keys.schedule_per,
        decay_epochs=keys.decay_epochs,
    )


def load_pretrained(net: nn.Cell, file: str, config: Config) -> list[str]:
    """Load weights to fine-tune; keep the new head if its shape or its class names differ.

    Returns:
        Lines for the log.
    """
    fresh = {p.name: p.value().copy() for p in net.get_parameters() if p.name[:5] == "head."}
    notes = [str(load_weights(net, file, new_head=True))]
    names = class_names_of(file, log=notes.append)
    if names is not None and not are_same_classes(names, config.data.class_names):
        for parameter in net.get_parameters():
            if parameter.name in fresh:
                ops.assign(parameter, fresh[parameter.name])
        notes.append(f"new head: the weights' classes were {join_names(names)}")
    return notes
