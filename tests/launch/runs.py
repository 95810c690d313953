"""Twenty steps by which jobs are compared, and their losses."""

from __future__ import annotations

import json
from pathlib import Path

from src.weights.checkpoint import read_checkpoint
from tests.conftest import TINY_KEYS

# Each batch of all ranks has every image, so that the order makes no difference.
NO_CHANCE = ["--augment.padding=0", "--data.train_images=64", "--data.workers=1"]
# A stage's first block never drops its branches, so that one has two blocks.
# One epoch, because each ends with an evaluation and a figure; a state has the losses up to it.
TWENTY_STEPS = [
    TINY_KEYS[0], "--model.depths=[1,1,2]", "--model.drop_path_rate=0.3", *NO_CHANCE,
    "--training.epochs=1", "--training.epoch_steps=20", "--training.save_every=19",
    "--optimizer.warmup_epochs=0", "--evaluation.batch_size=300",
]  # fmt: skip
# Two steps an epoch on two ranks, until something stops the job.
ENDLESS = [
    "--model.name=resnet_nano_s2", "--model.depths=[2]", *NO_CHANCE,
    "--training.batch_size=16", "--training.epochs=5000",
    "--evaluation.every=5000",
]  # fmt: skip
TWO_RANKS = [*TWENTY_STEPS, "--training.batch_size=32", "--training.sync_batchnorm=true"]


def losses(run: Path) -> list[float]:
    """The losses of the first nineteen steps, and the mean of all twenty."""
    progress = read_checkpoint(run / "checkpoints/step-00000019.ckpt").tensors["progress"]
    row = json.loads((run / "metrics.jsonl").read_text())
    return [*json.loads(str(progress))["losses"], row["train_loss"]]
