"""tools.study as a user calls it."""

import json
import re

import pytest

from tests.conftest import ROOT, run_command

STUDY = f"""
recipe: {ROOT / "config/digits/cvt_nano.yaml"}
models:
  slow: {{optimizer: {{lr: 1.0e-4}}}}
  fast: {{}}
train_images: [30]
seeds: [0]
steps: 4
evaluate_every: 2
settings:
  model: {{name: resnet_nano, depths: [1, 1]}}  # what compiles fastest
  optimizer: {{warmup_epochs: 0}}
  training: {{batch_size: 50}}
  evaluation: {{batch_size: 500}}
  runtime: {{mode: pynative}}  # four steps are over before a graph is compiled
"""


def test_two_models_from_scratch_and_again(tmp_path, run_here, monkeypatch):
    monkeypatch.setenv("MS_DEV_LAUNCH_BLOCKING", "1")  # as `synchronous` in conftest.py
    (tmp_path / "two.yaml").write_text(STUDY)
    words = ["tools.study", "--config=two.yaml", "--output=out"]
    done = run_command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 of 2 cells are done, 2 to train" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "two.yaml"]
    for model, rate in (("slow", 1e-4), ("fast", 2e-3)):
        file = tmp_path / f"out/cells/{model}-30-0/metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4], "of 50 images, though there are 30"
        assert rows[0]["lr"] == pytest.approx((rate + 1e-5) / 2 + (rate - 1e-5) / 2 * 0.5**0.5)
        line = rf"\| `{model}` \| 30,910 \| [\d.]+ \| {rows[1]['top1']:.2f} \(1\) \|"
        assert re.search(line, done.stdout), done.stdout
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cells").rglob("*")}
    again = run_here(*words)
    assert again.returncode == 0 and "2 of 2 cells are done, 0 to train" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cells").rglob("*")}
    assert again.stdout.partition("Top-1")[2] == done.stdout.partition("Top-1")[2]


@pytest.mark.parametrize(
    "words, complaint",
    [
        ([], "--config is missing; give a study such as config/study/digits.yaml"),
        (["--config=two.yaml", "--stepz=3"], "unknown key stepz: did you mean steps?"),
        (["--config=two.yaml", "--seeds=[-1]"], "seeds: "),
        (["--config=two.yaml", "--optimizer.lrr", "3"], "did you mean optimizer.lr?"),
        (["--config=two.yaml", "--data.path"], "--data.path: expected a value"),
        (["--config=two.yaml", "--data.source=mnist"], "needs a folder; give it with --data.path"),
        (["--config=no.yaml"], "no.yaml: No such file"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else None,
)
def test_a_users_error_is_one_line(tmp_path, run_here, words, complaint):
    (tmp_path / "two.yaml").write_text(STUDY)
    done = run_here("tools.study", "--output=out", *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("tools.study: error: ") and done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["two.yaml"], "nothing is written"
