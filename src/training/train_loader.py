"""The training batches of a run and how they are mixed."""

from __future__ import annotations

from mindspore import Tensor

from src.build import build_augmentation, build_mixing, image_size
from src.config import Config
from src.data import DataLoader, Source, create_train_loader
from src.distributed import Ranks
from src.errors import UserError, join_names

# The image indices of an epoch and the learning rates of all steps are held in memory.
MAX_EPOCH_IMAGES, MAX_STEPS = 200_000_000, 20_000_000


class TrainLoader:
    """The training batches of this rank, which depend on seed, epoch and step only.

    Args:
        config: the configuration.
        source: the training images of all ranks.
        ranks: the ranks that share every step.

    Raises:
        UserError: an epoch or the run is too long.
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
        if images > MAX_EPOCH_IMAGES:
            raise UserError(
                f"training.epoch_steps {keys.epoch_steps}: an epoch of {images:,} images, more "
                f"than {MAX_EPOCH_IMAGES:,}; lower it and raise training.epochs"
            )
        self.steps_per_epoch = len(self.batches(0)) // self.accumulate
        steps = keys.epochs * self.steps_per_epoch
        if steps > MAX_STEPS:
            raise UserError(
                f"training.epochs {keys.epochs}: {steps:,} steps, more than {MAX_STEPS:,}; lower it"
            )

    def batches(self, epoch: int, steps_done: int = 0) -> DataLoader:
        """Return the batches of an epoch after its first steps, `accumulate` for each step."""
        steps = self.config.training.epoch_steps
        return create_train_loader(
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

    def draw_mixing(self, epoch: int, batch: int) -> Tensor | None:
        """Draw mixup or cutmix for a batch of an epoch; it differs by rank.

        Returns:
            float32 [6] as in `src.data.mixing`; None if the configuration mixes nothing.
        """
        if not self.mixing:
            return None
        key = (self.config.runtime.seed, epoch, batch, self.ranks.rank)
        return Tensor(self.mixing.draw(image_size(self.config.model), *key))

    def describe(self, epoch: int, step: int) -> str:
        """Name some of this rank's images in a step of an epoch."""
        size = self.config.training.batch_size * self.accumulate
        images = self.batches(epoch).source
        names = [images.describe(k) for k in range(step * size, (step + 1) * size)]
        return join_names(names, 3)
