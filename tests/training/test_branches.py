"""Resuming from an older state: the abandoned branch is set aside, whole, and never taken up."""

import json
import logging
import os
import shutil

import mindspore as ms
import numpy as np
import pytest

from src.errors import UserError
from src.files import sha256_of
from src.training.resume import set_aside_newer
from src.training.run import train
from src.training.state import Progress, has_state, read_newest, read_state, save_state
from tests.training.runs import Step, assert_equal_runs, small


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def weight(path):
    return float(ms.load_checkpoint(str(path))["weight"].asnumpy()[0])


@pytest.fixture
def folder(tmp_path):
    """States 300, 400 and 500 of one branch, and the best weights of its end."""
    step, best = Step(), tmp_path / "best.ckpt"
    for number in (300, 400, 500):
        best.write_bytes(b"of step %d" % number)
        progress = Progress(best_top1=number, best_sha256=sha256_of(best))
        save_state(step.at(number, number), progress, tmp_path, 9)
    return tmp_path


def resume(folder, state, keep):
    step = Step()
    found = read_newest(folder) if state is None else read_state(folder / state)
    found.load(step)
    progress = found.progress
    aside = set_aside_newer(step, progress, found.path, folder, keep)
    return step, progress, [each.name for each in aside]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("older", [300, 400])
def test_the_next_resume_takes_the_new_branch(folder, keep, older):
    step, progress, aside = resume(folder, f"step-{older:08}.ckpt", keep)
    assert "abandoned-1-step-00000500.ckpt" in aside and "abandoned-1-best.ckpt" in aside
    assert progress.best_top1 == -1 and os.path.samefile(
        folder / "last.ckpt", folder / f"step-{older:08}.ckpt"
    )
    for number in (older + 10, older + 20, older + 30):
        save_state(step.at(number, -number), progress, folder, keep)
        assert f"step-{number:08}.ckpt" in names(folder), "a new state stays"
    fresh = Step()
    newest = read_newest(folder)
    newest.load(fresh)
    assert newest.path.name == f"step-{older + 30:08}.ckpt"
    assert float(fresh.weight.asnumpy()[0]) == -(older + 30)
    assert weight(folder / "abandoned-1-step-00000500.ckpt") == 500
    assert (folder / "abandoned-1-best.ckpt").read_bytes() == b"of step 500"
    assert not (folder / "best.ckpt").exists()


def test_going_back_twice_and_returning_loses_nothing(folder):
    step, progress, _ = resume(folder, "step-00000400.ckpt", 3)
    save_state(step.at(420, -420), progress, folder, 3)
    _, _, aside = resume(folder, "step-00000300.ckpt", 3)
    assert aside == ["abandoned-2-step-00000420.ckpt", "abandoned-2-step-00000400.ckpt"]
    _, _, aside = resume(folder, "abandoned-1-step-00000500.ckpt", 3)
    assert aside == ["abandoned-3-step-00000300.ckpt"]
    assert weight(folder / "step-00000500.ckpt") == weight(folder / "last.ckpt") == 500
    assert len(names(folder)) == 7, names(folder)
    assert weight(folder / "abandoned-2-step-00000420.ckpt") == -420


def test_the_newest_state_sets_nothing_aside(folder):
    before = names(folder)
    for state in (None, "last.ckpt", "step-00000500.ckpt"):
        _, progress, aside = resume(folder, state, 1)
        assert aside == [] and names(folder) == before and progress.best_top1 == 500


@pytest.mark.parametrize("progress", [None, Progress()], ids=["the second best", "the first"])
def test_best_weights_saved_before_a_kill_are_set_aside(folder, progress):
    """Without their state: their epoch is repeated, and may end otherwise or not at all."""
    (folder / "best.ckpt").write_bytes(b"of step 510")
    if progress is not None:  # the run had not been evaluated before
        save_state(Step().at(500), progress, folder, 1)
    _, progress, aside = resume(folder, None, 1)
    assert aside == ["abandoned-1-best.ckpt"]
    assert (progress.best_top1, progress.best_sha256) == (-1, "")


def test_damaged_newer_states_are_set_aside_too(folder):
    """With keep=1 they would count as the newest, and every new state would be deleted."""
    for name in ("step-00000500.ckpt", "last.ckpt"):
        (folder / name).unlink()
        (folder / name).write_bytes(b"damaged")
    step, progress, aside = resume(folder, None, 1)
    assert aside == ["abandoned-1-step-00000500.ckpt", "abandoned-1-best.ckpt"]
    assert weight(folder / "last.ckpt") == 400
    save_state(step.at(410), progress, folder, 1)
    assert "step-00000410.ckpt" in names(folder)


def test_a_state_of_another_folder_begins_a_branch_here(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(folder / "step-00000400.ckpt", elsewhere / "step-00000400.ckpt")
    _, _, aside = resume(folder, elsewhere / "step-00000400.ckpt", 2)
    assert len(aside) == 4 and names(folder)[-2:] == ["last.ckpt", "step-00000400.ckpt"]
    new = tmp_path_factory.mktemp("new") / "checkpoints"
    step = Step().at(400, 1.0)
    set_aside_newer(step, Progress(best_top1=3.0), elsewhere / "step-00000400.ckpt", new, 2)
    assert names(new) == ["last.ckpt", "step-00000400.ckpt"] and has_state(new)


def test_a_run_resumed_from_an_older_state_follows_it(trained, few_digits, tmp_path, caplog):
    """Its figures, curves and best weights too; the abandoned branch is named in the log."""
    config = small(trained, training__epochs=3, training__keep=3, training__ema_decay=0.5)
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    states = tmp_path / "run/checkpoints"
    figures = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    curves = (tmp_path / "run/curves.png").stat().st_mtime_ns
    config.training.epochs = 2
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "run", resume=states / "step-00000002.ckpt", accept_changes=True)
    assert "are renamed in" in caplog.text and "abandoned-1-step-00000006.ckpt" in caplog.text
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert rows[0] == figures[0] and len(rows) == 2
    assert (tmp_path / "run/curves.png").stat().st_mtime_ns != curves
    top1s = [json.loads(row)["top1"] for row in rows]
    progress, path = load_newest_progress(states)
    assert progress["best_top1"] == max(top1s) and path == "step-00000004.ckpt"
    best = ms.load_checkpoint(str(states / "best.ckpt"))
    first = ms.load_checkpoint(str(states / "step-00000002.ckpt"))
    at_first = all(
        np.array_equal(value.asnumpy(), first[f"ema.{name}"].asnumpy())
        for name, value in best.items()
    )
    assert at_first == (top1s[0] >= top1s[1]), "the best weights are of this branch"
    config.training.epochs = 3
    train(config, tmp_path / "run", resume=True, accept_changes=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def load_newest_progress(states):
    newest = sorted(states.glob("step-*.ckpt"))[-1]
    return json.loads(ms.load_checkpoint(str(newest))["progress"]), newest.name


def test_the_best_weights_are_no_state(trained, few_digits, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    best = tmp_path / "run/checkpoints/best.ckpt"
    before = names(tmp_path / "run/checkpoints")
    with pytest.raises(
        UserError, match="best.ckpt: holds weights only.*--resume without a file.*--finetune"
    ):
        train(small(trained), tmp_path / "run", resume=best)
    assert names(tmp_path / "run/checkpoints") == before
