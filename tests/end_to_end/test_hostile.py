"""What a hostile user hands to train.py: one line, exit code 2, nothing written."""

import numpy as np
import pytest
from PIL import Image

DIGITS = "data: {source: digits}\n"
RECIPES = {
    "an empty file": "",
    "only a comment": "# nothing\n",
    "no YAML": "model: {name: cvt_nano\n",
    "a tab": "model:\n\tname: cvt_nano\n",
    "a list": "- model\n- data\n",
    "a number": "7\n",
    "an unknown group": DIGITS + "modle: {name: cvt_nano}\n",
    "an unknown key": DIGITS + "model: {nmae: cvt_nano}\n",
    "a group that is a value": "model: cvt_nano\n",
    "an unknown model": DIGITS + "model: {name: cvt_99}\n",
    "a python object": DIGITS + "model: {name: !!python/object/apply:os.system ['touch owned']}\n",
    "a text for a number": DIGITS + "optimizer: {lr: fast}\n",
    "a negative rate": DIGITS + "optimizer: {lr: -1}\n",
    "not a number": DIGITS + "optimizer: {lr: .nan}\n",
    "an endless rate": DIGITS + "optimizer: {lr: .inf}\n",
    "no epochs": DIGITS + "training: {epochs: 0}\n",
    "half a batch": DIGITS + "training: {batch_size: 0.5}\n",
    "a share above 1": DIGITS + "training: {label_smoothing: 1.5}\n",
    "an unknown part frozen": DIGITS + "model: {name: cvt_nano, image_size: 32}\n"
    "training: {freeze: [stage9]}\n",
    "dims that no head divides": DIGITS + "model: {name: cvt_nano, embed_dims: [7, 9, 11]}\n",
    "two stages": DIGITS + "model: {name: cvt_nano, depths: [1, 1]}\n",
    "a tiny image": DIGITS + "model: {name: cvt_nano, image_size: 4}\n",
    "three edges": DIGITS + "model: {name: cvt_nano, image_size: [32, 32, 32]}\n",
    "a crop above the image": DIGITS + "model: {name: cvt_nano}\ndata: {crop_ratio: 2}\n",
    "a batch above the data": DIGITS + "model: {name: cvt_nano, image_size: 32}\n"
    "training: {batch_size: 4001}\n",
    "an unknown policy": DIGITS + "model: {name: cvt_nano, image_size: 32}\n"
    "augment: {rand_augment: rand-x9}\n",
    "a wrong number of classes": DIGITS + "model: {name: cvt_nano, num_classes: 3}\n",
    "a source without a folder": "data: {source: cifar10}\n",
    "a class that is not there": "data: {source: digits, classes: ['0', 'cat']}\n",
    "more images than there are": "data: {source: digits, train_images: 99999}\n",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_malformed_recipe_gets_one_line(kind, tmp_path, run_here):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[kind])
    done = run_here("train.py", "--config", "recipe.yaml", "--output=run")
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def folder(root, *images):
    for name in images:
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(path)
    return root / "data"


FOLDERS = {
    "a file": lambda root: (root / "data").write_text("x"),
    "an empty folder": lambda root: (root / "data").mkdir(),
    "no val": lambda root: folder(root, "train/a/1.png", "train/b/1.png"),
    "no classes": lambda root: folder(root, "train/1.png", "val/1.png"),
    "an empty class": lambda root: (
        folder(root, "train/a/1.png", "val/a/1.png") / "train/b"
    ).mkdir(),
    "a class only in val": lambda root: folder(root, "train/a/1.png", "val/a/1.png", "val/b/1.png"),
    "text named jpg": lambda root: (
        folder(root, "train/a/1.png", "val/a/1.png") / "train/a/2.jpg"
    ).write_text("no image"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_cannot_be_trained_on_gets_one_line(kind, tmp_path, run_here):
    FOLDERS[kind](tmp_path)
    options = ["--data.source=imagefolder", "--data.path=data", "--model.name=cvt_nano",
               "--model.image_size=32", "--training.batch_size=1", "--runtime.mode=pynative",
               "--training.epochs=1", "--output=run"]  # fmt: skip
    done = run_here("train.py", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1, done.stderr


RESUMES = {
    "a wrong output": (["--output=nowhere", "--resume"], "--output nowhere: no run there"),
    "an output that is no run": (["--output=.", "--resume"], "--output .: no run there"),
    "no such state": (["--resume", "runs/a/step-1.ckpt"], "--resume runs/a/step-1.ckpt: no such"),
    "a folder that is no run": (["--resume", "."], "--resume .: no run there"),
    "a recipe's output without a run": (
        ["--config=recipe.yaml", "--output=nowhere", "--resume"], "nowhere: no run to resume here"
    ),
    "changes accepted of nothing": (
        ["--config=recipe.yaml", "--output=run", "--accept_changes"], "--accept_changes: works only"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RESUMES)
def test_what_cannot_be_resumed_gets_one_line(kind, tmp_path, run_here):
    (tmp_path / "recipe.yaml").write_text(DIGITS + "model: {name: cvt_nano, image_size: 32}\n")
    words, expected = RESUMES[kind]
    done = run_here("train.py", *words)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
