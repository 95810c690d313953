"""A training run: epochs of steps, an evaluation after each, and the files that tell of it.

An own loop and not `mindspore.train.Model`, because each epoch is a pipeline of its own, seeded by
(seed, epoch), which is what makes a resumed run equal to one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from pathlib import Path

import numpy as np
from mindspore import Tensor

from src.config import Config
from src.data import Source, train_batches
from src.errors import UserError
from src.evaluation.evaluator import Evaluator
from src.ranks import ALONE, Ranks
from src.recipe import (
    build_augmentation,
    build_mixing,
    build_preprocessing,
    image_size,
    open_checked,
)
from src.reporting.figures import write_text
from src.reporting.plots import plot_curves
from src.reporting.progress import progress_bar
from src.training.build import build_step, global_batch
from src.weights import load_state, save_checkpoint

logger = logging.getLogger("cvt")
LOG_SECONDS = 60.0  # between two lines within an epoch
MOST_SKIPPED = 20  # overflows in a row: more than halve the first dynamic scale down to 1
SHOWN = {"train_loss": 4, "loss": 4, "top1": 2, "top5": 2}  # figures of an epoch, decimals


class Trainer:
    """Trains what a configuration describes; classes must be resolved.

    Args:
        config: the recipe.
        source: the training images.
        output: the run's folder.
        finetune: a weight file to start from; a head for other classes starts anew.
        ranks: those that share every batch; the first one writes the run's files.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        output: Path,
        finetune: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.source = source
        self.output = output
        self.ranks = ranks
        self.augmentation = build_augmentation(config, self.source.encoded)
        self.mixing = build_mixing(config)
        self.evaluator = Evaluator(
            open_checked(config, "val", ranks, output),
            build_preprocessing(config),
            config.evaluation.batch_size,
            config.data.workers,
            ranks,
        )
        self.accumulate = config.training.accumulate
        self.steps_per_epoch = len(self._batches(0)) // self.accumulate
        self.global_batch = global_batch(config, ranks)
        self.built = build_step(config, ranks, self.steps_per_epoch, finetune)
        self.step, self.learning_rates = self.built.step, self.built.learning_rates
        self.rows: list[dict] = []
        self.done = 0  # epochs
        self.best_top1 = -1.0
        self.compiled = False

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
            rank=self.ranks.rank,
            world=self.ranks.world,
            workers=self.config.data.workers,
            repeats=self.config.augment.repeats,
            multiple=self.accumulate,
        )

    def resume(self) -> None:
        """Take up the run in the output folder where its last checkpoint stands."""
        if self.ranks.is_first:
            self._load_state()
        self.ranks.broadcast(self.step.get_parameters())
        self.best_top1 = float(self.ranks.gather([self.best_top1])[0, 0])
        self.done = int(self.step.step.asnumpy()) // self.steps_per_epoch
        logger.info("resumed behind epoch %d", self.done)

    def _load_state(self) -> None:
        extra = load_state(self.step, self.output / "checkpoints" / "last.ckpt")
        if extra["world"] != self.ranks.world:
            raise UserError(
                f"{self.output}: was trained on {extra['world']} devices, not {self.ranks.world}; "
                "resume on as many"
            )
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

    def fit(self) -> None:
        """Train to the last epoch."""
        self._announce()
        epochs = self.config.training.epochs
        for epoch in range(self.done, epochs):
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
        logger.info(
            "%s: %s parameters, %d classes; %d training images, %d held out; %d steps an epoch",
            self.config.model.name,
            f"{self.built.parameters:,}",
            self.config.model.num_classes,
            len(self.source),
            self.evaluator.images,
            self.steps_per_epoch,
        )
        for note in self.built.notes:
            logger.info("%s", note)
        left_out = len(self.source) - self.steps_per_epoch * self.global_batch
        if left_out:
            logger.info(
                "%d images do not fill a step of %d: each epoch leaves out others",
                left_out, self.global_batch,
            )  # fmt: skip
        if not self.done:
            logger.info("compiling the step; this takes seconds for cvt_nano, a minute for cvt_21")

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss and img/s (without compiling) of one epoch."""
        self.step.set_train(True)
        for cell in self.built.frozen:
            cell.set_train(False)
        if self.step.ema_net is not None:
            self.step.ema_net.set_train(False)
        bar = progress_bar(self.steps_per_epoch * self.global_batch, f"epoch {epoch + 1}")
        results: list[tuple[Tensor, Tensor]] = []
        start, timed, told = time.perf_counter(), 0, time.perf_counter()
        for position, (images, labels) in enumerate(self._batches(epoch).iterate()):
            mix = self._mix(epoch, position)
            result = self.step.take(images, labels, mix, position % self.accumulate)
            if result is None:
                continue
            results.append(result)
            bar.update(self.global_batch)
            timed += self.global_batch
            if not self.compiled:
                result[0].asnumpy()
                self.compiled, start, timed = True, time.perf_counter(), 0
            if time.perf_counter() - told > LOG_SECONDS:
                told = time.perf_counter()
                self._tell_step(epoch, results, timed / (told - start))
        losses = self._finite_losses(epoch, results)
        bar.close()
        return float(np.mean(losses)), timed / max(time.perf_counter() - start, 1e-9)

    def _mix(self, epoch: int, position: int) -> Tensor | None:
        """The mixing of a batch, another one on each rank."""
        if not self.mixing:
            return None
        key = (self.config.runtime.seed, epoch, position, self.ranks.rank)
        return Tensor(self.mixing.draw(image_size(self.config.model), *key))

    def _finite_losses(self, epoch: int, results: list[tuple[Tensor, Tensor]]) -> list[float]:
        """The losses of an epoch's steps so far that were not skipped.

        Raises:
            UserError: loss or gradients not finite; with a dynamic loss scale, where smaller scales
                have not helped.
        """
        losses, skipped = [], 0
        for position, (loss, norm) in enumerate(results):
            loss, norm = float(loss.asnumpy()), float(norm.asnumpy())
            if math.isfinite(loss) and math.isfinite(norm):
                losses.append(loss)
                skipped = 0
                continue
            skipped += 1
            if not self.step.dynamic or skipped > MOST_SKIPPED:
                step = epoch * self.steps_per_epoch + position
                raise UserError(
                    f"step {step + 1}: the loss is {loss}, the gradients' norm {norm} (learning "
                    f"rate {self.learning_rates[step]:.2e}); the weights are as before it. Lower "
                    "optimizer.lr, or set optimizer.clip_norm"
                )
        return losses or [math.nan]

    def _tell_step(self, epoch: int, results: list[tuple[Tensor, Tensor]], speed: float) -> None:
        loss, done = self._finite_losses(epoch, results)[-1], len(results)
        left = (self.steps_per_epoch - done) * self.global_batch / max(speed, 1e-9)
        logger.info(
            "epoch %d  step %d/%d  loss %.4f  %.0f img/s  %.0f s left in it",
            epoch + 1, done, self.steps_per_epoch, loss, speed, left,
        )  # fmt: skip

    def _require_equal_ranks(self) -> None:
        """Notice ranks that have drifted apart before anything of it is saved."""
        number = 0
        if self.ranks.world > 1:
            for parameter in self.step.get_parameters():
                number = zlib.crc32(parameter.asnumpy(), number)
            remedy = (
                "their weights have drifted apart, which is a fault of a device or of MindSpore"
            )
            self.ranks.require_agreement("weights", number, remedy)

    def _keep(self, row: dict) -> None:
        """Write an epoch down: figures first, the state last, so that no resume lacks a row."""
        self._require_equal_ranks()
        self.rows.append(row)
        better = row["top1"] is not None and row["top1"] > self.best_top1
        if better:
            self.best_top1 = row["top1"]
        if not self.ranks.is_first:
            return
        text = "".join(json.dumps(each) + "\n" for each in self.rows)
        write_text(text, self.output / "metrics.jsonl")
        plot_curves(self.rows, self.output / "curves.png")
        checkpoints = self.output / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        if better:
            weights = {p.name.removeprefix("ema."): p for p in self.evaluated_net.get_parameters()}
            save_checkpoint(weights, checkpoints / "best.ckpt")
        extra = {"best_top1": self.best_top1, "world": self.ranks.world}
        state = {parameter.name: parameter for parameter in self.step.get_parameters()}
        save_checkpoint(state, checkpoints / "last.ckpt", **extra)
