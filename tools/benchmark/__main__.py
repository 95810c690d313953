"""Counts or measures a network: python -m tools.benchmark --mode infer|train|data|..."""

from __future__ import annotations

from pathlib import Path

from jsonargparse.typing import PositiveInt

from src.cli import parse
from src.config import Positive
from src.device import choose_device, inference_runtime, log_to, prepare_environment
from src.errors import UserError, executable
from src.files import is_json, require_replaceable, write_json

IMAGENET_CLASSES = 1000
COUNTED = ("complexity", "scaling")
ONLY = {
    "model_file": ("infer",),
    "engine": ("infer",),
    "reference": ("infer", "train", "data"),
    "images": ("data",),
    "seconds": ("infer", "train", "data"),
    "plain": ("infer", "train", "compile"),
    "predictor": ("infer",),
}


@executable
def main(argv: list[str]) -> None:
    """Print a mode's results; write them as JSON if asked to."""

    description = (
        f"Count or measure a network. model.num_classes null means {IMAGENET_CLASSES} here. MACs "
        "are those of convolutions, Linears and both attention products; norms, softmax, "
        "activations, biases and pooling are not counted. The paper's FLOPs are these MACs. Mode "
        "scaling runs nothing; tools/benchmark/estimate.py has its formulas."
    )
    config, arguments = parse(argv, "-m tools.benchmark", description, add_arguments)
    config.model.num_classes = config.model.num_classes or IMAGENET_CLASSES
    given = _given(arguments)
    if arguments.mode not in COUNTED and "training.batch_size" in arguments.given:
        raise UserError("--training.batch_size: is --batch_size here; give that")
    if given.get("engine") and not given.get("model_file"):
        raise UserError("--engine: runs exported files; give --model_file")
    if arguments.json:
        require_replaceable(arguments.json, "--json", _is_result, arguments.force)
    prepare_environment()
    log_to()
    from tools.benchmark.counts import estimate_scaling, measure_complexity
    from tools.benchmark.measure import measure, measure_compile
    from tools.benchmark.workload import Options

    if arguments.mode == "infer":  # as eval.py
        chosen = {key.removeprefix("runtime.") for key in arguments.given}
        device = choose_device(config.runtime.device)
        config.runtime = inference_runtime(config.runtime, device, chosen)
    if arguments.mode in COUNTED:
        count = {"complexity": measure_complexity, "scaling": estimate_scaling}[arguments.mode]
        result = count(config)
    else:
        run = measure_compile if arguments.mode == "compile" else measure
        result = run(config, Options(arguments.mode, **given))
    if arguments.json:
        write_json(result, arguments.json)


def add_arguments(parser) -> None:
    """Add the options beside the recipe's keys."""
    parser.add_argument(
        "--mode",
        choices=[*COUNTED, "infer", "train", "data", "compile"],
        default="infer",
        help="complexity: parameters and multiply-accumulates (MACs) per image, by stage; "
        "scaling: estimated memory and all-reduce time of a training step; infer, train: "
        "speed and memory of the network and of the training step; data: speed of the training "
        "pipeline; compile: seconds of the first calls, each in a new process",
    )
    measured = parser.add_argument_group("measuring")
    measured.add_argument("--batch_size", type=PositiveInt, help="images per step (default: 16)")
    measured.add_argument("--rounds", type=PositiveInt, help="rounds of each side (default: 5)")
    measured.add_argument(
        "--seconds", type=Positive, help="approximate length of a round (default: 3)"
    )
    measured.add_argument("--threads", type=PositiveInt, help="cores for each side (default: all)")
    measured.add_argument(
        "--images", type=PositiveInt, help="images per pass in mode data (default: 1000)"
    )
    measured.add_argument(
        "--peer",
        nargs="+",
        action="extend",
        help="implementations to compare with: hf, hf_compiled (infer, train, compile), "
        "hf_onnxruntime, hf_openvino (infer), timm, torchvision (data), or a script; see "
        "docs/performance.md",
    )
    measured.add_argument("--peer_python", type=str, help="interpreter that has the peers")
    measured.add_argument(
        "--model_file",
        nargs="+",
        action="extend",
        help="exported .mindir or .onnx files to measure too (infer)",
    )
    measured.add_argument(
        "--engine",
        nargs="+",
        action="extend",
        choices=("openvino", "onnxruntime", "mindspore"),
        help="engines that run the files; default: infer.py's choice",
    )
    measured.add_argument(
        "--reference", type=str, help="the side that ratios refer to (default: ours)"
    )
    measured.add_argument(
        "--plain",
        action="store_true",
        default=None,
        help="also measure ours without compiled operators (infer, train, compile)",
    )
    measured.add_argument(
        "--predictor",
        action="store_true",
        default=None,
        help="also measure Predictor in a plain Python process (infer)",
    )
    parser.add_argument("--json", type=str, help="also write the results to this file")
    parser.add_argument(
        "--force", action="store_true", help="replace a file that is not an earlier result"
    )


def _is_result(path: Path) -> bool:
    """Return whether a JSON file is a result of this command."""
    common = ({"mode", "sides"}, {"model", "image_size"})
    return is_json(path, lambda content: any(keys <= content.keys() for keys in common))


def _given(arguments) -> dict:
    """Return the given measuring options.

    Raises:
        UserError: one of them has no effect in the mode.
    """
    names = ("batch_size", "rounds", "threads", "peer", "peer_python", *ONLY)
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    for name in given:
        if arguments.mode in COUNTED or arguments.mode not in ONLY.get(name, (arguments.mode,)):
            instead = "give --training.batch_size" if name == "batch_size" else "leave it out"
            raise UserError(f"--{name}: has no effect in mode {arguments.mode}; {instead}")
    return given


if __name__ == "__main__":
    main()
