"""The peer timm: its loader with its RandAugment and random erasing.

Runs in the interpreter that has it; see docs/performance.md.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.data import ImageDataset, create_loader

from tools.benchmark.protocol import Work, serve


class Spread(ImageDataset):
    """A given number of items spread evenly over a folder, repeated if it has fewer."""

    def __init__(self, root: str, images: int) -> None:
        super().__init__(root)
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple:
        return super().__getitem__(index * len(self.reader) // self.images)


def make(job: dict) -> Work:
    """Build the loader; a step is a pass over the images in new worker processes."""
    torch.set_num_threads(job["threads"])
    data, augment = job["data"], job["augment"]
    workers = data["workers"] or job["threads"]
    loader = create_loader(
        Spread(str(Path(data["path"]) / data["train_folder"]), job["images"]),
        input_size=(3, *job["image_size"]),
        batch_size=job["batch_size"],
        is_training=True,
        scale=augment["scale"],
        ratio=augment["ratio"],
        hflip=augment["hflip"],
        color_jitter=augment["color_jitter"] or None,
        auto_augment=augment["rand_augment"],
        interpolation=data["interpolation"],
        re_prob=augment["erasing_prob"],
        re_mode="pixel",
        mean=data["mean"],
        std=data["std"],
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=False,  # ours ends its threads after an epoch too
    )
    what = f"timm {timm.__version__}, PyTorch {torch.__version__}"
    return Work(lambda: sum(len(labels) for _, labels in loader), what, {"workers": workers})


if __name__ == "__main__":
    serve(make)
