"""A training run: epochs of steps, an evaluation after each, and the files that tell of it.

An own loop and not `mindspore.train.Model`, because each epoch is a pipeline of its own, seeded by
(seed, epoch), which is what makes a resumed run equal to one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from src.command_line import load_config, run_config_of
from src.config import Config
from src.data import Source, train_batches
from src.errors import UserError
from src.evaluation.evaluator import Evaluator
from src.recipe import (
    build_augmentation,
    build_model,
    build_preprocessing,
    open_split,
)
from src.reporting.figures import write_text
from src.reporting.plots import plot_curves
from src.reporting.progress import progress_bar
from src.training.freeze import freeze
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import SGD, AdamW
from src.training.schedule import learning_rates
from src.training.train_step import TrainStep
from src.weights import load_state, load_weights, save_checkpoint

logger = logging.getLogger("cvt")
LOG_SECONDS = 60.0  # between two lines within an epoch
SHOWN = {"train_loss": 4, "loss": 4, "top1": 2, "top5": 2}  # figures of an epoch, decimals


class Trainer:
    """Trains what a configuration describes; classes must be resolved.

    Args:
        config: the recipe.
        source: the training images.
        output: the run's folder.
        finetune: a weight file to start from; a head for other classes starts anew.
    """

    def __init__(
        self, config: Config, source: Source, output: Path, finetune: str | None = None
    ) -> None:
        self.config = config
        self.source = source
        self.output = output
        self.finetune = finetune
        self.load_report = self.new_head = None
        self.augmentation = build_augmentation(config, self.source.encoded)
        self.evaluator = Evaluator(
            open_split(config, "val"),
            build_preprocessing(config),
            config.evaluation.batch_size,
            config.data.workers,
        )
        self.steps_per_epoch = len(self._batches(0))
        self.learning_rates = learning_rates(
            peak=config.optimizer.lr,
            warmup_start=config.optimizer.warmup_lr,
            minimum=config.optimizer.min_lr,
            epochs=config.training.epochs,
            warmup_epochs=config.optimizer.warmup_epochs,
            steps_per_epoch=self.steps_per_epoch,
            per=config.optimizer.schedule_per,
        )
        self.step = self._build_step()
        self.rows: list[dict] = []
        self.best_top1 = -1.0
        self.compiled = False

    def _build_step(self) -> TrainStep:
        config = self.config
        net = build_model(config)
        self.parameters = sum(p.size for p in net.trainable_params())
        if self.finetune is not None:
            self._start_from(net, self.finetune)
        self.frozen = freeze(net, config.training.freeze)
        ema_net = None
        if config.training.ema_decay > 0:
            ema_net = build_model(config)
            for average, weight in zip(ema_net.get_parameters(), net.get_parameters()):
                average.set_data(weight.copy())
            ema_net.update_parameters_name("ema.")
            ema_net.set_train(False)
        keys, weights = config.optimizer, net.trainable_params()
        if keys.name == "sgd":
            optimizer = SGD(weights, keys.momentum, keys.weight_decay)
        else:
            optimizer = AdamW(weights, keys.betas, keys.eps, keys.weight_decay)
        return TrainStep(
            net,
            LabelSmoothingCrossEntropy(config.training.label_smoothing),
            optimizer,
            self.learning_rates,
            clip_norm=config.optimizer.clip_norm,
            ema_net=ema_net,
            ema_decay=config.training.ema_decay,
            loss_scale=config.training.loss_scale,
            seed=config.runtime.seed,
        )

    def _start_from(self, net: nn.Cell, file: str) -> None:
        """Load weights; the head stays new where it can't fit or is known to name other classes."""
        fresh = {p.name: p.value().copy() for p in net.get_parameters() if p.name[:5] == "head."}
        self.load_report = load_weights(net, file, new_head=True)
        run = run_config_of(file)
        names = load_config(run).data.class_names if run else None
        if names is not None and names != self.config.data.class_names:
            for parameter in net.get_parameters():
                if parameter.name in fresh:
                    ops.assign(parameter, fresh[parameter.name])
            self.new_head = f"the head starts anew: that run's classes were {', '.join(names)}"

    @property
    def evaluated_net(self):
        """The network whose accuracy counts: the moving average where there is one."""
        return self.step.net if self.step.ema_net is None else self.step.ema_net

    def _batches(self, epoch: int):
        return train_batches(
            self.source,
            self.augmentation,
            self.config.training.batch_size,
            seed=self.config.runtime.seed,
            epoch=epoch,
            workers=self.config.data.workers,
            repeats=self.config.augment.repeats,
        )

    def resume(self) -> None:
        """Take up the run in the output folder where its last checkpoint stands."""
        extra = load_state(self.step, self.output / "checkpoints" / "last.ckpt")
        self.best_top1 = extra["best_top1"]
        done = int(self.step.step.asnumpy()) // self.steps_per_epoch
        file = self.output / "metrics.jsonl"
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            self.rows = [row for row in rows if row["epoch"] <= done]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{file}: missing or damaged ({error}); can't resume") from None
        if len(self.rows) != done:
            raise UserError(f"{file}: has {len(self.rows)} epochs, last.ckpt {done}; can't resume")
        logger.info("resumed behind epoch %d", done)

    def fit(self) -> None:
        """Train to the last epoch."""
        self._announce()
        epochs = self.config.training.epochs
        for epoch in range(len(self.rows), epochs):
            start = time.perf_counter()
            loss, speed = self._train_epoch(epoch)
            step = (epoch + 1) * self.steps_per_epoch
            row = {
                "epoch": epoch + 1,
                "step": step,
                "lr": float(self.learning_rates[step - 1]),
                "train_loss": loss,
                **self._held_out(epoch),
                "images_per_second": speed,
                "seconds": time.perf_counter() - start,
            }
            self._keep(row)
            figures = [f"{k} {row[k]:.{n}f}" for k, n in SHOWN.items() if row[k] is not None]
            logger.info(
                "epoch %d/%d  %s  lr %.2e  %.0f img/s  %.1f s",
                epoch + 1, epochs, "  ".join(figures), row["lr"], speed, row["seconds"],
            )  # fmt: skip
        logger.info("best top1 %.2f; everything lies in %s", self.best_top1, self.output)

    def _held_out(self, epoch: int) -> dict[str, float | None]:
        """Loss and accuracy behind an epoch; nulls where it is not evaluated."""
        last = epoch + 1 == self.config.training.epochs
        if not last and (epoch + 1) % self.config.evaluation.every:
            return {"loss": None, "top1": None, "top5": None}
        metrics = self.evaluator.run(self.evaluated_net).metrics
        return {"loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}

    def _announce(self) -> None:
        batch = self.config.training.batch_size
        logger.info(
            "%s: %s parameters, %d classes; %d training images, %d held out; %d steps an epoch",
            self.config.model.name,
            f"{self.parameters:,}",
            self.config.model.num_classes,
            len(self.source),
            len(self.evaluator.batches.indices),
            self.steps_per_epoch,
        )
        if self.load_report is not None:
            logger.info("%s", self.load_report)
        if self.new_head is not None:
            logger.info("%s", self.new_head)
        if self.frozen:
            trained = sum(p.size for p in self.step.optimizer.parameters)
            logger.info("%s of the parameters are trained, the rest is frozen", f"{trained:,}")
        left_out = len(self.source) - self.steps_per_epoch * batch
        if left_out:
            logger.info(
                "%d images do not fill a batch of %d: each epoch leaves out others", left_out, batch
            )
        if not self.rows:
            logger.info("compiling the step; this takes seconds for cvt_nano, a minute for cvt_21")

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss and img/s (without compiling) of one epoch."""
        self.step.set_train(True)
        for cell in self.frozen:
            cell.set_train(False)
        if self.step.ema_net is not None:
            self.step.ema_net.set_train(False)
        batch_size = self.config.training.batch_size
        bar = progress_bar(self.steps_per_epoch * batch_size, f"epoch {epoch + 1}")
        losses: list[Tensor] = []
        start, timed, told = time.perf_counter(), 0, time.perf_counter()
        for images, labels in self._batches(epoch).iterate():
            loss, _ = self.step(images, labels)
            losses.append(loss)
            bar.update(batch_size)
            timed += batch_size
            if not self.compiled:
                loss.asnumpy()
                self.compiled, start, timed = True, time.perf_counter(), 0
            if time.perf_counter() - told > LOG_SECONDS:
                told = time.perf_counter()
                self._tell_step(epoch, len(losses), float(loss.asnumpy()), timed / (told - start))
        values = [float(loss.asnumpy()) for loss in losses]
        bar.close()
        for position, value in enumerate(values):
            self._require_finite(value, epoch * self.steps_per_epoch + position)
        return float(np.mean(values)), timed / max(time.perf_counter() - start, 1e-9)

    def _require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"step {step + 1}: the loss is not finite (learning rate "
                f"{self.learning_rates[step]:.2e}); lower optimizer.lr, or set optimizer.clip_norm"
            )

    def _tell_step(self, epoch: int, done: int, loss: float, speed: float) -> None:
        self._require_finite(loss, epoch * self.steps_per_epoch + done - 1)
        left = (self.steps_per_epoch - done) * self.config.training.batch_size / max(speed, 1e-9)
        logger.info(
            "epoch %d  step %d/%d  loss %.4f  %.0f img/s  %.0f s left in it",
            epoch + 1, done, self.steps_per_epoch, loss, speed, left,
        )  # fmt: skip

    def _keep(self, row: dict) -> None:
        """Write an epoch down: figures first, the state last, so that no resume lacks a row."""
        self.rows.append(row)
        text = "".join(json.dumps(each) + "\n" for each in self.rows)
        write_text(text, self.output / "metrics.jsonl")
        plot_curves(self.rows, self.output / "curves.png")
        checkpoints = self.output / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        if row["top1"] is not None and row["top1"] > self.best_top1:
            self.best_top1 = row["top1"]
            weights = {p.name.removeprefix("ema."): p for p in self.evaluated_net.get_parameters()}
            save_checkpoint(weights, checkpoints / "best.ckpt")
        state = {parameter.name: parameter for parameter in self.step.get_parameters()}
        save_checkpoint(state, checkpoints / "last.ckpt", best_top1=self.best_top1)
