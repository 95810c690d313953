"""From a configuration to the objects it describes: network, images, preprocessing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from mindspore import dtype as mstype
from mindspore import nn

from src.config import Config, ModelConfig, RuntimeConfig
from src.data import (
    Mixing,
    Preprocessing,
    Source,
    balanced_subset,
    check_files,
    create_train_operations,
    drop_broken,
    hold_out,
    missing_classes,
    open_source,
    select_classes,
)
from src.device import cache_folder, current_device, mindspore_version
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError, join_names
from src.kernels.library import BuildError, library
from src.models import create_model
from src.models.attention import use_flash_attention
from src.models.compiled import has_plain_convolutions, use_compiled
from src.models.layers import use_shifts
from src.progress import progress_bar

logger = logging.getLogger("cvt")

MIXING_KEYS = ("mixup", "cutmix", "mixup_prob", "mixup_switch_prob")  # as Mixing's fields
SLOW_CONVOLUTIONS = (2, 9)  # versions of MindSpore from here on
MAX_SIDE = 8192  # pixels of a network's input
INDEX_FILE = "images.json"  # in a run's folder


def image_size(config: ModelConfig) -> tuple[int, int]:
    """(height, width) in pixels.

    Raises:
        UserError: no such size.
    """
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(
            f"model.image_size {config.image_size}: must be a number of pixels, or [height, width]"
        )
    return size


def build_model(config: Config) -> nn.Cell:
    """The network as configured, freshly initialised; classes must be resolved.

    Raises:
        UserError: keys that make no network.
    """
    arguments = {k: v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    name, classes = arguments.pop("name"), arguments.pop("num_classes")
    net = set_precision(create_model(name, classes, **arguments), config.runtime.precision)
    return set_attention(net, config.runtime)


def set_precision(net: nn.Cell, precision: str) -> nn.Cell:
    """Let Linears and convolutions, and so the attention products, compute in a lower precision.

    Weights stay float32; norms, softmax and loss cast up by themselves.
    """
    if precision != "float32":
        for _, cell in net.cells_and_names():
            if isinstance(cell, (nn.Dense, nn.Conv2d)):
                cell.to_float(getattr(mstype, precision))
    return net


def require_precision(precision: str) -> None:
    """Refuse a precision that the present device has no kernels for.

    Raises:
        UserError: bfloat16 on the CPU.
    """
    if precision == "bfloat16" and current_device() == "CPU":
        raise UserError("runtime.precision bfloat16: the CPU has no such kernels; take float32")


def set_attention(net: nn.Cell, runtime: RuntimeConfig) -> nn.Cell:
    """Let attention compute in Ascend's fused kernel where the configuration asks for it.

    Raises:
        UserError: a device, a precision or a network that the kernel does not work with.
    """
    if not runtime.flash_attention:
        return net
    device = current_device()
    if device != "Ascend":
        raise UserError(
            f"runtime.flash_attention: is a kernel of Ascend's, this runs on {device}; leave it out"
        )
    if runtime.precision == "float32":
        raise UserError(
            "runtime.flash_attention: the kernel has no float32; set runtime.precision to float16 "
            "or bfloat16"
        )
    return use_flash_attention(net)


def uses_compiled(runtime: RuntimeConfig) -> bool:
    """Whether networks compute in compiled operators, as `compiled_library`."""
    return compiled_library(runtime) is not None


def compiled_library(runtime: RuntimeConfig) -> Path | None:
    """The compiled operators, None where they are not used; the log says why where they could be.

    Raises:
        UserError: they are asked for and can't be had.
    """
    asked = runtime.compiled_ops == "always"
    if runtime.compiled_ops == "never":
        return None
    device = current_device()
    if device != "CPU" or runtime.precision != "float32":
        if asked:
            raise UserError(
                "runtime.compiled_ops always: they are for the CPU in float32, this runs on "
                f"{device} in {runtime.precision}; leave the key out"
            )
        return None
    try:
        return library(cache_folder())
    except BuildError as error:
        if asked:
            raise UserError(f"runtime.compiled_ops always: {error}") from None
        logger.info("without compiled operators, so slower: %s", error)
        return None


def accelerate(net: nn.Cell, runtime: RuntimeConfig) -> nn.Cell:
    """Let a network that is not to be exported compute in the operators that the recipe asks for.

    Raises:
        UserError: they are asked for and can't be had.
    """
    if runtime.depthwise == "shifts":
        use_shifts(net)
    built = compiled_library(runtime)
    if built is not None:
        use_compiled(net, built)
    if (
        current_device() == "CPU"
        and mindspore_version() >= SLOW_CONVOLUTIONS
        and has_plain_convolutions(net)
    ):
        logger.warning(
            "this MindSpore computes convolutions on the CPU some 100 times slower than 2.8: "
            "install mindspore 2.8, or for CvT a C++ compiler (runtime.compiled_ops)"
        )
    return net


def without_flash_attention(config: Config) -> Config:
    """The configuration for what must also run, or be exported to run, off Ascend."""
    runtime = dataclasses.replace(config.runtime, flash_attention=False)
    return dataclasses.replace(config, runtime=runtime)


def open_split(config: Config, split: str) -> Source:
    """The images of "train" or "val", labelled in the order of `data.class_names`."""
    data = config.data
    folders = {"train_folder": data.train_folder, "val_folder": data.val_folder}
    for key in ("classes", "class_names"):
        names = getattr(data, key)
        if names is not None and (not names or len(set(names)) < len(names)):
            raise UserError(f"data.{key} {names}: must name each class once")
    names = None if data.classes else data.class_names
    held_out = data.val_from_train is not None
    opened = "train" if held_out else split
    source = open_source(data.source, data.path, opened, class_names=names, **folders)
    if data.classes:
        source = select_classes(source, data.classes, data.class_names)
    if split == "train" and len(source.class_names) < 2:
        raise UserError(
            f"{source.title}: only one class ({source.class_names[0]!r}), so there is nothing to "
            "learn; add a folder for each further class"
        )
    if held_out:  # the same images whatever runtime.seed is, so that trials compare
        source = hold_out(source, data.val_from_train, seed=0)[split == "val"]
    if data.train_images and split == "train":
        source = balanced_subset(source, data.train_images, config.runtime.seed)
    return source


def open_quietly(config: Config, split: str) -> Source:
    """`open_split` for its errors: what there is to log comes when the split is opened for use."""
    logger.disabled = True
    try:
        return open_split(config, split)
    finally:
        logger.disabled = False


def open_checked(
    config: Config,
    split: str,
    ranks: Ranks = SINGLE_PROCESS,
    run: Path | None = None,
    *,
    keep: bool = True,
    source: Source | None = None,
) -> Source:
    """`open_split` without broken images, the same on all ranks, which share the look at them.

    Args:
        config: the recipe.
        split: "train" or "val".
        ranks: those that open the split.
        run: a run's folder, with an index of the images unless `data.index` names another.
        source: what `open_split` gave, where it was opened before.
        keep: whether to write the index. A configuration that came with a checkpoint must not
            decide what is written where.

    Raises:
        UserError: images are broken, and more of them than may be skipped.
    """
    check_values(config)
    data = config.data
    if source is None:
        source = open_split(config, split)
        if split == "train" and len(source) and source.file(0) is not None:
            open_quietly(config, "val")  # its faults are told before any image is read
    ranks.require_agreement(f"{split} images", source.digest())
    if not len(source) or source.file(0) is None:
        return source
    if not data.check_images:
        logger.warning(
            "%s: images are not checked (data.check_images): a broken one stops the run when it is "
            "reached, and one with a damaged header can end it without a message", source.title
        )  # fmt: skip
        return source
    index = Path(data.index).expanduser() if data.index else run and run / INDEX_FILE
    files = [source.file(k) for k in range(len(source))]
    entries = check_files(
        files, Path(data.path).expanduser(), index,
        write=keep, workers=data.workers, progress=progress_bar, ranks=ranks,
    )  # fmt: skip
    faults = {k: entry.fault for k, entry in enumerate(entries) if entry.fault}
    turned = sum(entry.turned for entry in entries)
    if turned and ranks.is_first:
        logger.info("%s: %d images are turned upright by EXIF", source.title, turned)
    skips = data.broken == "skip" or (data.broken == "auto" and split == "train")
    raise_limit = f"or raise data.broken_share (now {data.broken_share:g})"
    remedy = raise_limit if skips else "or let them be skipped with --data.broken skip"
    kept = drop_broken(source, faults, data.broken_share if skips else 0.0, remedy)
    lost = missing_classes(source, kept)
    if lost:
        message = f"{source.title}: not one image of {join_names(lost)} can be read"
        if split == "train":
            raise UserError(f"{message}; replace them, or remove the class folder")
        logger.warning(message)
    return kept


def resolve_classes(config: Config, source: Source) -> Config:
    """The configuration with what only the data tells: classes, and where it lies.

    Raises:
        UserError: `model.num_classes` is not the number of classes, so labels could mean others.
    """
    names = list(source.class_names)
    classes = config.model.num_classes or len(names)
    if classes != len(names):
        raise UserError(
            f"model.num_classes {classes}: {source.title} has {len(names)} classes; leave the key "
            "out, or name all classes in the order of the labels in data.class_names"
        )
    path = config.data.path and str(Path(config.data.path).resolve())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=classes),
        data=dataclasses.replace(config.data, class_names=names, path=path),
    )


def check_values(config: Config) -> None:
    """Check keys of images and augmentation, also those whose range only MindSpore knows.

    Raises:
        UserError: names the key.
    """
    build_preprocessing(config)
    build_augmentation(config, encoded=True)
    build_mixing(config)


def build_preprocessing(config: Config) -> Preprocessing:
    """What evaluation and deployment do with an image.

    Raises:
        UserError: a value out of range.
    """
    size = image_size(config.model)
    if max(size) > MAX_SIDE:
        raise UserError(f"model.image_size {config.model.image_size}: at most {MAX_SIDE} pixels")
    _check_normalisation("data.mean", config.data.mean, 0.0)
    _check_normalisation("data.std", config.data.std, 1e-6)
    ratio = config.data.crop_ratio
    if ratio is not None and not 0.05 <= ratio <= 1:
        raise UserError(
            f"data.crop_ratio {ratio}: is the crop's share, 0.05 to 1; null for no crop"
        )
    resize = None if ratio is None else int(max(size) / ratio)
    return Preprocessing(size, resize, config.data.mean, config.data.std, config.data.interpolation)


def _check_normalisation(key: str, values: Sequence[float], least: float) -> None:
    if all(least <= value <= 1 for value in values):
        return
    bytes_ = all(least <= value <= 255 for value in values)
    hint = "; these are MindSpore's convention of 0..255, divide them by 255" if bytes_ else ""
    raise UserError(
        f"{key} {list(values)}: each must lie in {least:g} to 1, as pixels are scaled to 0..1{hint}"
    )


def build_augmentation(config: Config, encoded: bool) -> list:
    """Operations on a training image; mixing and `augment.repeats` are of the whole epoch."""
    others = (*MIXING_KEYS, "repeats")
    keys = {k: v for k, v in dataclasses.asdict(config.augment).items() if k not in others}
    return create_train_operations(
        image_size(config.model),
        config.data.mean,
        encoded=encoded,
        interpolation=config.data.interpolation,
        **keys,
    )


def build_mixing(config: Config) -> Mixing:
    """Mixup and cutmix of training batches."""
    return Mixing(*(getattr(config.augment, key) for key in MIXING_KEYS))
