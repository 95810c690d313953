"""What MindSpore passes to every cell of a network at each call."""

import pytest
from mindspore import nn

from src.models import create_model
from src.models.root_cell import RootCell
from src.training.train_step import TrainStep


class Child(nn.Cell):
    """Counts how often the name of a graph reaches it."""

    def __init__(self):
        super().__init__()
        self.names = []

    @property
    def compile_phase(self):
        return self.names[-1] if self.names else None

    @compile_phase.setter
    def compile_phase(self, value):
        self.names.append(value)


def test_a_name_reaches_the_cells_inside_once():
    root = RootCell()
    root.block = nn.SequentialCell(Child())
    for name in ("train", "train", "eval", "eval", "train"):
        root.compile_phase = name
        assert root.compile_phase == name
    assert root.block[0].names == ["train", "eval", "train"]


@pytest.mark.parametrize("name", ["cvt_nano", "vit_nano_8", "resnet_nano"])
def test_networks_and_the_training_step_are_such_cells(name):
    """MindSpore's own setter took a tenth of `cvt_nano`'s time at batch 64."""
    assert isinstance(create_model(name, num_classes=2, image_size=32), RootCell)
    assert issubclass(TrainStep, RootCell)
