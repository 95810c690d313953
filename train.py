"""Train a CvT: python train.py --config config/digits/cvt_nano.yaml [--output DIR] [--resume]."""

from __future__ import annotations

from pathlib import Path

from src.command_line import default_output, parse
from src.errors import UserError, executable
from src.runtime import log_to, prepare_environment


@executable
def main(argv: list[str]) -> None:
    """Train what the configuration describes."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--output", type=str, help="folder of the run; default: runs/ and the recipe's name"
        )
        parser.add_argument(
            "--resume", action="store_true", help="go on with the run in the output folder"
        )
        parser.add_argument(
            "--finetune", type=str, help="weights to start from; a head for other classes is new"
        )

    beside = "output" if "--resume" in argv else None  # a run knows its settings
    config, arguments = parse(
        argv, "train.py", "Train a network.", add_arguments, config_beside=beside
    )
    if arguments.config is None and arguments.output is None:
        raise UserError("--config is missing; give a recipe, as config/digits/cvt_nano.yaml")
    output = Path(arguments.output or default_output(arguments.config))
    prepare_environment()
    log_to()
    from src.training.run import train  # MindSpore takes seconds: arguments are checked by now

    train(config, output, arguments.resume, arguments.finetune)


if __name__ == "__main__":
    main()
