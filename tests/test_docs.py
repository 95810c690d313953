"""What the documents promise: code that runs, commands and files that exist."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_pyramid_example_learns(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/features.md").read_text(), re.S)[1]
    (tmp_path / "example.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups()
    assert float(last) < 0.6 * float(first)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_options_that_are_named_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?:config|scripts|docs|tests|src)/[\w/.-]+\.(?:yaml|sh|md|py)", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (page.parent / name).is_file(), name
    programs = [*ROOT.glob("*.py"), ROOT / "src/launch/plan.py"]
    known = "".join(path.read_text() for path in programs)
    schema = (ROOT / "src/config.py").read_text()
    for option in re.findall(r"python \w+\.py[^\n`]*?--([\w.]+)", text) + re.findall(
        r"`--([\w.]+)", text
    ):
        group, _, key = option.partition(".")
        if key:
            assert re.search(rf"^    {group}: \w+Config", schema, re.M), option
            assert re.search(rf"^    {key}: ", schema, re.M), option
        else:
            assert f'"--{option}"' in known or option in ("config", "help"), option
