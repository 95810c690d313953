"""The commands as a user types them, from another folder; what they print, write and refuse."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from src.data.samples import write_samples
from tests.conftest import ROOT, TINY_KEYS, run_command

DIGITS = f"--config={ROOT / 'config/digits/cvt_nano.yaml'}"
PHOTOS = f"--config={ROOT / 'config/imagefolder/cvt_nano_64.yaml'}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs of two classes, blue and red, of various sizes, in ImageNet's layout."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                size = (int(rng.integers(30, 90)), int(rng.integers(30, 90)), 3)
                pixels = np.clip(rng.normal(colour, 40, size), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.jpg")
    return folder


def test_eval_finds_everything_by_the_checkpoint_alone(trained, tmp_path):
    weights = trained / "checkpoints" / "best.ckpt"
    done = run_command("eval.py", "--ckpt", str(weights), "--json=figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"top1", "top5", "loss", "images", "images_per_second"}
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["top1"])
    assert figures["images"] == 1000 and figures["top1"] == best["top1"]
    assert figures["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert f"top1 {best['top1']:.2f} %" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_infer_prints_and_writes_a_line_per_image(trained, tmp_path):
    paths = [str(path) for path in write_samples(tmp_path / "digits")]
    weights = str(trained / "checkpoints" / "best.ckpt")
    words = ("--model", weights, "--input", str(tmp_path / "digits"))
    done = run_command("infer.py", *words, "--json=out.json", "--top_k=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == paths
    for line, entry in zip(lines, json.loads((tmp_path / "out.json").read_text())):
        assert entry["file"] == line[0] and len(entry["top"]) == 3
        assert line[1:] == [entry["top"][0]["name"], f"{entry['top'][0]['probability']:.4f}"]


def test_a_folder_of_photographs_trains_and_a_broken_one_is_named(photos, tmp_path, run_here):
    keys = [f"--data.path={photos}", *TINY_KEYS, "--training.epochs=1", "--model.image_size=32"]
    keys += ["--training.batch_size=8", "--output=run", "--runtime.mode=pynative"]
    done = run_here("train.py", PHOTOS, *keys)
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert '- "blue"' in config and '"num_classes": 2' in config
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/val/red/3.jpg").write_text("no image")
    words = ("--ckpt=run/checkpoints/last.ckpt", "--data.path=photos")
    done = run_here("eval.py", *words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "eval.py: error: 1 of 10 images of imagefolder (val) can't be read: photos/val/red/3.jpg: "
        "not an image, or damaged at the start; remove or replace them, or skip them "
        "with --data.broken skip"
    )
    (tmp_path / "photos/val/green").mkdir()
    done = run_here("eval.py", *words)
    assert done.returncode == 2 and "green" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "run"]


def test_one_broken_of_200_is_skipped_in_training_and_stops_evaluation(tmp_path, run_here):
    rng = np.random.default_rng(0)
    for split, count in (("train", 100), ("val", 3)):
        for name in "ab":
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.jpg")
    broken = tmp_path / "data/train/b/33.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    keys = ["--data.path=data", *TINY_KEYS, "--training.epochs=1", "--model.image_size=16"]
    keys += ["--training.batch_size=99", "--output=run", "--runtime.mode=pynative"]
    done = run_here("train.py", PHOTOS, *keys)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    left_out = (
        "left out: 1 of 200 images of imagefolder (train) can't be read (0.50 %): data/train/b"
    )
    for text in (log, done.stdout):
        assert f"{left_out}/33.jpg: cut off: the end of the JPEG is missing" in text
    stored = json.loads((tmp_path / "run/images.json").read_text())["content"]["files"]
    assert len(stored) == 206 and [name for name in stored if stored[name][2]] == ["train/b/33.jpg"]
    # Evaluation on the training images; what the run has found is known.
    words = ("eval.py", "--ckpt=run/checkpoints/last.ckpt", "--data.val_folder=train")
    done = run_here(*words)
    assert done.returncode == 2 and "1 of 200" in done.stderr and "b/33.jpg: cut off" in done.stderr
    assert "checking 1 of 200 images (threads: " in done.stdout
    done = run_here(*words, "--data.broken=skip", "--json=figures.json")
    assert done.returncode == 0 and "left out: 1 of 200" in done.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["images"] == 199


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("train.py",), "--config is missing"),
        (("train.py", DIGITS, "--optimizer.lrr=1"), "did you mean optimizer.lr?"),
        (("train.py", DIGITS, "--model.image_size=4"), "8 pixels or more"),
        (("train.py", DIGITS, "--model.image_size=0"), "model.image_size 0"),
        (("train.py", DIGITS, "--model.name=cvt_nan"), "did you mean cvt_nano?"),
        (("train.py", PHOTOS, "--data.path=nowhere"), "nowhere: no such folder"),
        (("train.py", DIGITS, "--finetune=nowhere.ckpt"), "nowhere.ckpt: there is no such file"),
        (("eval.py", "--ckpt=nowhere.ckpt"), "nowhere.ckpt: no such file"),
        (("eval.py", "--ckpt=junk.ckpt", DIGITS), "junk.ckpt"),
        (("export.py", "--ckpt=junk.ckpt", "--format=air", "--output=x.mindir"), ".air"),
        (("infer.py", "--model=junk.mindir", "--input=junk.ckpt"), "junk.mindir: no such file"),
    ],
    ids=lambda value: value[0][:-3] + value[-1][-12:] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, run_here, words, complaint):
    (tmp_path / "junk.ckpt").write_bytes(b"no checkpoint " * 100)
    done = run_here(*words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"{words[0]}: error: ") and done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["junk.ckpt"], "nothing is written"


def test_weights_of_another_network_are_refused(trained, run_here):
    words = (f"--ckpt={trained / 'checkpoints/best.ckpt'}", DIGITS)
    done = run_here("eval.py", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "of another shape" in done.stderr
