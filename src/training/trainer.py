"""The training loop: epochs of steps, an evaluation after each, and the run's files.

`mindspore.train.Model` is not used: here each epoch is a data pipeline of its own, seeded by
(seed, epoch), so a resumed run equals an uninterrupted one.
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

import mindspore as ms
import numpy as np
from mindspore import Tensor

from src.build import build_preprocessing, uses_compiled
from src.config import Config
from src.config_io import CONFIG, save_config
from src.data import Source
from src.data.loader import resolve_num_workers
from src.device import current_device
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError
from src.evaluation.evaluator import Evaluator
from src.files import write_text
from src.progress import progress_bar
from src.splits import open_checked
from src.training.resume import flatten, restore
from src.training.setup import build_training
from src.training.state import VERSION, Progress, metrics_match, metrics_text, save_best, save_state
from src.training.stop_signal import StopSignal
from src.training.train_loader import TrainLoader

logger = logging.getLogger("cvt")
LOG_SECONDS = 60.0  # between two log lines within an epoch
MAX_SKIPPED = 20  # consecutive overflows; enough to halve the first dynamic scale down to 1
RESUMED = "resumed at epoch"
LOGGED = {"train_loss": 4, "loss": 4, "top1": 2, "top5": 2}  # metrics of an epoch, decimals


class Trainer:
    """Trains what a configuration describes.

    Args:
        config: the configuration, with resolved classes.
        source: the training images.
        output: the run's folder.
        finetune: a weight file to start from; a head for other classes is new.
        ranks: the ranks that share every step; rank 0 writes the run's files.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        output: Path,
        finetune: str | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.config = config
        self.source = source
        self.output = output
        self.ranks = ranks
        self.loader = TrainLoader(config, source, ranks)
        held_out = open_checked(config, "val", ranks, output)
        self.evaluator = Evaluator(
            held_out,
            build_preprocessing(config),
            config.evaluation.batch_size,
            config.data.workers,
            ranks,
        )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.setup = build_training(config, ranks, self.loader, finetune)
        self.step, self.learning_rates = self.setup.step, self.setup.learning_rates
        self.progress = Progress(
            settings=flatten(config),
            data=source.digest(),
            content=source.digest_content(),
            held_out=held_out.digest(),
            held_out_content=held_out.digest_content(),
            world=ranks.world,
            device=current_device(),
            workers=resolve_num_workers(config.data.workers),
            compiled=uses_compiled(config.runtime),
            version=VERSION,
            software=f"MindSpore {ms.__version__}, NumPy {np.__version__}",
        )
        self.stop_signal = StopSignal(ranks)
        self.skipped = 0  # consecutive steps
        self.config_changed = False  # since config.yaml was written
        self.graph_compiled = False
        self.epoch_start = time.perf_counter()

    @property
    def evaluated_net(self):
        """The network to evaluate: the moving average if there is one."""
        return self.step.net if self.step.ema_net is None else self.step.ema_net

    @property
    def checkpoints(self) -> Path:
        """The folder of states and best weights."""
        return self.output / "checkpoints"

    def resume(self, state: Path | None, accept_changes: bool = False) -> None:
        """Continue the run in the output folder.

        Args:
            state: the state to resume from; None for the newest intact one in the folder.
            accept_changes: continue although settings or images differ, with a warning.

        Raises:
            UserError: no usable state, or settings or images that differ.
        """
        if self.ranks.is_first:
            self.progress = restore(
                self.step,
                self.progress,
                self.output,
                state,
                steps_per_epoch=self.steps_per_epoch,
                keep=self.config.training.keep,
                accept_changes=accept_changes,
            )
            self.config_changed = True
        self.ranks.broadcast(self.step.get_parameters())
        text = json.dumps(dataclasses.asdict(self.progress))
        self.progress = Progress(**json.loads(self.ranks.broadcast_text(text)))
        done = self.progress.epoch * self.steps_per_epoch + self.progress.position
        self.step.align_schedule(done)
        metrics = self.output / "metrics.jsonl"
        if self.ranks.is_first and not metrics_match(metrics, self.progress):
            is_own = state is None or self.output.resolve() in state.resolve().parents
            if is_own or metrics.exists():  # it is missing in a new folder
                logger.warning("%s: differs from the state (older, damaged or cut off); rewritten "
                               "from it", metrics)  # fmt: skip
            self._write_metrics()
        logger.info(
            f"{RESUMED} %d, step %d", self.progress.epoch + 1, self.progress.position,
        )  # fmt: skip

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            SystemExit: 128 + the signal that asked to stop; the state is saved.
            UserError: a loss or gradient that is not finite, or a file that cannot be written.
        """
        self._log_start()
        with self.stop_signal:
            while self.progress.epoch < self.config.training.epochs:
                self.epoch_start = time.perf_counter() - self.progress.seconds
                speed = self._train_epoch()
                metrics = self._evaluate()
                self._finish_epoch(metrics, speed)
        best = self.progress.best_top1
        found = f"best top1 {best:.2f}" if best >= 0 else "not evaluated"
        logger.info("%s; results are in %s", found, self.output)
        self.ranks.announce_end(0)

    def _train_epoch(self) -> float | None:
        """Train the rest of an epoch; return images per second, without the step that compiles.

        None if there was no other step.
        """
        progress, accumulate = self.progress, self.loader.accumulate
        if not self.graph_compiled:  # a resumed run may evaluate before its first step
            if self.stop_signal.any_rank_stopped():
                self._stop()
            self.stop_signal.use_default_handlers()
        self.setup.set_train()
        size = self.loader.images_per_step
        bar = progress_bar(self.steps_per_epoch * size, f"epoch {progress.epoch + 1}")
        bar.update(progress.position * size)
        pending: list[tuple[Tensor, Tensor]] = []  # losses and norms still on the device
        start, timed, last_logged = time.perf_counter(), 0, time.perf_counter()
        batches = self.loader.batches(progress.epoch, progress.position).iterate()
        for number, (images, labels, *boxes) in enumerate(batches, progress.position * accumulate):
            mixing = self.loader.draw_mixing(progress.epoch, number)
            result = self.step.run_batch(images, labels, mixing, number % accumulate, *boxes)
            if result is None:  # an accumulated part
                continue
            pending.append(result)
            bar.update(size)
            timed += size
            done = progress.position + len(pending)
            if not self.graph_compiled:
                result[0].asnumpy()  # waits for the first step, which compiles
                self.graph_compiled, timed = True, 0
                start = last_logged = time.perf_counter()
                self.stop_signal.defer_signals()
            if self.stop_signal.should_stop():
                self._record_losses(pending)
                self._stop()
            if time.perf_counter() - last_logged > LOG_SECONDS:
                self._record_losses(pending)
                self._log_progress(timed / (time.perf_counter() - start))
                last_logged = time.perf_counter()
            every = self.config.training.save_every
            if every and (progress.epoch * self.steps_per_epoch + done) % every == 0:
                self._record_losses(pending)
                self._save()
        self._record_losses(pending)
        bar.close()
        return timed / max(time.perf_counter() - start, 1e-9) if timed else None

    def _record_losses(self, pending: list[tuple[Tensor, Tensor]]) -> None:
        """Move the losses of the last steps from the device to the progress.

        Raises:
            UserError: loss or gradients are not finite, unless such steps are skipped.
        """
        progress = self.progress
        for loss, norm in ((float(a.asnumpy()), float(b.asnumpy())) for a, b in pending):
            progress.position += 1
            if math.isfinite(loss) and math.isfinite(norm):
                progress.losses.append(loss)
                self.skipped = 0
            else:
                self.skipped += 1
                self._skip_or_raise(loss, norm)
        pending.clear()

    def _skip_or_raise(self, loss: float, norm: float) -> None:
        """Handle a step with a loss or gradients that are not finite; it changed no weights."""
        progress = self.progress
        step = progress.epoch * self.steps_per_epoch + progress.position - 1
        files = self.loader.describe(progress.epoch, progress.position - 1)
        message = (
            f"step {step + 1}: the loss is {loss}, the gradient norm {norm} (learning rate "
            f"{self.learning_rates[step]:.2e}; {files}); the weights are unchanged"
        )
        remedy = "lower optimizer.lr or set optimizer.clip_norm"
        if self.config.training.loss_scale not in (1, "dynamic"):
            remedy = f"lower training.loss_scale or set it to dynamic, {remedy}"
        if self.skipped > MAX_SKIPPED:
            raise UserError(f"{message}; {self.skipped} such steps in a row; {remedy}")
        if self.step.dynamic:
            return  # an overflow, which halves the loss scale
        if self.config.training.non_finite == "stop":
            raise UserError(f"{message}; {remedy}, or set training.non_finite to skip")
        logger.warning("%s: skipped", message)

    def _evaluate(self) -> dict[str, float | None]:
        """Return held-out loss and accuracy; None in epochs without an evaluation."""
        number = self.progress.epoch + 1
        if number < self.config.training.epochs and number % self.config.evaluation.every:
            return {"loss": None, "top1": None, "top5": None}
        if not self.evaluator.graph_compiled:
            self._save()
            self.stop_signal.use_default_handlers()
            self.evaluator.compile(self.evaluated_net)
            self.stop_signal.defer_signals()
        result = self.evaluator.run(self.evaluated_net, lambda: bool(self.stop_signal.signal))
        if self.stop_signal.any_rank_stopped() or result is None:
            self._stop()
        metrics = result.metrics
        return {"loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}

    def _finish_epoch(self, metrics: dict[str, float | None], speed: float | None) -> None:
        """Save the best weights, the state, and then the files with the metrics."""
        progress, epochs = self.progress, self.config.training.epochs
        step = (progress.epoch + 1) * self.steps_per_epoch
        row = {
            "epoch": progress.epoch + 1,
            "step": step,
            "lr": float(self.learning_rates[step - 1]),
            "train_loss": float(np.mean(progress.losses)) if progress.losses else None,
            **metrics,
            "images_per_second": speed,
            "seconds": time.perf_counter() - self.epoch_start,
        }
        progress.rows.append(row)
        progress.epoch, progress.position, progress.losses = row["epoch"], 0, []
        if row["top1"] is not None and row["top1"] > progress.best_top1:
            progress.best_top1 = row["top1"]
            if self.ranks.is_first:
                save_best(self.step, progress, self.checkpoints, row["top1"])
        self._save()
        if self.ranks.is_first:
            self._write_metrics()
        logged = [f"{k} {row[k]:.{n}f}" for k, n in LOGGED.items() if row[k] is not None]
        logged.append(f"lr {row['lr']:.2e}")
        if speed is not None:
            logged.append(f"{speed:.0f} img/s")
        logger.info(
            "epoch %d/%d  %s  %.1f s", row["epoch"], epochs, "  ".join(logged), row["seconds"]
        )

    def _write_metrics(self) -> None:
        from src.plots.training_curves import plot_curves  # matplotlib takes a second to import

        write_text(metrics_text(self.progress), self.output / "metrics.jsonl")
        plot_curves(self.progress.rows, self.output / "curves.png")

    def _save(self) -> None:
        self._require_equal_ranks()
        within_epoch = self.progress.position > 0
        self.progress.seconds = within_epoch * (time.perf_counter() - self.epoch_start)
        if self.ranks.is_first:
            save_state(self.step, self.progress, self.checkpoints, self.config.training.keep)
            if self.config_changed:
                save_config(self.config, self.output / CONFIG)
                self.config_changed = False

    def _require_equal_ranks(self) -> None:
        """Detect ranks whose weights differ, before anything is saved."""
        checksum = 0
        if self.ranks.world > 1:
            for parameter in self.step.get_parameters():
                checksum = zlib.crc32(parameter.asnumpy(), checksum)
            remedy = (
                "a device or MindSpore computed wrongly; continue with --resume, and if it recurs, "
                "run scripts/check_device.sh"
            )
            self.ranks.require_agreement("weights", checksum, remedy)

    def _stop(self) -> None:
        """Save, wait for all ranks, and exit."""
        self._save()
        self.ranks.announce_end(128 + self.stop_signal.signal)
        logger.warning(
            "stopped by %s; saved at epoch %d, step %d; continue with --resume",
            signal.Signals(self.stop_signal.signal).name, self.progress.epoch + 1,
            self.progress.position,
        )  # fmt: skip
        raise SystemExit(128 + self.stop_signal.signal)

    def _log_start(self) -> None:
        logger.info(
            "%s: %s parameters, %d classes; %d training images, %d held out; %d steps per epoch",
            self.config.model.name,
            f"{self.setup.num_parameters:,}",
            self.config.model.num_classes,
            len(self.source),
            self.evaluator.images,
            self.steps_per_epoch,
        )
        for note in self.setup.notes:
            logger.info("%s", note)
        left_out = len(self.source) - self.steps_per_epoch * self.loader.images_per_step
        if left_out and self.config.training.epoch_steps is None:
            logger.info(
                "each epoch leaves out images (%d) that do not fill a step of %d, others each time",
                left_out, self.loader.images_per_step,
            )  # fmt: skip
        if self.progress.epoch < self.config.training.epochs:
            logger.info("compiling the step: on a CPU, 4 s for cvt_nano and 18 s for cvt_21")

    def _log_progress(self, speed: float) -> None:
        done = self.progress.position
        left = (self.steps_per_epoch - done) * self.loader.images_per_step / max(speed, 1e-9)
        logger.info(
            "epoch %d  step %d/%d  loss %.4f  %.0f img/s  %.0f s left in the epoch",
            self.progress.epoch + 1, done, self.steps_per_epoch,
            self.progress.losses[-1] if self.progress.losses else math.nan, speed, left,
        )  # fmt: skip
