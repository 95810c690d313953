"""Classify images: python infer.py --model model.mindir --input IMAGE_OR_FOLDER [--json F]."""

from __future__ import annotations

from src.command_line import parse
from src.config import RuntimeOnly
from src.errors import UserError, executable
from src.runtime import log_to, prepare_environment, setup


@executable
def main(argv: list[str]) -> None:
    """Print a line per image: path, class, probability."""

    def add_arguments(parser) -> None:
        parser.add_argument("--model", type=str, required=True, help="a .mindir, .onnx or weights")
        parser.add_argument("--input", type=str, required=True, help="an image or a folder")
        parser.add_argument("--top_k", type=int, default=5, help="candidates an image")
        parser.add_argument(
            "--batch_size", type=int, default=16, help="images at once, where the model allows it"
        )
        parser.add_argument("--json", type=str, help="also write the candidates to this file")
        parser.add_argument(
            "--sheet", type=str, help="also draw the images with their classes, as a .png or .jpg"
        )
        parser.add_argument(
            "--attention",
            type=str,
            help="also draw what the network looks at, as a .png, .pdf, ...",
        )

    description = "Classify images; --config is only for a .ckpt without its run's config.yaml."
    keys, arguments = parse(argv, "infer.py", description, add_arguments, schema=RuntimeOnly)
    if arguments.top_k < 1:
        raise UserError(f"--top_k {arguments.top_k}: must be 1 or more")
    prepare_environment()
    log_to()
    from src.deploy.attention import explain_file
    from src.deploy.classify import classify_files
    from src.deploy.predictor import Predictor

    if arguments.attention:
        keys.runtime.mode = "pynative"  # the attention is read by hooks
    setup(keys.runtime)
    predictor = Predictor(arguments.model, arguments.config, arguments.batch_size)
    if arguments.attention:
        explain_file(predictor, arguments.input, arguments.attention)
    classify_files(predictor, arguments.input, arguments.top_k, arguments.json, arguments.sheet)


if __name__ == "__main__":
    main()
