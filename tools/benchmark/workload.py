"""Plans what to measure: options, jobs as plain JSON values, and the processes that run them."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mindspore import nn

from src.build import image_size
from src.config import Config
from src.errors import UserError
from src.models.cvt import CvT

# Peers by name: the script and its modes.
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
# By path: with -m, Python would import from the user's folder first.
WORKER = [sys.executable, str(Path(__file__).with_name("worker.py"))]


@dataclasses.dataclass
class Options:
    """The command line's options beside the recipe.

    Args:
        mode: "infer", "train", "data" or "compile".
        batch_size: images per step.
        rounds: rounds of each process; in mode "compile", new processes of each kind.
        seconds: approximate length of a round.
        threads: cores for each process; None for all.
        images: images per pass in mode "data".
        peer: names or scripts.
        peer_python: the peers' interpreter.
        model_file: exported files to measure too in mode "infer".
        engine: engines that run these files; empty for infer.py's choice.
        reference: name of the side that ratios refer to; None for ours.
        plain: whether to measure ours without compiled operators too.
        predictor: whether to measure `Predictor` in a plain Python process in mode "infer".
    """

    mode: str
    batch_size: int = 16
    rounds: int = 5
    seconds: float = 3.0
    threads: int | None = None
    images: int = 1000
    peer: Sequence[str] = ()
    peer_python: str | None = None
    model_file: Sequence[str] = ()
    engine: Sequence[str] = ()
    reference: str | None = None
    plain: bool = False
    predictor: bool = False


class Plan(NamedTuple):
    """A process to start: one side of the comparison.

    Args:
        name: its name in messages and tables.
        command: of a process that calls `tools.benchmark.protocol.serve`.
        job: the request it starts with.
        remedy: advice if it fails; None for our own code.
    """

    name: str
    command: list[str]
    job: dict[str, Any]
    remedy: str | None = None


def plan_sides(net: nn.Cell, config: Config, options: Options, job: dict) -> list[Plan]:
    """Return the sides to measure: ours first, then exported files and peers.

    Raises:
        UserError: a peer is unknown, or lacks something that the recipe uses.
    """
    plans = [Plan("ours", WORKER, job)]
    plans += plan_files(options.model_file, options.engine, job)
    if options.predictor:
        plans.append(Plan("predictor", WORKER, {**job, "mode": "predictor"}))
    if options.plain:
        plans.append(Plan("plain", WORKER, {**job, "compiled_ops": "never"}))
    if not options.peer:
        if options.peer_python is not None:
            raise UserError("--peer_python has no effect without --peer; give a peer")
        return plans
    python = options.peer_python
    if python is None or shutil.which(python) is None:
        fault = "needs --peer_python" if python is None else f"--peer_python {python} not found"
        raise UserError(
            f"--peer {options.peer[0]}: {fault}; give the interpreter that has it, see "
            "docs/performance.md"
        )
    _require_comparable(config, job["mode"])
    for name in options.peer:
        script = _find_peer(name, options.mode)
        peer_job = {**job, "peer": name, "sizes": cvt_sizes(net) if name in HF else None}
        remedy = f"check {python}; see docs/performance.md"
        if Path(name).stem in ("matmul", *(plan.name for plan in plans)):
            raise UserError(
                f"--peer {name}: another side is called {Path(name).stem}; rename the script"
            )
        plans.append(Plan(Path(name).stem, [python, str(script)], peer_job, remedy))
    return plans


def plan_files(files: Sequence[str], engines: Sequence[str], job: dict) -> list[Plan]:
    """Return a side for each exported file and each engine that runs it, FILE or FILE:ENGINE.

    Raises:
        UserError: a file does not exist, has another's name, or is run by no engine given.
    """
    plans = []
    for file in files:
        path = Path(file)
        if path.suffix not in (".mindir", ".onnx") or not path.is_file():
            raise UserError(f"--model_file {path}: give an exported .mindir or .onnx")
        usable = [e for e in engines if (e == "mindspore") == (path.suffix == ".mindir")]
        if engines and not usable:
            raise UserError(f"--model_file {path}: cannot run in {', '.join(engines)}")
        for engine in usable or ["auto"]:
            name = f"{path.name}:{engine}" if usable else path.name
            if any(plan.name == name for plan in plans):
                raise UserError(f"--model_file {path}: another file has this name; rename one")
            file_job = {**job, "mode": "infer_file", "model_file": file, "engine": engine}
            plans.append(Plan(name, WORKER, file_job))
    return plans


def plan_matmul(job: dict) -> Plan:
    """Return the plan of a matrix product, which shows what the machine can reach."""
    return Plan("matmul", WORKER, {**job, "mode": "matmul"})


def make_job(config: Config, mode: str, batch_size: int, threads: int, images: int) -> dict:
    """Return the job that all sides have in common.

    Returns:
        mode ("infer", "train" or "data"), batch_size, threads, images (per pass in mode data),
        image_size [H, W], num_classes, and the recipe's groups as in `src.config`.
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


def _find_peer(name: str, mode: str) -> Path:
    """Return a peer's script: one of those here, or a user's own .py file.

    Raises:
        UserError: there is no such peer, or it lacks the mode.
    """
    if name in PEERS:
        script, modes = PEERS[name]
        if mode not in modes:
            raise UserError(f"--peer {name}: supports --mode {', '.join(modes)}, not {mode}")
        return SCRIPTS / script
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    raise UserError(f"--peer {name}: choose from {', '.join(PEERS)}, or give a script's .py file")


def cvt_sizes(net: nn.Cell) -> dict[str, Any]:
    """Return a CvT's sizes and rates, one value per stage.

    Raises:
        UserError: transformers' CvT does not support the network.
    """
    if not isinstance(net, CvT):
        raise UserError("--peer hf: transformers' CvT is a peer for the cvt models only")
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
            f"--peer hf: model.depths {depths}: transformers' CvT indexes drop path rates by "
            "stage, so the stages must have at least 1, 2 and 3 blocks"
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


def _require_comparable(config: Config, mode: str) -> None:
    """Require that no key makes our side do work that the peers do not do.

    Raises:
        UserError: some keys do; the message names them.
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
            f"--peer: the peers do not support this recipe's {', '.join(keys)}; set the default"
        )
