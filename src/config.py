"""The schema of configurations: every key with its type, default and meaning."""

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeInt,
    register_type,
    restricted_number_type,
)

from src.errors import shorten

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PATH = {"path": True}  # marks a key with a path, in which a leading ~ is expanded
INFINITY = float("inf")
MAX_INT = 2**31 - 1  # MindSpore counts in 32 bits
PositiveCount = restricted_number_type(
    "PositiveCount", int, [(">=", 1), ("<=", MAX_INT)], join="and"
)
Count = restricted_number_type("Count", int, [(">=", 0), ("<=", MAX_INT)], join="and")
Positive = restricted_number_type("Positive", float, [(">", 0), ("<", INFINITY)], join="and")
NonNegative = restricted_number_type("NonNegative", float, [(">=", 0), ("<", INFINITY)], join="and")
Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)], join="and")


class ClassNames(list):
    """A list of class names with a fast check: jsonargparse takes quadratic time for list[str]."""


def _class_names(value: Any) -> ClassNames:
    if not isinstance(value, list):
        raise ValueError("Expected a list of names")
    for name in value:
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise ValueError(f"Expected names; put quotes around {shorten(name)}")
    return ClassNames(map(str, value))  # [3, 8] is YAML for two numbers


register_type(
    ClassNames,
    serializer=list,
    deserializer=_class_names,
    type_check=lambda value, kind: isinstance(value, kind),
)


@dataclass
class RuntimeConfig:
    """Device, precision and seed.

    Args:
        device: auto takes the first of Ascend, GPU, CPU that MindSpore finds.
        device_id: index of the Ascend or GPU device; null takes DEVICE_ID, or 0 if that is not set.
        mode: graph compiles the whole step; pynative runs operator by operator, for debugging.
        precision: dtype of Linears, convolutions and attention products; norms, softmax and loss
            stay in float32.
        flash_attention: compute attention in Ascend's fused kernel, which does not store the
            scores; documented for Atlas A2 only, float16 or bfloat16. Export ignores it;
            infer.py and Predictor ignore it in the run's configuration.
        compiled_ops: on the CPU in float32, use operators that the system's C++ compiler builds at
            the first start; auto does so if there is a compiler. Export ignores it.
        depthwise: conv runs CvT's depthwise convolutions in the framework's kernel; shifts runs
            them as nine shifted multiply-adds without transposes, in float32, for accelerators on
            which a measurement shows that this is faster. On a CPU, conv is the compiled operator
            if there is one, and shifts turns compiled attention off. Export ignores it.
        jit_level: MindSpore's compilation level; null keeps the device's default. O2 is Ascend's
            graph engine.
        deterministic: use reproducible operators, which costs time. Ascend needs this for a
            resumed run to equal an uninterrupted one; on a GPU, they are equal up to rounding only.
        seed: seed of the initial weights, data order, augmentation, drop path and dropout.
    """

    device: Literal["auto", "Ascend", "GPU", "CPU"] = "auto"
    device_id: Optional[Count] = None
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
    """The network; a key that is null keeps the variant's value.

    The sizes and options of stages are CvT's; a key that the model does not have is rejected.

    Args:
        name: one of src.models.list_models().
        image_size: pixels, one number or [height, width].
        num_classes: outputs of the head; null is the number of classes in the data.
        embed_dims: channels of the three stages.
        depths: blocks in the three stages.
        num_heads: attention heads in the three stages.
        mlp_ratio: ratio of the MLP's hidden dimension to the embedding dimension.
        kv_stride: stride of the convolutional projection of keys and values.
        qkv_projection: projection of q, k and v.
        cls_token: whether the last stage has a class token.
        pos_embed: learned position embeddings, one value or one per stage.
        patch_embed: conv for overlapping convolutions, patch for separate patches.
        drop_path_rate: rate of stochastic depth, one value or one per stage.
        drop_rate: rate of dropout.
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
    """Images, labels, and the preprocessing of evaluation and deployment.

    Args:
        source: digits are included; the others need a path.
        path: the data set's folder.
        train_folder: folder of the training images (imagefolder, mindrecord).
        val_folder: folder of the evaluation images (imagefolder, mindrecord).
        class_names: names in the order of the labels; null uses the data's own. A run writes them
            to its config.yaml, so that every checkpoint has its classes.
        classes: use only these classes, labelled in this order.
        labels: label protocol of eval.py: val uses the class folders, real is ImageNet ReaL, v2 is
            ImageNet-V2 with its class folders 0..999.
        labels_file: ReaL's real.json, for labels real.
        train_images: use only this number of training images, balanced over the classes;
            runtime.seed selects them.
        val_from_train: evaluate on this number of training images, balanced over the classes, and
            do not train on them: for tuning without the test images. null evaluates on the data
            set's evaluation images.
        mean: mean of the three channels, for values in 0..1.
        std: standard deviation of the three channels, for values in 0..1.
        crop_ratio: evaluation resizes images, keeping their aspect, to cover image size /
            crop_ratio and crops the centre; null resizes directly to the image size, as in the
            official 384 px evaluation.
        interpolation: filter of every resize: bicubic is antialiased, as in Pillow; bilinear and
            nearest are not.
        workers: threads that prepare images; 0 uses one per core, at most eight.
        check_images: read every image file once before the start (imagefolder).
        index: file for the results of this check. Several runs on the same data can share it and
            then read only new and changed images; null keeps it in the run's folder.
        broken: action on unreadable images: skip leaves them out and counts them, stop ends the
            run, auto skips training images and stops at evaluation images.
        broken_share: fraction of broken images above which skip also ends the run.
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
    """Augmentation of training images.

    Args:
        crop: random_resized crops a random part and resizes it; pad shifts by up to `padding`.
        scale: minimum and maximum fraction of the area that random_resized keeps.
        ratio: minimum and maximum aspect ratio of that crop.
        padding: pixels of zeros around the image for pad.
        hflip: probability of a horizontal flip.
        rand_augment: RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; its parts are m
            (magnitude 0..10), mstd (its deviation; above 100, magnitudes are uniform in 0..m), n
            (operations per image, 2), p (probability of each, 0.5) and inc1 (the only supported set
            of operations).
        color_jitter: maximum deviation from 1 of the factors on brightness, contrast and
            saturation. The official configs have 0.4, but timm ignores it with RandAugment; here
            both are applied.
        erasing_prob: probability that a rectangle becomes noise (random erasing, pixel mode).
        repeats: consecutive repetitions of an image with different augmentation; the number of
            steps per epoch stays the same, with fewer different images (repeated augmentation).
        mixup: alpha of mixup's Beta distribution; 0 disables mixup.
        cutmix: alpha of cutmix's Beta distribution; 0 disables cutmix.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: probability of cutmix in a mixed batch if both are enabled.
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
    """The optimizer, with PyTorch's semantics, and its learning rate schedule.

    Args:
        name: adamw, or sgd with momentum.
        lr: peak learning rate.
        lr_batch_size: the global batch (all devices, all accumulated parts) that lr is for; lr is
            scaled in proportion to the actual batch. null does not scale.
        weight_decay: decay of the weights of Linears and convolutions only; decoupled in adamw.
        betas: decay rates of adamw's moments.
        eps: added to the root of adamw's second moment.
        momentum: momentum of sgd.
        clip_norm: maximum global L2 norm of the gradients; 0 does not clip.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the cosine.
        decay_epochs: number of final epochs with cosine decay; before them the rate is constant, so
            that a run can be extended as if it had had more epochs from the start. null applies
            the cosine to all epochs.
        schedule_per: change the rate every step, or every epoch as in the official code.
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
    """The training run.

    Args:
        epochs: number of epochs. Each is a pass over the training images, unless epoch_steps or
            augment.repeats is set.
        epoch_steps: steps per epoch, independent of the number of training images; passes over the
            images continue across epochs. null ends an epoch with each pass.
        batch_size: images per batch on one device.
        accumulate: batches per optimizer step (gradient accumulation); equals one large batch,
            except that BatchNorm's statistics, mixup and cutmix are each batch's own.
        label_smoothing: fraction of the target spread over all classes.
        ema_decay: decay of the exponential moving average of the weights, which is evaluated and
            saved as best; 0 disables it.
        loss_scale: factor on the loss against underflow of float16 gradients; dynamic starts at
            65,536, halves after an overflow, whose step is skipped, and doubles after 2,000 steps.
        non_finite: action if loss or gradients are not finite: stop the run or skip the step; in
            both cases the weights keep their values.
        save_every: steps between saved states; 0 saves only after each epoch.
        keep: number of newest saved states to keep, in addition to the best weights.
        sync_batchnorm: compute BatchNorm's statistics over all devices' batches.
        freeze: parts of the network that are not trained, by the beginning of their names
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
    """Evaluation during training and by eval.py.

    Args:
        batch_size: images per step; the result does not depend on it.
        every: epochs between evaluations during training; the last epoch is always evaluated.
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
    """A grid of runs: models x numbers of training images x seeds.

    Args:
        recipe: recipe of every run, a path relative to the study's file.
        models: changes to the recipe (groups of keys) by name of the model. A variant of a network
            or of its training is a model too; table.md compares all with the first one.
        train_images: numbers of training images.
        seeds: each selects images, their order, augmentation and initial weights for all models.
        steps: steps of every run; one number, or one for each number of training images.
        evaluate_every: steps between evaluations; they form an epoch of the recipe, in which
            warm-up and saved states are counted.
        settings: changes to the recipe (groups of keys) for all models.
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
    """The keys of a command that reads the recipe beside its model."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
