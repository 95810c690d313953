"""A training run: epochs of steps, an evaluation after each, and the files that tell of it.

An own loop and not `mindspore.train.Model`, because each epoch is a pipeline of its own, seeded by
(seed, epoch), which is what makes a resumed run equal to one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import time
import zlib
from pathlib import Path

import numpy as np
from mindspore import Tensor

from src.build import build_preprocessing, open_checked, uses_compiled
from src.config import Config
from src.data import Source
from src.data.loader import choose_workers
from src.distributed import ALONE, Ranks
from src.errors import UserError
from src.evaluation.evaluator import Evaluator
from src.files import write_text
from src.progress import progress_bar
from src.training.feed import Feed
from src.training.interruption import Interruption
from src.training.setup import build_step
from src.training.state import (
    BEST,
    Progress,
    figures_of,
    flat,
    has_figures,
    leave_branch,
    load_newest,
    load_progress,
    refuse_changes,
    require_finite,
    save_state,
)
from src.weights import save_checkpoint, sha256_of

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
        self.feed = Feed(config, source, ranks)
        self.evaluator = Evaluator(
            open_checked(config, "val", ranks, output),
            build_preprocessing(config),
            config.evaluation.batch_size,
            config.data.workers,
            ranks,
        )
        self.steps_per_epoch = self.feed.steps_per_epoch
        self.built = build_step(config, ranks, self.feed, finetune)
        self.step, self.learning_rates = self.built.step, self.built.learning_rates
        self.progress = Progress(
            settings=flat(config),
            data=source.digest(),
            world=ranks.world,
            workers=choose_workers(config.data.workers),
            compiled=uses_compiled(config.runtime),
            device_noise=True,
        )
        self.interruption = Interruption(ranks)
        self.skipped = 0  # steps in a row
        self.compiled = False

    @property
    def evaluated_net(self):
        """The network whose accuracy counts: the moving average where there is one."""
        return self.step.net if self.step.ema_net is None else self.step.ema_net

    def resume(self, state: Path | None, accept_changes: bool = False) -> None:
        """Take up the run in the output folder.

        Args:
            state: from which to go on; None takes the newest whole one of the folder.
            accept_changes: go on under other settings, which a warning names.
        """
        if self.ranks.is_first:
            checkpoints = self.output / "checkpoints"
            if state is None:
                found, state = load_newest(self.step, checkpoints)
            else:
                found = load_progress(self.step, state)
            # Earlier versions took the names in MindRecord shards, which means to read them all.
            now = self.progress.data
            if found.data != now and found.data == self.source.digest(by_name=True):
                found = dataclasses.replace(found, data=now)
            refuse_changes(found, self.progress, self.output, accept_changes)
            now = self.progress
            self.progress = dataclasses.replace(
                found,
                settings=now.settings,
                data=now.data,
                workers=now.workers,
                compiled=now.compiled,
                device_noise=now.device_noise,
            )
            self._leave_branch(state)
        self.ranks.broadcast(self.step.get_parameters())
        text = json.dumps(dataclasses.asdict(self.progress))
        self.progress = Progress(**json.loads(self.ranks.share(text)))
        self._compare_figures()
        logger.info(
            "resumed behind epoch %d, step %d of the next", self.progress.epoch,
            self.progress.position,
        )  # fmt: skip

    def _leave_branch(self, state: Path) -> None:
        """Set aside what was trained behind an older state, its best weights and figures too."""
        progress, checkpoints = self.progress, self.output / "checkpoints"
        best, behind = progress.best_top1, progress.rows[-1:] if not progress.position else []
        aside = leave_branch(self.step, progress, state, checkpoints, self.config.training.keep)
        if progress.best_top1 < 0 and behind and behind[0]["top1"] == best:
            self._keep_best(best)  # the state's own weights
        if aside:
            logger.warning(
                "%s is not the newest state: the run goes on from it, and what was trained behind "
                "it is set aside in %s: %s", state.name, checkpoints,
                ", ".join(path.name for path in aside),
            )  # fmt: skip

    def _compare_figures(self) -> None:
        """Notice a metrics.jsonl that the state does not bear out; it is written anew."""
        file = self.output / "metrics.jsonl"
        if self.ranks.is_first and not has_figures(file, self.progress):
            logger.warning(
                "%s: not what the state holds (an older state, or damaged, or interrupted); "
                "written anew from it", file,
            )  # fmt: skip
            self._write_figures()

    def _write_figures(self) -> None:
        from src.plots.training_curves import plot_curves  # 0.5 s: after the first epoch

        write_text(figures_of(self.progress), self.output / "metrics.jsonl")
        plot_curves(self.progress.rows, self.output / "curves.png")

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            SystemExit: 128 + the signal that asked to stop; the state is saved.
        """
        self._announce()
        progress, epochs = self.progress, self.config.training.epochs
        with self.interruption:
            while progress.epoch < epochs:
                start = time.perf_counter()
                speed = self._train_epoch()
                step = (progress.epoch + 1) * self.steps_per_epoch
                row = {
                    "epoch": progress.epoch + 1,
                    "step": step,
                    "lr": float(self.learning_rates[step - 1]),
                    "train_loss": float(np.mean(progress.losses)) if progress.losses else None,
                    **self._held_out(),
                    "images_per_second": speed,
                    "seconds": time.perf_counter() - start,
                }
                self._finish_epoch(row)
                figures = [f"{k} {row[k]:.{n}f}" for k, n in SHOWN.items() if row[k] is not None]
                logger.info(
                    "epoch %d/%d  %s  lr %.2e  %.0f img/s  %.1f s", row["epoch"], epochs,
                    "  ".join(figures), row["lr"], speed, row["seconds"],
                )  # fmt: skip
        best = progress.best_top1
        logger.info("best top1 %.2f; everything lies in %s", best, self.output)

    def _held_out(self) -> dict[str, float | None]:
        """Loss and accuracy behind an epoch; nulls where it is not evaluated."""
        number = self.progress.epoch + 1
        if number < self.config.training.epochs and number % self.config.evaluation.every:
            return {"loss": None, "top1": None, "top5": None}
        if not self.evaluator.compiled:
            self._save()
            self.interruption.end_at_once()
            self.evaluator.compile(self.evaluated_net)
            self.interruption.save_first()
        result = self.evaluator.run(self.evaluated_net, lambda: bool(self.interruption.signal))
        if self.interruption.agreed() or result is None:
            self._stop()
        metrics = result.metrics
        return {"loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}

    def _stop(self) -> None:
        """Save, wait until that is done, and leave."""
        self._save()
        self.ranks.gather([0])
        logger.warning(
            "stopped by %s, saved at epoch %d, step %d of it; go on with --resume",
            signal.Signals(self.interruption.signal).name, self.progress.epoch + 1,
            self.progress.position,
        )  # fmt: skip
        raise SystemExit(128 + self.interruption.signal)

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
        left_out = len(self.source) - self.steps_per_epoch * self.feed.images_per_step
        if left_out and self.config.training.epoch_steps is None:
            logger.info(
                "%d images do not fill a step of %d: each epoch leaves out others",
                left_out, self.feed.images_per_step,
            )  # fmt: skip
        if self.progress.epoch < self.config.training.epochs:
            logger.info("compiling the step; this takes seconds for cvt_nano, a minute for cvt_21")

    def _train_epoch(self) -> float:
        """Train the rest of an epoch; returns img/s, without compiling."""
        progress, accumulate = self.progress, self.feed.accumulate
        self.built.set_modes()
        size = self.feed.images_per_step
        bar = progress_bar(self.steps_per_epoch * size, f"epoch {progress.epoch + 1}")
        bar.update(progress.position * size)
        first = progress.position * accumulate
        pending: list[tuple[Tensor, Tensor]] = []
        start, timed, told = time.perf_counter(), 0, time.perf_counter()
        batches = self.feed.batches(progress.epoch, progress.position).iterate()
        for number, (images, labels, *boxes) in enumerate(batches, first):
            mix = self.feed.mix(progress.epoch, number)
            result = self.step.take(images, labels, mix, number % accumulate, *boxes)
            if result is None:
                continue
            pending.append(result)
            bar.update(size)
            timed += size
            done = progress.position + len(pending)
            if not self.compiled:
                result[0].asnumpy()
                self.compiled, start, timed = True, time.perf_counter(), 0
                self.interruption.save_first()
            if self.interruption.after_step():
                self._take_down(pending)
                self._stop()
            if time.perf_counter() - told > LOG_SECONDS:
                self._take_down(pending)
                self._tell_step(timed / (time.perf_counter() - start))
                told = time.perf_counter()
            every = self.config.training.save_every
            if every and (progress.epoch * self.steps_per_epoch + done) % every == 0:
                self._take_down(pending)
                self._save()
        self._take_down(pending)
        bar.close()
        return timed / max(time.perf_counter() - start, 1e-9)

    def _take_down(self, pending: list[tuple[Tensor, Tensor]]) -> None:
        """Note the losses of the steps since the last time, and empty the list.

        Raises:
            UserError: loss or gradients not finite, where that is not to be skipped.
        """
        progress = self.progress
        for loss, norm in ((float(a.asnumpy()), float(b.asnumpy())) for a, b in pending):
            progress.position += 1
            if math.isfinite(loss) and math.isfinite(norm):
                progress.losses.append(loss)
                self.skipped = 0
            else:
                self.skipped += 1
                self._refuse_or_skip(loss, norm)
        pending.clear()

    def _refuse_or_skip(self, loss: float, norm: float) -> None:
        """A step whose loss or gradients were not finite; it has left the weights alone."""
        progress = self.progress
        step = progress.epoch * self.steps_per_epoch + progress.position - 1
        files = self.feed.describe(progress.epoch, progress.position - 1)
        what = (
            f"step {step + 1}: the loss is {loss}, the gradients' norm {norm} (learning rate "
            f"{self.learning_rates[step]:.2e}; {files}); the weights are as "
            "before it"
        )
        if self.skipped > MOST_SKIPPED:
            raise UserError(f"{what}, and {self.skipped} steps in a row were so")
        if self.step.dynamic:
            return  # an overflow, which halves the scale
        if self.config.training.non_finite == "stop":
            raise UserError(
                f"{what}. Lower optimizer.lr, set optimizer.clip_norm, or "
                "training.non_finite to skip"
            )
        logger.warning("%s: skipped", what)

    def _tell_step(self, speed: float) -> None:
        done = self.progress.position
        left = (self.steps_per_epoch - done) * self.feed.images_per_step / max(speed, 1e-9)
        logger.info(
            "epoch %d  step %d/%d  loss %.4f  %.0f img/s  %.0f s left in it",
            self.progress.epoch + 1, done, self.steps_per_epoch,
            self.progress.losses[-1] if self.progress.losses else math.nan, speed, left,
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

    def _finish_epoch(self, row: dict) -> None:
        """Close an epoch: the best weights, the state with its figures, then the figures' files."""
        progress = self.progress
        progress.rows.append(row)
        progress.epoch, progress.position, progress.losses = row["epoch"], 0, []
        better = row["top1"] is not None and row["top1"] > progress.best_top1
        if better:
            self._keep_best(row["top1"])
        self._save()
        if self.ranks.is_first:
            self._write_figures()

    def _keep_best(self, top1: float) -> None:
        """Save the weights that are evaluated as the best ones."""
        self.progress.best_top1 = top1
        if self.ranks.is_first:
            best = self.output / "checkpoints" / BEST
            net = self.evaluated_net
            weights = {p.name.removeprefix("ema."): p for p in net.get_parameters()}
            require_finite(weights, best)
            save_checkpoint(weights, best)
            self.progress.best_sha256 = sha256_of(best)

    def _save(self) -> None:
        self._require_equal_ranks()
        if self.ranks.is_first:
            checkpoints = self.output / "checkpoints"
            save_state(self.step, self.progress, checkpoints, self.config.training.keep)
