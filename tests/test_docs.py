"""What the documents promise: commands that can be typed, code that runs, files that exist.

Commands are taken by the programs' own parsers, which then stop; nothing is trained here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import mindspore as ms
import pytest

from src.cli import parse
from src.config import Config, Study
from src.config_io import default_output, load_config
from src.data.samples import write_samples
from src.deploy.export import ExportOptions, export
from src.launch import plan
from src.launch.__main__ import read_plan
from src.models import list_models
from tests.conftest import ROOT
from tools.check_device import __main__ as check_device

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "config").rglob("*.yaml"))
OTHERS_PROGRAMS = [
    "source",
    "export",
    "git",
    "cd",
    "pip",
    "curl",
    "printf",
    "atc",
    "converter_lite",
]
OTHERS_PROGRAMS += ["peers/bin/pip"]
OWN_START = ("scripts/quickstart.sh", "scripts/run_tests.sh")  # they take no recipe
TOOLS = ("tools.benchmark", "tools.study", "tools.records")  # they parse like the root's programs


class Accepted(Exception):
    """A program has taken its command line and would go to work now."""


def fences(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.S | re.M)
    return [textwrap.dedent(text) for text in found]


def commands(page: Path) -> list[str]:
    """Every command, and keys with values, fenced or within a line; of a recipe, its head's."""
    text = page.read_text()
    if page.suffix == ".yaml":
        return re.findall(r"^#   (\w.*)$", text, re.M)
    lines = "\n".join(fences(page, "bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    spans = re.findall(r"`([^`]+)`", prose)
    wanted = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|msrun|bash) |--\w+\.\w+ ")
    return lines + [span for span in spans if wanted.match(span)]


class Reader:
    """Hands commands to the programs they name, in a folder that holds what they ask for."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.patch = monkeypatch
        folder.mkdir(exist_ok=True)
        for name in ("config", "pretrained"):
            (folder / name).symlink_to(ROOT / name)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(plan, "visible_devices", lambda *_: list(range(16)))

    def read(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        words = words[: next((i for i, w in enumerate(words) if w in (">", "|", "&")), None)]
        variables = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if not words or words[0] in OTHERS_PROGRAMS:
            return
        if words[0].startswith("--"):  # keys, for any recipe
            self.program("train.py", ["--config", str(RECIPES[0]), *words])
        elif words[0] == "bash":
            self.script(words[1], words[2:], variables)
        elif words[0] not in ("python", "python3", "msrun"):
            raise AssertionError(f"{words[0]} is no program of ours, nor among the known others")
        elif words[1] == "-m":
            assert importlib.util.find_spec(words[2]), words[2]
            if words[2] in TOOLS:
                self.program(f"{words[2].replace('.', '/')}/__main__.py", words[3:])
        elif words[1] == "-c":
            check_python(words[2])
        else:  # python, or msrun with its own options before the program
            first = next(i for i, word in enumerate(words) if word.endswith(".py"))
            self.program(words[first], words[first + 1 :])

    def script(self, name: str, words: list[str], variables: dict[str, str]) -> None:
        if name in OWN_START:
            assert all(word == "--quick" or (ROOT / word).exists() for word in words), words
            return
        if name == "scripts/check_device.sh":
            arguments = check_device.parse(words)
            assert check_device.select_checks(arguments.only, arguments.full)
            return
        if name == "scripts/run_distribute_train.sh":
            self.furnish(words, "data")
            planned, _ = read_plan([*words, "--dry_run"], variables)
            self.program("train.py", planned.command[1:])
            return
        self.furnish(words, "files")
        command = ["bash", str(ROOT / name), *words, "--dry_run"]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.read(done.stdout)

    def program(self, name: str, words: list[str]) -> None:
        if name == "examples/segmentation.py":  # takes no arguments; test_segmentation.py runs it
            assert not words, words
            return
        assert (ROOT / name).is_file(), name
        self.furnish(words, "runs")
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        self.patch.setattr(module, "parse", parse_known_model)
        self.patch.setattr(module, "prepare_environment", accept)
        if "--help" in words:
            with pytest.raises(SystemExit, match="0"):
                module.main.__wrapped__(words)
            return
        with pytest.raises(Accepted):
            module.main.__wrapped__(words)

    def furnish(self, words: list[str], what: str) -> None:
        """Make stand-ins: folders in capitals, runs with their recipe, files for the scripts."""
        for word in words:
            if what != "runs" and re.fullmatch("[A-Z0-9_]{2,}", word):
                Path(word).mkdir(exist_ok=True)
            elif what == "files" and re.search(r"\.(ckpt|mindir|onnx|jpg)$", word):
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).touch()
            if re.match(r"runs/\w+", word) and (word.endswith(".ckpt") or "--resume" in words):
                run = Path(*Path(word).parts[:2])
                (run / "checkpoints").mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / "config/digits/cvt_nano.yaml", run / "config.yaml")
                if word.endswith(".ckpt"):
                    Path(word).touch()


def accept() -> None:
    raise Accepted


def parse_known_model(*arguments, **keywords):
    settings, own = parse(*arguments, **keywords)
    name = settings.model.name if isinstance(settings, Config) else None
    assert name is None or name in list_models(), f"no model {name}"
    return settings, own


def check_python(code: str) -> None:
    """Compile it, and find everything that it imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert node.module == "__future__" or hasattr(module, alias.name), alias.name


RUN_EACH = "import runpy, sys\nfor file in sys.argv[1:]: runpy.run_path(file)"


def run_code(codes: list[str], folder: Path) -> str:
    """Run pieces of code one after the other in a process, so that what they register stays there.

    Each has names of its own.
    """
    names = [f"{number}.py" for number in range(len(codes))]
    for name, code in zip(names, codes):
        (folder / name).write_text(code)
    # Launched one by one, as operators of PyNative are in the tests' own process.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MS_DEV_LAUNCH_BLOCKING": "1"}
    command = [sys.executable, "-c", RUN_EACH, *names]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_taken_by_their_programs(page, tmp_path, monkeypatch):
    for number, line in enumerate(commands(page)):
        try:
            Reader(tmp_path / str(number), monkeypatch).read(line)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            pytest.fail(f"{line}: {error!r}", pytrace=False)


def test_following_the_readme_meets_no_file_of_an_earlier_command():
    """Runs and exported files are refused where one is."""
    seen = []
    for block in fences(ROOT / "README.md", "bash"):
        for words in (shlex.split(line, comments=True) for line in block.splitlines()):
            option = dict(zip(words, words[1:]))
            recipe = next((word for word in words if word.endswith(".yaml")), None)
            if "--output" in words or recipe:
                output = option.get("--output") or default_output(recipe)
                assert output not in seen or "--force" in words, words
                seen.append(output)
    assert {"runs/mine", "mine.mindir", "runs/digits_cvt_nano"} <= set(seen)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --config config/digits/no_such.yaml",
        "python train.py --config config/digits/cvt_nano.yaml --optimizer.lrr 1",
        "python train.py --config config/digits/cvt_nano.yaml --training.epochs many",
        "python train.py --config config/digits/cvt_nano.yaml --model.name cvt_14",
        "python train.py --config config/digits/cvt_nano.yaml [--resume]",
        "python eval.py --ckpt W --no_such",
        "python export.py --ckpt runs/mine/checkpoints/best.ckpt --format om",
        "python -m src.no_such",
        "python -m tools.benchmark --mode no_such",
        "python -c 'from src.deploy import NoSuch'",
        "no_such.py",
        "bash scripts/no_such.sh",
        "bash scripts/run_eval.sh - - runs/mine/checkpoints/best.ckpt --no_such 1",
        "bash scripts/run_distribute_train.sh config/digits/cvt_nano.yaml - 2 --no_such 1",
    ],
)
def test_commands_that_would_fail_are_found(line, tmp_path, monkeypatch):
    with pytest.raises(Exception) as caught:  # noqa: PT011, B017 - whatever it is, the page's test fails
        Reader(tmp_path, monkeypatch).read(line)
    assert caught.type is not Accepted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_compiles_and_finds_its_imports(page):
    for code in fences(page, "python"):
        check_python(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_is_a_recipe(page, tmp_path):
    for text in fences(page, "yaml"):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        if "\nmodels:" in text:
            parse(["--config", str(file)], "-m tools.study", "", lambda _: None, schema=Study)
        else:
            assert load_config(file).model.name in list_models()


def test_the_network_of_the_readme_and_the_additions_of_contributing_run(tmp_path):
    """The latter are a variant, a source and an operation, with what is printed there."""
    (network,) = [c for c in fences(ROOT / "README.md", "python") if "forward_pyramid" in c]
    network += "\nprint([m.shape for m in net.forward_pyramid(images)])"
    additions = "\n".join(fences(ROOT / "docs/contributing.md", "python"))
    assert run_code([network, additions], tmp_path).splitlines() == [
        "[(1, 64, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14)]",
        "(2, 10)",
        "6 ('0', '1', '2') (32, 32, 3)",
        "[30]",
    ]


def test_the_predictor_examples_predict(trained, tmp_path, monkeypatch):
    """The examples of README and docs/deploy.md, with an ONNX file, which nothing compiles."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(write_samples("photographs")[:2]):
        shutil.copy(path, ("a.jpg", "b.png")[number])
    config, weights = load_config(trained / "config.yaml"), trained / "checkpoints/best.ckpt"
    export(config, weights, Path("mine.onnx"), ExportOptions("onnx", None), "CPU")
    for page in ("README.md", "docs/deploy.md"):
        code = next(c for c in fences(ROOT / page, "python") if 'Predictor("mine.mindir")' in c)
        exec(compile(code.replace("mine.mindir", "mine.onnx"), page, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_options_that_are_named_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?:config|scripts|docs|tests|src)/[\w/.-]+\.(?:yaml|sh|md|py)", text):
        assert (ROOT / name).is_file(), name
    for name, anchor in re.findall(r"\]\(([\w./-]*\.md)?(?:#([\w-]+))?\)", text):
        target = page.parent / name if name else page
        assert target.is_file(), name
        assert not anchor or anchor in anchors(target), anchor
    programs = [*ROOT.glob("*.py"), *ROOT.glob("tools/*/*.py"), ROOT / "src/launch/__main__.py"]
    known = "".join(path.read_text() for path in programs)
    schema = (ROOT / "src/config.py").read_text()
    for option in re.findall(r"`--([\w.]+)", text):
        group, _, key = option.partition(".")
        if key:
            assert re.search(rf"^    {group}: \w+Config", schema, re.M), option
            assert re.search(rf"^    {key}: ", schema, re.M), option
        else:
            assert f'"--{option}"' in known or option in ("config", "help"), option


def anchors(page: Path) -> list[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_recipe_is_explained():
    page = (ROOT / "docs/recipes.md").read_text()
    missing = [str(path.relative_to(ROOT)) for path in RECIPES if path.name not in page]
    assert not missing


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [path.name for path in PAGES[1:] if f"(docs/{path.name})" not in text] == []
