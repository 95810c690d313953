"""Train a CvT: python train.py --config config/digits/cvt_nano.yaml [--output DIR] [--resume]."""

from __future__ import annotations

import os
from pathlib import Path

from src.cli import find_resumed_run, parse
from src.config_io import default_output
from src.device import import_mindspore, log_to, prepare_environment
from src.errors import UserError, executable


@executable
def main(argv: list[str]) -> None:
    """Train the network that the configuration describes."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--output", type=str, help="run folder; default: runs/<folder>_<file> of the recipe"
        )
        parser.add_argument(
            "--resume",
            nargs="?",
            const=True,
            default=False,
            metavar="STATE",
            help="continue the run in --output from its newest state, or the run of STATE, a state "
            "or a run's folder",
        )
        parser.add_argument(
            "--accept_changes", action="store_true", help="resume although settings differ"
        )
        parser.add_argument(
            "--finetune",
            type=str,
            help="weights to start from; the head is new if the classes differ",
        )

    state, argv = find_resumed_run(argv, is_first=os.environ.get("RANK_ID", "0") == "0")
    # A resumed run uses its own config.yaml unless --config is given.
    beside = "output" if state is not None else None
    config, arguments = parse(
        argv, "train.py", "Train a network.", add_arguments, config_beside=beside
    )
    if arguments.config is None and arguments.output is None:
        raise UserError("--config is missing; give a recipe, such as config/digits/cvt_nano.yaml")
    if arguments.accept_changes and state is None:
        raise UserError("--accept_changes: works only with --resume; add --resume, or leave it out")
    output = Path(arguments.output or default_output(arguments.config))
    prepare_environment()
    log_to()
    import_mindspore()
    from src.training.run import train  # late: importing MindSpore takes seconds

    resume = state if state and not state.is_dir() else state is not None
    train(config, output, resume, arguments.finetune, arguments.accept_changes)


if __name__ == "__main__":
    main()
