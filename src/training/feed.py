"""What each step of a run is fed: its batches, and how they are mixed."""

from __future__ import annotations

from mindspore import Tensor

from src.build import build_augmentation, build_mixing, image_size
from src.config import Config
from src.data import Batches, Source, train_batches
from src.distributed import Ranks
from src.errors import UserError

# The indices of an epoch's images and the learning rates of all steps are held in memory.
MOST_IMAGES, MOST_STEPS = 200_000_000, 20_000_000


class Feed:
    """The training images of this rank, a function of seed, epoch and step alone.

    Args:
        config: the recipe.
        source: the training images of all ranks.
        ranks: those that share every step.
    """

    def __init__(self, config: Config, source: Source, ranks: Ranks) -> None:
        self.config = config
        self.source = source
        self.ranks = ranks
        self.augmentation = build_augmentation(config, source.encoded)
        self.mixing = build_mixing(config)
        self.accumulate = config.training.accumulate
        self.images_per_step = config.training.batch_size * self.accumulate * ranks.world
        keys = config.training
        images = (keys.epoch_steps or 0) * self.images_per_step
        if images > MOST_IMAGES:
            raise UserError(
                f"training.epoch_steps {keys.epoch_steps}: {images:,} images an epoch, at most "
                f"{MOST_IMAGES:,}; set it lower and training.epochs higher"
            )
        self.steps_per_epoch = len(self.batches(0)) // self.accumulate
        steps = keys.epochs * self.steps_per_epoch
        if steps > MOST_STEPS:
            raise UserError(
                f"training.epochs {keys.epochs}: {steps:,} steps, at most {MOST_STEPS:,}; "
                "set it lower"
            )

    def batches(self, epoch: int, steps_done: int = 0) -> Batches:
        """The batches of an epoch behind its first steps, `accumulate` for each step."""
        steps = self.config.training.epoch_steps
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
            batches=steps and steps * self.accumulate,
            skip_batches=steps_done * self.accumulate,
        )

    def mix(self, epoch: int, number: int) -> Tensor | None:
        """The mixing of an epoch's batch, another one on each rank; None where nothing mixes."""
        if not self.mixing:
            return None
        key = (self.config.runtime.seed, epoch, number, self.ranks.rank)
        return Tensor(self.mixing.draw(image_size(self.config.model), *key))

    def describe(self, epoch: int, step: int) -> str:
        """Some of this rank's images in a step of an epoch, by their files."""
        size = self.config.training.batch_size * self.accumulate
        indices = self.batches(epoch).indices[step * size : (step + 1) * size]
        names = [self.source.describe(int(index)) for index in indices]
        return f"{', '.join(names[:3])} and {max(len(names) - 3, 0)} more"
