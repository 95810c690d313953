"""Figures of a report against plain numpy, and its files."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from src.data.base import FileSource
from src.errors import UserError
from src.evaluation import report
from src.evaluation.evaluator import Result
from src.evaluation.labels import LabeledSplit
from src.evaluation.metrics import Metrics, Outcomes, score_batch
from src.evaluation.report import calibrate, check_report, confusion_matrix, write_report
from src.plots.confusion_matrix import draw_confusion


def sure(confidence, correct):
    """Outcomes of which only these two count."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    return Outcomes(confidence * 0, confidence, correct, correct, confidence * 0)


def test_calibration_error_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.uniform(0.001, 1, 997), [1.0, 1 / 15, 2 / 15]])
    correct = rng.uniform(size=1000) < confidence**2
    ece = 0.0
    for m in range(1, 16):  # Guo et al. 2017: ((m - 1) / M, m / M]
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            ece += inside.sum() / 1000 * gap
    found = calibrate(sure(confidence, correct))
    assert found.ece == pytest.approx(100 * ece, rel=1e-12) and 1 < found.ece < 50
    assert found.images.sum() == 1000
    edges = calibrate(sure([1e-9, 1 / 15, 2 / 15, 1.0], [1, 1, 0, 1]))
    assert edges.images.tolist() == [2, 1, *[0] * 12, 1]


def test_calibration_by_hand():
    """Ten images at 0.8 of which eight are right are calibrated; of which three are, 50 % off."""
    assert calibrate(sure([0.8] * 10, [1] * 8 + [0] * 2)).ece == pytest.approx(0, abs=1e-12)
    assert calibrate(sure([0.8] * 10, [1] * 3 + [0] * 7)).ece == pytest.approx(50)
    half = calibrate(sure([0.8] * 10 + [1.0] * 10, [1] * 3 + [0] * 7 + [1] * 10))
    assert half.ece == pytest.approx(25)


def test_confusion_matrix_counts_labels_in_rows():
    matrix = confusion_matrix(np.array([0, 0, 2, 2, 2], np.int32), np.array([0, 1, 0, 2.0, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [2, 0, 1]]


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


NAMES = ("ant", "bee, honey", "cat", "bat")


def test_the_files_of_a_report(tmp_path):
    labels = np.array([0, 0, 1, 2, 2], np.int32)
    files = ["a.png", "b.png", "c\udcff.png", "d.png", "e.png"]
    logits = np.log([[7, 1, 1, 1], [2, 6, 1, 1], [1, 8, 1, 0.1], [1, 1, 1, 97], [3, 3, 4, 1]])
    metrics = Metrics()
    outcomes = metrics.update(logits, labels)
    images = LabeledSplit(FileSource(files, labels, NAMES, "made up"))
    folder = check_report(str(tmp_path / "new" / "report"), force=False)
    figures = {**Result(metrics, 12.0, outcomes).to_dict(), "ece": 3.5}
    write_report(figures, outcomes, images, folder)
    assert figures["top1"] == 60 and figures["images"] == 5
    assert figures == json.loads((folder / "figures.json").read_text())
    assert table(folder / "per_class.csv") == [
        ["class", "images", "correct", "accuracy_percent"],
        ["ant", "2", "1", "50.00"],
        ["bee, honey", "1", "1", "100.00"],
        ["cat", "2", "1", "50.00"],
        ["bat", "0", "0", ""],
    ]
    assert table(folder / "confusion_matrix.csv") == [
        ["label \\ prediction", *NAMES],
        ["ant", "1", "1", "0", "0"],
        ["bee, honey", "0", "1", "0", "0"],
        ["cat", "0", "0", "1", "1"],
        ["bat", "0", "0", "0", "0"],
    ]
    worst = table(folder / "worst_images.csv")
    assert worst[1] == ["d.png", "cat", "bat", "1.000e-02", "0.9700"]
    assert [row[0] for row in worst[2:]] == ["b.png", "e.png", "a.png", "c\\udcff.png"]
    bins = table(folder / "calibration.csv")
    assert len(bins) == 16 and sum(int(row[2]) for row in bins[1:]) == 5
    with Image.open(folder / "confusion_matrix.png") as picture:
        assert min(picture.size) > 300


def test_real_counts_by_its_lists(tmp_path):
    """Classes stay the folders', what is right is the lists'; the worst are worst by the lists."""
    labels, lists = np.array([0, 1], np.int32), [[1, 2], [3]]
    logits = np.log([[1, 6, 2, 1.0], [1, 6, 2, 1]])
    outcomes = score_batch(logits, lists)
    images = LabeledSplit(FileSource(["a.png", "b.png"], labels, NAMES, "made up"), lists)
    write_report({}, outcomes, images, tmp_path)
    assert table(tmp_path / "per_class.csv")[1:3] == [
        ["ant", "1", "1", "100.00"],
        ["bee, honey", "1", "0", "0.00"],
    ]
    assert table(tmp_path / "worst_images.csv")[1:] == [
        ["b.png", "bat", "bee, honey", "1.000e-01", "0.6000"],
        ["a.png", "bee, honey | cat", "bee, honey", "8.000e-01", "0.6000"],
    ]


def test_at_most_fifty_worst_images(tmp_path):
    labels = np.arange(80, dtype=np.int32) % 4
    logits = np.random.default_rng(0).standard_normal((80, 4))
    outcomes = score_batch(logits, labels)
    files = [f"{k}.png" for k in range(80)]
    images = LabeledSplit(FileSource(files, labels, NAMES, "made up"))
    write_report({}, outcomes, images, tmp_path)
    worst = [int(row[0][:-4]) for row in table(tmp_path / "worst_images.csv")[1:]]
    assert worst == sorted(range(80), key=lambda k: -outcomes.loss[k])[:50]


def test_a_confusion_matrix_larger_than_memory_is_left_out(tmp_path, monkeypatch, caplog):
    """ImageNet-22k's would have 477 million cells."""
    monkeypatch.setattr(report, "MAX_CLASSES", 3)
    outcomes = score_batch(np.eye(4), np.arange(4))
    images = LabeledSplit(FileSource(["a.png"] * 4, np.arange(4), NAMES, "made up"))
    write_report({"top1": 1.0}, outcomes, images, tmp_path)
    assert "no confusion matrix: 4 classes, more than 3" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calibration.csv", "figures.json", "per_class.csv", "worst_images.csv",
    ]  # fmt: skip


def test_a_thousand_classes_are_drawn_without_names(tmp_path):
    """The diagonal is darker than the rest, and each class has its own pixels."""
    path = tmp_path / "confusion.png"
    draw_confusion(np.diag(np.full(1000, 7)), [f"n{k:08}" for k in range(1000)], path)
    with Image.open(path) as picture:
        assert min(picture.size) >= 1100
        dark = (np.asarray(picture.convert("L"))[100:-150, 150:-250] < 100).any(axis=1)
    assert dark.mean() > 0.9


def test_class_names_with_dollars_are_drawn_as_they_stand(tmp_path):
    draw_confusion(np.eye(2, dtype=int), [r"$\frac$", "US$ and AU$"], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match="--report .*give another"):
            check_report(str(tmp_path / name), force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["per_class.csv", "confusion_matrix.csv", "confusion_matrix.png", "figures.json"]
)
def test_a_report_replaces_an_earlier_one_and_nothing_of_the_users(tmp_path, name):
    outcomes = score_batch(np.eye(4), np.arange(4))
    images = LabeledSplit(FileSource(["a.png"] * 4, np.arange(4), NAMES, "made up"))
    result = Result(Metrics.from_sums(np.array([[4, 4, 4, 1.0]])), 1.0, outcomes)
    folder = check_report(str(tmp_path), force=False)
    write_report(result.to_dict(), outcomes, images, folder)
    check_report(str(tmp_path), force=False)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: exists and is not an earlier result"):
        check_report(str(tmp_path), force=False)
    check_report(str(tmp_path), force=True)


def test_eval_reports_on_the_digits(trained, tmp_path, run_here):
    words = ("eval.py", f"--ckpt={trained / 'checkpoints/best.ckpt'}", "--json=figures.json")
    done = run_here(*words, "--runtime.mode=pynative", "--report=./figures.json")
    assert done.returncode == 2 and "--json, --report: name the same file" in done.stderr
    done = run_here(*words, "--runtime.mode=pynative", "--report=report")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"ece {figures['ece']:.2f} %  report in report" in done.stdout
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "calibration.csv", "confusion_matrix.csv", "confusion_matrix.png", "figures.json",
        "per_class.csv", "worst_images.csv",
    ]  # fmt: skip
    per_class = table(tmp_path / "report" / "per_class.csv")[1:]
    assert [row[0] for row in per_class] == list("0123456789")
    assert sum(int(row[1]) for row in per_class) == figures["images"] == 1000
    right = sum(int(row[2]) for row in per_class)
    assert right / 10 == pytest.approx(figures["top1"])
    matrix = np.array([row[1:] for row in table(tmp_path / "report/confusion_matrix.csv")[1:]], int)
    assert matrix.trace() == right and matrix.sum() == 1000
    assert len(table(tmp_path / "report" / "worst_images.csv")) == 51


def test_a_report_that_fails_loses_no_result(trained, tmp_path, run_here, monkeypatch):
    def full(*_, **__):
        raise UserError("report/per_class.csv: No space left on device")

    monkeypatch.setattr(report, "write_csv", full)
    words = ("eval.py", f"--ckpt={trained / 'checkpoints/best.ckpt'}", "--json=figures.json")
    done = run_here(*words, "--runtime.mode=pynative", "--report=report")
    assert done.returncode == 2 and "No space left" in done.stderr
    assert "top1 " in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ece"] > 0
    assert figures == json.loads((tmp_path / "report/figures.json").read_text())
