"""Compare models on few images: python -m tools.study --config config/study/digits.yaml."""

from __future__ import annotations

from pathlib import Path

from src.cli import parse, take_keys, take_option
from src.config import Study
from src.config_io import default_output
from src.device import log_to, prepare_environment
from src.errors import UserError, executable


@executable
def main(argv: list[str]) -> None:
    """Train what is not done yet of a study; write its table and plots."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--output", type=str, help="folder of the study; default: runs/ and the file's name"
        )
        parser.add_argument(
            "--only",
            type=str,
            default="*",
            help="train the cells of these names only (model-images-seed), as 'cvt_nano-250-*'",
        )
        parser.add_argument(
            "--dry_run", action="store_true", help="check all, and list the cells that are done"
        )

    argv, options = take_keys(argv)
    if take_option(argv, "--config")[1] is None and not {"-h", "--help"} & set(argv):
        raise UserError("--config is missing; give a study, as config/study/digits.yaml")
    description = (
        "Train a grid of models x training images x seeds, one run at a time; called again, it "
        "goes on. Any key of a recipe (train.py --help) may be given, for all runs: "
        "--data.path FOLDER."
    )
    study, arguments = parse(argv, "-m tools.study", description, add_arguments, schema=Study)
    prepare_environment()
    log_to()
    from tools.study.grid import cells_of
    from tools.study.study import StudyRun

    output = Path(arguments.output or default_output(arguments.config))
    run = StudyRun(cells_of(study, Path(arguments.config), options), output, arguments.only)
    if arguments.dry_run:
        run.show()
        return
    run.train()
    print(f"{(output / 'table.md').read_text(encoding='utf-8')}\neverything lies in {output}")


if __name__ == "__main__":
    main()
