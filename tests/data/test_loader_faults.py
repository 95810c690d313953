"""What the pipelines do when a file breaks under them."""

import os

import numpy as np
import pytest
from PIL import Image

from src.data.augment import create_train_operations
from src.data.base import FileSource, Source
from src.data.headers import READ
from src.data.loader import create_eval_loader, create_train_loader, find_broken_image
from src.data.transforms import Preprocessing
from src.errors import UserError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
EVAL = Preprocessing((8, 8), None, MEAN, STD)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MindSpore may copy an image it cannot decode to where it runs
    paths = [tmp_path / f"{i:02}.jpg" for i in range(40)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return FileSource([str(path) for path in paths], np.zeros(40), ["x"], "files")


def cut(path):
    """Without a check of ours MindSpore takes it for an image."""
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 100)


def cut_in_header(path):
    """Without a check of ours MindSpore ends the process with SIGFPE."""
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 4)


def cut_in_a_marker(path):
    """Without a check of ours MindSpore hangs."""
    with open(path, "r+b") as file:
        file.truncate(90)


def text(path):
    with open(path, "w") as file:
        file.write("<html>404</html>")


def another_format(path):
    Image.new("RGB", (9, 9)).save(path, "GIF")


def empty(path):
    open(path, "w").close()


CUT_OFF = "not a readable image (cut off: the end of the JPEG is missing)"
DAMAGES = {
    cut: CUT_OFF,
    cut_in_header: CUT_OFF,
    cut_in_a_marker: CUT_OFF,
    text: "not a readable image (not an image, or damaged at the start)",
    another_format: f"not a readable image (its format is GIF; {READ})",
    empty: "not a readable image (empty, 0 bytes)",
    os.remove: "No such file or directory",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_file_is_named(files, damage):
    damage(files.describe(29))
    named = f"{files.describe(29)}: {DAMAGES[damage]}"
    assert find_broken_image(files, range(40)) == named
    assert find_broken_image(files, range(29)) is None
    good = 0
    with pytest.raises(UserError) as caught:
        for _ in create_eval_loader(files, EVAL.operations(True), 4):
            good += 1
    assert str(caught.value) == f"{named}; remove or replace it" and good <= 7
    assert all(name[:2].isdigit() for name in os.listdir()), "MindSpore's copy is taken away"


def test_a_broken_file_is_named_in_training(files):
    text(files.describe(3))
    operations = create_train_operations((8, 8), MEAN, encoded=True)
    for skip in (0, 2):
        batches = create_train_loader(files, operations, 8, seed=0, epoch=0, skip_batches=skip)
        with pytest.raises(UserError, match="03.jpg: not a readable image"):
            list(batches)


class Faulty(Source):
    encoded = False

    def read(self, item):
        raise KeyError("a fault of another kind")


def test_other_failures_pass_through(files):
    with pytest.raises(RuntimeError, match="a fault of another kind"):
        list(create_eval_loader(Faulty(np.zeros(4), ["x"], "faulty"), EVAL.operations(False), 2))

    def fails(image):
        raise KeyError("a fault of another kind")

    with pytest.raises(RuntimeError, match="a fault of another kind"):
        list(create_eval_loader(files, [fails], 2))
