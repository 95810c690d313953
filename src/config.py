"""The only schema: each key with type, default and meaning; the only room for YAML and argv.

A recipe in config/ sets keys, dotted options (`--optimizer.lr 1e-3`) override them, whatever their
order on the command line. Nothing unknown and nothing of a wrong type passes.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Literal, NoReturn, Optional, Union

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from src.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class RuntimeConfig:
    """Where and how the graphs run.

    Args:
        device: auto takes the first of Ascend, GPU, CPU that MindSpore finds here.
        device_id: index of the Ascend or GPU device.
        mode: graph compiles the whole step; pynative runs operator by operator, for debugging.
        precision: dtype of Linears, convolutions and attention products; norms, softmax and loss
            stay in float32.
        seed: of the initial weights, data order, augmentation, drop path and dropout.
    """

    device: Literal["auto", "Ascend", "GPU", "CPU"] = "auto"
    device_id: NonNegativeInt = 0
    mode: Literal["graph", "pynative"] = "graph"
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: NonNegativeInt = 0


@dataclass
class ModelConfig:
    """The network; a key left at null keeps what the named variant has.

    Args:
        name: one of src.models.list_models().
        image_size: pixels, one number or [height, width].
        num_classes: outputs of the head; null takes the number of classes in the data.
        embed_dims: channels of the three stages.
        depths: blocks in the three stages.
        num_heads: attention heads in the three stages.
        mlp_ratio: hidden over embedding dimension.
        kv_stride: stride of the convolutional projection of keys and values.
        qkv_projection: what makes q, k and v.
        cls_token: whether the last stage has a class token.
        pos_embed: learned position embeddings, one switch or one per stage.
        patch_embed: overlapping convolutions, or patches.
        drop_path_rate: stochastic depth, one rate or one per stage.
        drop_rate: dropout.
    """

    name: str = "cvt_13"
    image_size: Union[int, list[int]] = 224
    num_classes: Optional[PositiveInt] = None
    embed_dims: Optional[list[int]] = None
    depths: Optional[list[int]] = None
    num_heads: Optional[list[int]] = None
    mlp_ratio: Optional[float] = None
    kv_stride: Optional[int] = None
    qkv_projection: Optional[Literal["conv", "avg", "linear"]] = None
    cls_token: Optional[bool] = None
    pos_embed: Optional[Union[bool, list[bool]]] = None
    patch_embed: Optional[Literal["conv", "patch"]] = None
    drop_path_rate: Optional[Union[float, list[float]]] = None
    drop_rate: Optional[float] = None


@dataclass
class DataConfig:
    """Images and labels, and how evaluation and deployment prepare an image.

    Args:
        source: digits comes with the installation; the others need a path.
        path: the data set's folder.
        train_folder: folder of the training classes (imagefolder).
        val_folder: folder of the evaluation classes (imagefolder).
        class_names: names in the order of the labels; null takes the data's own. A run writes
            them into its config.yaml, so that a checkpoint always knows its classes.
        classes: use only the classes of these names, labelled in this order.
        train_images: use only so many training images, as many of each class as there can be;
            which ones follows from runtime.seed.
        mean: of the three channels, for values in 0..1.
        std: of the three channels, for values in 0..1.
        crop_ratio: evaluation resizes the short side to image size / crop_ratio and crops the
            centre; null resizes straight to the image size, as the official 384 px evaluation.
        interpolation: filter of every resize, as in Pillow.
        workers: threads that prepare images; 0 takes the number of cores.
    """

    source: Literal["digits", "imagefolder", "cifar10", "cifar100", "mnist"] = "imagefolder"
    path: Optional[str] = None
    train_folder: str = "train"
    val_folder: str = "val"
    class_names: Optional[list[str]] = None
    classes: Optional[list[str]] = None
    train_images: Optional[PositiveInt] = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    crop_ratio: Optional[PositiveFloat] = 0.875
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    workers: NonNegativeInt = 0


@dataclass
class AugmentConfig:
    """Random changes of training images.

    Args:
        crop: random_resized crops a random share and resizes it; pad shifts by up to `padding`.
        scale: smallest and largest share of the area that random_resized keeps.
        ratio: narrowest and widest aspect ratio of that crop.
        padding: pixels of zeros around the image for pad.
        hflip: probability of a horizontal flip.
    """

    crop: Literal["random_resized", "pad"] = "random_resized"
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333)
    padding: NonNegativeInt = 4
    hflip: ClosedUnitInterval = 0.5


@dataclass
class OptimizerConfig:
    """The optimizer, with PyTorch's semantics, and the schedule of its learning rate.

    Args:
        name: adamw, or sgd with momentum.
        lr: peak learning rate.
        weight_decay: of the weights of Linears and convolutions, nothing else; decoupled in adamw.
        betas: decay rates of adamw's moments.
        eps: added to the root of adamw's second moment.
        momentum: of sgd.
        clip_norm: upper bound of the gradients' global L2 norm; 0 does not clip.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the cosine.
        schedule_per: whether the rate changes every step, or every epoch as in the official code.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    momentum: ClosedUnitInterval = 0.9
    clip_norm: NonNegativeFloat = 0.0
    warmup_epochs: NonNegativeInt = 5
    warmup_lr: NonNegativeFloat = 1e-6
    min_lr: NonNegativeFloat = 1e-5
    schedule_per: Literal["step", "epoch"] = "epoch"


@dataclass
class TrainingConfig:
    """The run.

    Args:
        epochs: passes over the training images.
        batch_size: images a step.
        label_smoothing: share of the target spread over all classes.
        ema_decay: exponential moving average of the weights, evaluated and kept as best; 0 is off.
        loss_scale: factor on the loss that keeps float16 gradients from underflow.
        freeze: parts of the network that stay as they are, by the beginning of their names
            ([stage0, stage1.patch_embed]); backbone is everything but the head. Their BatchNorms
            use their running statistics.
    """

    epochs: PositiveInt = 300
    batch_size: PositiveInt = 256
    label_smoothing: ClosedUnitInterval = 0.1
    ema_decay: ClosedUnitInterval = 0.0
    loss_scale: PositiveFloat = 1.0
    freeze: list[str] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    """Evaluation, in training and on its own.

    Args:
        batch_size: images a step; every image counts once whatever the size.
        every: epochs from one evaluation in training to the next; the last is always evaluated.
    """

    batch_size: PositiveInt = 256
    every: PositiveInt = 1


@dataclass
class Config:
    """A whole recipe."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class RuntimeOnly:
    """The keys of a command whose recipe comes with its model."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


class _Parser(ArgumentParser):
    """jsonargparse's parser, its complaints turned into one line of ours."""

    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        raise UserError(_one_line(message, [action.dest for action in self._actions]))


_UNKNOWN_KEY = (
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"(?:Option|Key) '(?P<key>[\w.]+)' is not (?:accepted|expected)"),
)


def _one_line(message: str, known: Sequence[str]) -> str:
    message = " ".join(message.split())
    for pattern in _UNKNOWN_KEY:
        found = pattern.search(message)
        if found:
            key = ".".join(part for part in found.groups() if part)
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            return f"unknown key {key}: {hint}--help lists every key"
    message = re.sub(r'Parser key "([^"]+)":', r"\1:", message)
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("typing.", "")
    union = re.match(r"(\S+) Does not .*Subtypes: \[(.*)\] Errors: .*Given value: (.*)", message)
    if union:
        message = f"{union[1]} Expected one of {union[2]}. Got value: {union[3]}"
    return message


def run_config_of(checkpoint: str) -> Optional[Path]:
    """The config.yaml that a run left for this checkpoint: beside it, or a folder up."""
    folder = Path(checkpoint).resolve().parent
    return next(
        (p for p in (folder / "config.yaml", folder.parent / "config.yaml") if p.is_file()), None
    )


def parse(
    argv: Sequence[str],
    prog: str,
    description: str,
    add_arguments: Callable[[ArgumentParser], Any],
    schema: type = Config,
    config_beside: Optional[str] = None,
) -> tuple[Any, Namespace]:
    """Read a command line into a filled schema and the command's own arguments.

    Args:
        argv: arguments without the program's name.
        prog, description: for --help.
        add_arguments: adds the command's own arguments to the parser.
        schema: the dataclass of keys that the command takes; only a whole Config is filled from
            the recipe.
        config_beside: name of the argument that holds a checkpoint; its run's config.yaml stands in
            where --config is missing.

    Raises:
        UserError: a key, value or file that can't be used.
    """
    usage = f"python {prog} [--config FILE] [--key value ...]"
    parser = _Parser(prog=prog, usage=usage, description=description)
    parser.add_argument("--config", action="config", help="YAML recipe; options override its keys")
    add_arguments(parser)
    parser.add_class_arguments(schema, as_group=False)
    argv, config = _take_option(list(argv), "--config")
    if config is None and config_beside:
        _, checkpoint = _take_option(argv, f"--{config_beside}")
        if checkpoint and not Path(checkpoint).is_file():
            raise UserError(f"--{config_beside} {checkpoint}: no such file; give a checkpoint")
        config = run_config_of(checkpoint) if checkpoint else None
    if config is not None and schema is Config:
        _check_mapping(Path(config), schema)
        argv = ["--config", str(config), *argv]
    namespace = parser.parse_args(argv)
    settings = schema(
        **{
            group.name: group.type(**vars(namespace.pop(group.name)))
            for group in dataclasses.fields(schema)
        }
    )
    namespace.config = config
    return settings, namespace


def load_config(path: Path) -> Config:
    """Read a resolved configuration that `save_config` wrote."""
    config, _ = parse(["--config", str(path)], "", "", lambda parser: None)
    return config


def _take_option(argv: list[str], name: str) -> tuple[list[str], Optional[str]]:
    """Split an option and its last value off a command line."""
    rest, value = [], None
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name}: expected a value behind it")
        elif word.startswith(f"{name}="):
            value = word[len(name) + 1 :]
        else:
            rest.append(word)
    return rest, value


def _check_mapping(path: Path, schema: type) -> None:
    """Refuse what the parser takes in silence: a file or a group that is no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a YAML file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path}: expected keys and values, found {type(content).__name__}"
        )
    for group in dataclasses.fields(schema):
        if dataclasses.is_dataclass(group.type) and not isinstance(
            content.get(group.name, {}), dict
        ):
            raise UserError(f"--config {path}: {group.name} is a group of keys, not a value")


def save_config(config: Config, path: Path) -> None:
    """Write every key of a resolved configuration as YAML that `parse` reads back."""
    plain = dataclasses.asdict(config, dict_factory=_plain)
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _plain(items: list[tuple[str, Any]]) -> dict:
    """Values as YAML's own types, without the subclasses that carry a range."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        for kind in (bool, int, float):
            if isinstance(value, kind):
                return kind(value)
        return value

    return {key: plain(value) for key, value in items}
