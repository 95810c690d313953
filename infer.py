"""Classify images: python infer.py --model model.mindir --input IMAGES_OR_FOLDERS [--json F]."""

from __future__ import annotations

import logging
from pathlib import Path

from jsonargparse.typing import PositiveInt

from src.cli import parse
from src.config import RuntimeOnly
from src.device import import_mindspore, log_to, prepare_environment, setup
from src.errors import UserError, executable


@executable
def main(argv: list[str]) -> None:
    """Print a line per image: path, class, probability."""
    description = "Classify images; only weights without a config.yaml beside them need --config."
    keys, arguments = parse(argv, "infer.py", description, add_arguments, schema=RuntimeOnly)
    prepare_environment()
    log_to()
    import_mindspore()
    from src.data.headers import MAX_PIXELS
    from src.deploy.classify import check_outputs, classify_files
    from src.deploy.loaded_model import RUNTIME_OF_WEIGHTS
    from src.deploy.predictor import Predictor

    given = (key.removeprefix("runtime.") for key in arguments.given)
    runtime = {key: getattr(keys.runtime, key) for key in given if key in RUNTIME_OF_WEIGHTS}
    check_outputs(arguments.json, arguments.sheet, arguments.attention, arguments.force)
    if arguments.attention:
        from src.deploy.attention_image import check_attention, save_attention  # with Matplotlib

        check_attention(arguments.model, arguments.input, arguments.attention, arguments.force)
        runtime["mode"] = keys.runtime.mode = "pynative"  # hooks read the attention
    ignored = {key for key in arguments.given if key.startswith("runtime.")} - {"runtime.device"}
    if not arguments.model.endswith(".onnx"):
        setup(keys.runtime)
    elif ignored:
        raise UserError(f"--{min(ignored)}: has no effect on an ONNX file; leave it out")
    elif keys.runtime.device not in ("auto", "CPU"):
        logging.getLogger("cvt").info("ONNX files run on the CPU, not on %s", keys.runtime.device)
    predictor = Predictor(
        arguments.model,
        arguments.config,
        arguments.batch_size,
        engine=arguments.engine,
        threads=arguments.threads,
        max_pixels=MAX_PIXELS,  # the user's own images, as in training
        runtime=runtime,
    )
    classify_files(predictor, arguments.input, arguments.top_k, arguments.json, arguments.sheet)
    if arguments.attention:  # last: an image that can't be read is in the JSON first
        file = arguments.input[0]
        save_attention(predictor, predictor.prepare(file), Path(file).name, arguments.attention)


def add_arguments(parser) -> None:
    """Add the options other than the keys of `runtime`."""
    parser.add_argument(
        "--model", type=str, required=True, help=".mindir, .onnx, weights or a run's folder"
    )
    parser.add_argument(
        "--input",
        type=str,
        nargs="+",
        action="extend",
        required=True,
        help="images, or folders of images",
    )
    parser.add_argument("--top_k", type=PositiveInt, default=5, help="predictions per image")
    parser.add_argument(
        "--batch_size",
        type=PositiveInt,
        default=16,
        help="images per batch; a file exported with a fixed batch size uses its own",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "openvino", "onnxruntime", "mindspore"),
        default="auto",
        help="auto: for .onnx OpenVINO if it is installed, else onnxruntime; otherwise MindSpore",
    )
    parser.add_argument("--threads", type=PositiveInt, help="compute threads (default: all cores)")
    parser.add_argument("--json", type=str, help="also write the predictions to this file")
    parser.add_argument(
        "--sheet", type=str, help="also draw the images with their classes, as a .png or .jpg"
    )
    parser.add_argument(
        "--attention",
        type=str,
        help="also draw the attention map of one image, as a .png, .pdf, ...",
    )
    parser.add_argument(
        "--force", action="store_true", help="also replace files that are not earlier results"
    )


if __name__ == "__main__":
    main()
