"""The only schema: every key of a recipe with its type, default and meaning."""

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeInt,
    register_type,
    restricted_number_type,
)

from src.errors import shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PATH = {"path": True}  # marks a key whose leading ~ is the user's home folder
INFINITY = float("inf")
MOST = 2**31 - 1  # of what MindSpore counts in 32 bits
PositiveCount = restricted_number_type("PositiveCount", int, [(">=", 1), ("<=", MOST)], join="and")
Count = restricted_number_type("Count", int, [(">=", 0), ("<=", MOST)], join="and")
Positive = restricted_number_type("Positive", float, [(">", 0), ("<", INFINITY)], join="and")
NonNegative = restricted_number_type("NonNegative", float, [(">=", 0), ("<", INFINITY)], join="and")
Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)], join="and")


class ClassNames(list):
    """Names of classes, checked at once: jsonargparse takes quadratic time for a list[str]."""


def _class_names(value: Any) -> ClassNames:
    if not isinstance(value, list):
        raise ValueError("Expected a list of names")
    for name in value:
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise ValueError(f"Expected names; put quotes around {shown(name)}")
    return ClassNames(map(str, value))  # [3, 8] is YAML for two numbers


register_type(
    ClassNames,
    serializer=list,
    deserializer=_class_names,
    type_check=lambda value, kind: isinstance(value, kind),
)


@dataclass
class RuntimeConfig:
    """Where and how the graphs run.

    Args:
        device: auto takes the first of Ascend, GPU, CPU that MindSpore finds here.
        device_id: index of the Ascend or GPU device.
        mode: graph compiles the whole step; pynative runs operator by operator, for debugging.
        precision: dtype of Linears, convolutions and attention products; norms, softmax and loss
            stay in float32.
        flash_attention: compute attention in Ascend's fused kernel, which never holds the scores;
            Atlas A2 or later, in float16 or bfloat16. Export and prediction do without it.
        compiled_ops: on the CPU and in float32, compute in operators that the system's C++ compiler
            builds at the first start; auto does so where there is one. Export does without them.
        depthwise: conv runs CvT's depthwise convolutions in the framework's kernel; shifts as nine
            shifted multiply-adds without transposes, in float32, for accelerators on which a
            measurement shows that to be faster. Export does without it.
        jit_level: MindSpore's compilation level; null leaves the device's default. O2 is Ascend's
            graph engine.
        deterministic: let a device compute the same operator alike each time, at some cost; on an
            accelerator a resumed run equals an uninterrupted one only with it.
        seed: of the initial weights, data order, augmentation, drop path and dropout.
    """

    device: Literal["auto", "Ascend", "GPU", "CPU"] = "auto"
    device_id: Count = 0
    mode: Literal["graph", "pynative"] = "graph"
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    flash_attention: bool = False
    compiled_ops: Literal["auto", "always", "never"] = "auto"
    depthwise: Literal["conv", "shifts"] = "conv"
    jit_level: Optional[Literal["O0", "O1", "O2"]] = None
    deterministic: bool = False
    seed: NonNegativeInt = 0


@dataclass
class ModelConfig:
    """The network; a key left at null keeps what the named variant has.

    The sizes and options of stages are CvT's; a key that the model does not have is refused.

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
    num_classes: Optional[PositiveCount] = None
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
        train_folder: folder of the training images (imagefolder, mindrecord).
        val_folder: folder of the evaluation images (imagefolder, mindrecord).
        class_names: names in the order of the labels; null takes the data's own. A run writes
            them into its config.yaml, so that a checkpoint always knows its classes.
        classes: use only the classes of these names, labelled in this order.
        labels: of the evaluation images; val is the folders' own, real and v2 are ImageNet's later
            ones (eval.py): with v2 the class folders are ImageNet-V2's 0..999.
        labels_file: ReaL's real.json, for labels real.
        train_images: use only so many training images, as many of each class as there can be;
            which ones follows from runtime.seed.
        val_from_train: evaluate on so many of the training images, as many of each class, which
            training then leaves out: for tuning without the test images. null evaluates on the
            data set's own evaluation images.
        mean: of the three channels, for values in 0..1.
        std: of the three channels, for values in 0..1.
        crop_ratio: evaluation resizes the short side to image size / crop_ratio and crops the
            centre; null resizes straight to the image size, as the official 384 px evaluation.
        interpolation: filter of every resize, as in Pillow.
        workers: threads that prepare images; 0 takes one per core, eight at most.
        check_images: read every image file once before the start (imagefolder).
        index: file that keeps the result of that, for several runs on the same data, which then
            read only new and changed images; null keeps it in the run's folder.
        broken: what becomes of images that can't be read: skip leaves them out and counts them,
            stop ends the run; auto skips training images and stops at evaluation images.
        broken_share: fraction of broken images beyond which skipping stops as well.
    """

    source: Literal["digits", "imagefolder", "mindrecord", "cifar10", "cifar100", "mnist"] = (
        "imagefolder"
    )
    path: Optional[str] = field(default=None, metadata=PATH)
    train_folder: str = "train"
    val_folder: str = "val"
    class_names: Optional[ClassNames] = None
    classes: Optional[ClassNames] = None
    labels: Literal["val", "real", "v2"] = "val"
    labels_file: Optional[str] = field(default=None, metadata=PATH)
    train_images: Optional[PositiveCount] = None
    val_from_train: Optional[PositiveCount] = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    crop_ratio: Optional[Positive] = 0.875
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    workers: Count = 0
    check_images: bool = True
    index: Optional[str] = field(default=None, metadata=PATH)
    broken: Literal["auto", "skip", "stop"] = "auto"
    broken_share: ClosedUnitInterval = 0.01


@dataclass
class AugmentConfig:
    """Random changes of training images.

    Args:
        crop: random_resized crops a random fraction of the area and resizes it; pad shifts by up to
            `padding`.
        scale: smallest and largest fraction of the area that random_resized keeps.
        ratio: narrowest and widest aspect ratio of that crop.
        padding: pixels of zeros around the image for pad.
        hflip: probability of a horizontal flip.
        rand_augment: RandAugment in timm's notation, as rand-m9-mstd0.5-inc1; its parts are m
            (magnitude 0..10), mstd (its deviation), n (operations an image, 2), p (probability of
            each, 0.5) and inc1 (the set of operations, the only one there is).
        color_jitter: brightness, contrast and saturation times factors up to this far from 1. The
            official configs say 0.4, but timm skips it beside RandAugment; here both are done.
        erasing_prob: probability that a rectangle becomes noise (random erasing, pixel mode).
        repeats: how often an image comes in a row, each time augmented anew; an epoch stays as
            long and has the fewer different images (repeated augmentation).
        mixup: alpha of the Beta distribution of mixup's fraction; 0 turns mixup off.
        cutmix: alpha of the Beta distribution of cutmix's fraction; 0 turns cutmix off.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: probability of cutmix in a batch that is mixed, where both are on.
    """

    crop: Literal["random_resized", "pad"] = "random_resized"
    scale: tuple[Positive, Positive] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (0.75, 1.3333333333333333)
    padding: Count = 4
    hflip: ClosedUnitInterval = 0.5
    rand_augment: Optional[str] = None
    color_jitter: ClosedUnitInterval = 0.0
    erasing_prob: ClosedUnitInterval = 0.0
    repeats: PositiveCount = 1
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    mixup_prob: ClosedUnitInterval = 1.0
    mixup_switch_prob: ClosedUnitInterval = 0.5


@dataclass
class OptimizerConfig:
    """The optimizer, with PyTorch's semantics, and the schedule of its learning rate.

    Args:
        name: adamw, or sgd with momentum.
        lr: peak learning rate.
        lr_batch_size: the global batch (all devices, all accumulated parts) that lr is meant for:
            lr grows and shrinks in proportion to the actual one; null takes lr as it stands.
        weight_decay: of the weights of Linears and convolutions, nothing else; decoupled in adamw.
        betas: decay rates of adamw's moments.
        eps: added to the root of adamw's second moment.
        momentum: of sgd.
        clip_norm: upper bound of the gradients' global L2 norm; 0 does not clip.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the cosine.
        decay_epochs: the last epochs, in which the cosine runs; before them the rate is constant,
            so that a run can be resumed with more epochs as if it had had them from the start.
            null lets the cosine run over all epochs.
        schedule_per: whether the rate changes every step, or every epoch as in the official code.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    lr_batch_size: Optional[PositiveCount] = None
    weight_decay: NonNegative = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    momentum: Fraction = 0.9
    clip_norm: NonNegative = 0.0
    warmup_epochs: Count = 5
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-5
    decay_epochs: Optional[Count] = None
    schedule_per: Literal["step", "epoch"] = "epoch"


@dataclass
class TrainingConfig:
    """The run.

    Args:
        epochs: passes over the training images.
        epoch_steps: let an epoch be so many steps, however many training images there are; their
            passes then go on from one epoch to the next. null ends an epoch with the pass.
        batch_size: images that one device takes at once.
        accumulate: batches whose gradients make one step; equal to a batch so many times larger,
            but for BatchNorm, whose statistics are those of each batch.
        label_smoothing: fraction of the target spread over all classes.
        ema_decay: exponential moving average of the weights, evaluated and kept as best; 0 is off.
        loss_scale: factor on the loss that keeps float16 gradients from underflow; dynamic starts
            at 65,536, halves at an overflow, whose step is skipped, and doubles after 2,000 steps.
        non_finite: what to do where loss or gradients are not finite: stop the run, or skip the
            step; either way the weights stay as before it.
        save_every: steps from one saved state to the next; 0 saves behind each epoch only.
        keep: saved states that are kept, the newest ones; the best weights are kept besides.
        sync_batchnorm: BatchNorm's statistics are those of all devices' batches.
        freeze: parts of the network that stay as they are, by the beginning of their names
            ([stage0, stage1.patch_embed]); backbone is everything but the head. Their BatchNorms
            use their running statistics.
    """

    epochs: PositiveCount = 300
    epoch_steps: Optional[PositiveCount] = None
    batch_size: PositiveCount = 256
    accumulate: PositiveCount = 1
    label_smoothing: Fraction = 0.1
    ema_decay: Fraction = 0.0
    loss_scale: Union[Positive, Literal["dynamic"]] = 1.0
    non_finite: Literal["stop", "skip"] = "stop"
    save_every: Count = 0
    keep: PositiveCount = 2
    sync_batchnorm: bool = False
    freeze: list[str] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    """Evaluation, in training and on its own.

    Args:
        batch_size: images a step; every image counts once whatever the size.
        every: epochs from one evaluation in training to the next; the last is always evaluated.
    """

    batch_size: PositiveCount = 256
    every: PositiveCount = 1


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
class Study:
    """A grid of runs: models x numbers of training images x seeds, of one budget.

    Args:
        recipe: of every run; a path as seen from the study's file.
        models: by their names here, what each changes in the recipe: groups of keys, as there. A
            variant of a network or of its training is a model too; table.md compares all with the
            first one.
        train_images: numbers of training images.
        seeds: each chooses images, their order, augmentation and initial weights, for all models.
        steps: of every run; one number, or one for each number of training images.
        evaluate_every: steps from one evaluation to the next: an epoch, in the recipe's words, so
            warm-up and saved states count in it too.
        settings: what all models change in the recipe, groups of keys.
    """

    recipe: str = field(metadata=PATH)
    models: dict[str, dict[str, dict[str, Any]]]
    train_images: list[PositiveCount]
    seeds: list[NonNegativeInt]
    steps: Union[PositiveCount, list[PositiveCount]]
    evaluate_every: PositiveCount
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class RuntimeOnly:
    """The keys of a command whose recipe comes with its model."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
