"""Few images, for whole runs."""

import numpy as np
import pytest

from src import splits
from src.data import ArraySource, open_source
from src.plots import training_curves


@pytest.fixture
def few_digits(monkeypatch):
    """Runs see 100 digits in training and 25 held out; their curves are empty files."""

    whole = {split: open_source("digits", None, split) for split in ("train", "val")}

    def few(name, path, split, **options):
        source = whole[split]
        images = np.stack([source[i][0] for i in range(0, len(source), 40)])
        return ArraySource(images, source.labels[::40], source.class_names, split)

    monkeypatch.setattr(splits, "open_source", few)
    monkeypatch.setattr(training_curves, "plot_curves", lambda rows, file: file.touch())
