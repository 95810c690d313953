"""What is measured, as plain values that a process of any interpreter can take up."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mindspore import nn

from src.build import image_size
from src.config import Config
from src.errors import UserError
from src.models.cvt import CvT

if TYPE_CHECKING:
    from tools.benchmark.measure import Options

# Peers by name: the script, and the modes that it has.
PEERS = {
    "hf": ("hf.py", ("infer", "train", "compile")),
    "hf_compiled": ("hf.py", ("infer", "train", "compile")),
    "hf_onnxruntime": ("hf_engines.py", ("infer",)),
    "hf_openvino": ("hf_engines.py", ("infer",)),
    "timm": ("timm_loader.py", ("data",)),
    "torchvision": ("torchvision_loader.py", ("data",)),
}
HF = ("hf", "hf_compiled", "hf_onnxruntime", "hf_openvino")
SCRIPTS = Path(__file__).parent / "peers"
# By path: with -m Python would import from the user's folder first.
WORKER = [sys.executable, str(Path(__file__).with_name("worker.py"))]


class Plan(NamedTuple):
    """A side to start.

    Args:
        name: in messages and tables.
        command: of a process that `serve`s.
        job: what it is told.
        remedy: what a user can do where it fails; None for our own code.
    """

    name: str
    command: list[str]
    job: dict[str, Any]
    remedy: str | None = None


def plan_sides(net: nn.Cell, config: Config, options: Options, job: dict) -> list[Plan]:
    """Ours first, then an exported file and the peers, where they are asked for.

    Raises:
        UserError: a peer that there is not, or that lacks what the recipe has.
    """
    plans = [Plan("ours", WORKER, job)]
    plans += plan_files(options.model_file, options.engine, job)
    if options.predictor:
        plans.append(Plan("predictor", WORKER, {**job, "mode": "predictor"}))
    if options.plain:
        plans.append(Plan("plain", WORKER, {**job, "compiled_ops": "never"}))
    if not options.peer:
        if options.peer_python is not None:
            raise UserError("--peer_python does nothing without --peer; name a peer")
        return plans
    python = options.peer_python
    if python is None or shutil.which(python) is None:
        missing = (
            "needs --peer_python," if python is None else f"--peer_python {python} is no program;"
        )
        raise UserError(
            f"--peer {options.peer[0]}: {missing} give the interpreter that has it, which "
            "docs/performance.md sets up"
        )
    refuse_what_peers_lack(config, job["mode"])
    for name in options.peer:
        script = find_peer(name, options.mode)
        peer_job = {**job, "peer": name, "sizes": cvt_sizes(net) if name in HF else None}
        remedy = f"look at {python} and at docs/performance.md"
        if Path(name).stem in ("matmul", *(plan.name for plan in plans)):
            raise UserError(
                f"--peer {name}: another side has the name {Path(name).stem}; rename it"
            )
        plans.append(Plan(Path(name).stem, [python, str(script)], peer_job, remedy))
    return plans


def plan_files(files: Sequence[str], engines: Sequence[str], job: dict) -> list[Plan]:
    """A side for each exported file in each engine that takes it, named FILE or FILE:ENGINE.

    Raises:
        UserError: no such file, two of one name, or engines of which none takes a file.
    """
    plans = []
    for file in files:
        path = Path(file)
        if path.suffix not in (".mindir", ".onnx") or not path.is_file():
            raise UserError(f"--model_file {path}: give an exported .mindir or .onnx")
        taken = [e for e in engines if (e == "mindspore") == (path.suffix == ".mindir")]
        if engines and not taken:
            raise UserError(f"--model_file {path}: is not run by {', '.join(engines)}")
        for engine in taken or ["auto"]:
            name = f"{path.name}:{engine}" if taken else path.name
            if any(plan.name == name for plan in plans):
                raise UserError(f"--model_file {path}: another file has this name; rename it")
            file_job = {**job, "mode": "infer_file", "model_file": file, "engine": engine}
            plans.append(Plan(name, WORKER, file_job))
    return plans


def plan_matmul(job: dict) -> Plan:
    """What the machine does at best, in our own process."""
    return Plan("matmul", WORKER, {**job, "mode": "matmul"})


def make_job(config: Config, mode: str, batch_size: int, threads: int, images: int) -> dict:
    """What every side is told.

    Returns:
        mode ("infer", "train" or "data"), batch_size, threads, images (of a pass in mode data),
        image_size [H, W], num_classes, and the recipe's groups as `src.config` has them.
    """
    return {
        "mode": mode,
        "batch_size": batch_size,
        "threads": threads,
        "images": images,
        "image_size": list(image_size(config.model)),
        "num_classes": config.model.num_classes,
        **dataclasses.asdict(config),
    }


def find_peer(name: str, mode: str) -> Path:
    """The script of a peer: one of those here, or a user's own .py that `serve`s.

    Raises:
        UserError: no such peer, or one that does not do this.
    """
    if name in PEERS:
        script, modes = PEERS[name]
        if mode not in modes:
            raise UserError(f"--peer {name}: is for --mode {', '.join(modes)}, not {mode}")
        return SCRIPTS / script
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    raise UserError(f"--peer {name}: choose from {', '.join(PEERS)}, or give a script's .py file")


def cvt_sizes(net: nn.Cell) -> dict[str, Any]:
    """A CvT's sizes and rates, a value for each stage, read off the network.

    Raises:
        UserError: a network that the port in transformers has not.
    """
    if not isinstance(net, CvT):
        raise UserError("--peer hf: transformers' CvT is the peer of the cvt models only")
    stages = [net.stage0, net.stage1, net.stage2]
    first = [stage.blocks[0] for stage in stages]
    if first[0].attn.qkv_projection != "conv" or any(s.pos_embed_grid for s in stages):
        raise UserError(
            "--peer hf: transformers' CvT has neither model.qkv_projection avg or linear nor "
            "model.pos_embed; leave them out"
        )
    depths = [len(stage.blocks) for stage in stages]
    if any(depth <= i for i, depth in enumerate(depths)):
        raise UserError(
            f"--peer hf: model.depths {depths}: transformers' CvT finds a drop path rate by the "
            "number of its stage, so the stages must have 1, 2 and 3 blocks at least"
        )
    sizes, strides, paddings = zip(*net.patches)
    return {
        "in_channels": net.in_channels,
        "embed_dims": [stage.dim for stage in stages],
        "depths": depths,
        "num_heads": [block.attn.num_heads for block in first],
        "mlp_ratios": [
            block.mlp.fc1.out_channels / stage.dim for block, stage in zip(first, stages)
        ],
        "kv_strides": [block.attn.conv_proj_k.conv.stride[0] for block in first],
        "cls_tokens": [stage.has_cls_token for stage in stages],
        "patch_sizes": sizes,
        "patch_strides": strides,
        "patch_paddings": paddings,
        "drop_path_rates": [stage.blocks[-1].drop_path1.rate for stage in stages],
        "drop_rates": [stage.pos_drop.rate for stage in stages],
    }


def refuse_what_peers_lack(config: Config, mode: str) -> None:
    """Name the keys that would make ours do other work than a peer.

    Raises:
        UserError: there are some.
    """
    training, augment, data = config.training, config.augment, config.data
    lacking = {"runtime.precision": config.runtime.precision != "float32"}
    if mode in ("train", "compile"):
        lacking.update(
            {
                "optimizer.name": config.optimizer.name != "adamw",
                "training.accumulate": training.accumulate > 1,
                "training.ema_decay": training.ema_decay > 0,
                "training.freeze": bool(training.freeze),
                "augment.mixup": augment.mixup > 0,
                "augment.cutmix": augment.cutmix > 0,
            }
        )
    if mode == "data":
        lacking = {
            "data.source": data.source != "imagefolder",
            "data.classes": data.classes is not None,
            "data.train_images": data.train_images is not None,
            "augment.crop": augment.crop != "random_resized",
            "augment.repeats": augment.repeats > 1,
            "augment.color_jitter beside rand_augment": bool(
                augment.color_jitter and augment.rand_augment
            ),
        }
    keys = [key for key, found in lacking.items() if found]
    if keys:
        raise UserError(
            f"--peer: the peers have nothing like this recipe's {', '.join(keys)}; set the default"
        )
