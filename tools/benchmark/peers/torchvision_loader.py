"""The peer torchvision: ImageFolder, its transforms and PyTorch's DataLoader.

Its RandAugment differs: magnitudes are fixed, and each operation is always applied.
Runs in the interpreter that has it; see docs/performance.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from tools.benchmark.protocol import Work, serve


def make(job: dict) -> Work:
    """Build the loader; a step is a pass over the images in new worker processes."""
    torch.set_num_threads(job["threads"])
    data, images = job["data"], job["images"]
    workers = data["workers"] or job["threads"]
    folder = ImageFolder(str(Path(data["path"]) / data["train_folder"]), transform(job))
    spread = Subset(folder, [k * len(folder) // images for k in range(images)])
    loader = DataLoader(
        spread, job["batch_size"], shuffle=True, num_workers=workers, drop_last=True
    )
    what = f"torchvision {torchvision.__version__}, PyTorch {torch.__version__}"
    return Work(lambda: sum(len(labels) for _, labels in loader), what, {"workers": workers})


def transform(job: dict) -> transforms.Compose:
    """Return the recipe's augmentation in torchvision's operations."""
    data, augment = job["data"], job["augment"]
    filters = InterpolationMode(data["interpolation"])
    steps = [
        transforms.RandomResizedCrop(
            job["image_size"], augment["scale"], augment["ratio"], interpolation=filters
        ),
        transforms.RandomHorizontalFlip(augment["hflip"]),
    ]
    if augment["rand_augment"]:
        number = {"m": 9.0, "n": 2.0}
        for key, value in re.findall(r"-(m|n)([\d.]+)", augment["rand_augment"]):
            number[key] = float(value)
        # Its scale of magnitudes has 31 steps, timm's ten.
        magnitude = round(3 * number["m"])
        steps.append(transforms.RandAugment(int(number["n"]), magnitude, interpolation=filters))
    if augment["color_jitter"]:
        steps.append(transforms.ColorJitter(*[augment["color_jitter"]] * 3))
    steps += [transforms.ToTensor(), transforms.Normalize(data["mean"], data["std"])]
    if augment["erasing_prob"]:
        steps.append(transforms.RandomErasing(augment["erasing_prob"], value="random"))
    return transforms.Compose(steps)


if __name__ == "__main__":
    serve(make)
