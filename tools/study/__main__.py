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
    """Train the unfinished cells of a study; write its table and plots."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--output",
            type=str,
            help="folder of the study; default: runs/<folder>_<file> of --config",
        )
        parser.add_argument(
            "--only",
            type=str,
            default="*",
            help="train only the cells with these names (model-images-seed), e.g. 'cvt_nano-250-*'",
        )
        parser.add_argument(
            "--dry_run", action="store_true", help="check everything, list the cells, do not train"
        )

    argv, options = take_keys(argv)
    if take_option(argv, "--config")[1] is None and not {"-h", "--help"} & set(argv):
        raise UserError("--config is missing; give a study such as config/study/digits.yaml")
    description = (
        "Train a grid of models x training images x seeds, one run at a time; run the same command "
        "again to continue. Any recipe key (train.py --help) applies to all runs, for example "
        "--data.path FOLDER."
    )
    study, arguments = parse(argv, "-m tools.study", description, add_arguments, schema=Study)
    prepare_environment()
    log_to()
    from tools.study.cells import expand_study
    from tools.study.runner import StudyRunner

    output = Path(arguments.output or default_output(arguments.config))
    cells = expand_study(study, Path(arguments.config), options)
    runner = StudyRunner(cells, output, arguments.only)
    if arguments.dry_run:
        runner.list_cells()
        return
    runner.run()
    print(f"{(output / 'table.md').read_text(encoding='utf-8')}\nresults: {output}")


if __name__ == "__main__":
    main()
