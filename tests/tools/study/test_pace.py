"""Estimates of time."""

import dataclasses

import pytest

from tests.tools.study.conftest import calls
from tools.study.cells import Trainings
from tools.study.pace import Pace, in_words


def longer(cell, steps_per_epoch, epochs, **changes):
    training = dataclasses.replace(
        cell.config.training, epoch_steps=steps_per_epoch, epochs=epochs, **changes
    )
    return dataclasses.replace(cell, config=dataclasses.replace(cell.config, training=training))


def test_finished_cells_tell_of_others_of_their_kind(cells):
    conv, linear, other_seed, _ = cells
    pace = Pace()
    pace.learn(conv, [])
    assert not pace.knows(conv)
    pace.learn(conv, [{"step": 3, "seconds": 20.0}, {"step": 6, "seconds": 10.0}])
    assert pace.knows(other_seed) and not pace.knows(linear)
    assert pace.left(other_seed) == pytest.approx(30)
    pace.learn(other_seed, [{"step": 3, "seconds": 6.0}])
    assert pace.left(other_seed, 3) == pytest.approx(3 * (5 + 2) / 2)
    assert pace.left(longer(conv, 3, 20)) == pytest.approx(60 * 3.5)
    assert not pace.knows(longer(conv, 3, 2, batch_size=32))
    assert not pace.knows(longer(conv, 6, 1)), "its evaluations are fewer"


def test_a_probe_tells_compiling_steps_and_evaluation_apart(cells, pretender, tmp_path):
    """Of 10 steps each: the pretender's 64 img/s are a second a step of 64 images; its epochs take
    8 + 10 and 5 + 10 s, so compiling is 3 s and an evaluation 5 s."""
    cell, pace = longer(cells[0], 100, 7), Pace()
    with Trainings() as trainings:
        pace.probe(cell, cell.words, trainings, tmp_path / "probe")
    assert calls(pretender) == ["probe"] and not (tmp_path / "probe").exists()
    assert pace.left(cell) - pace.start_up == pytest.approx(3 + 700 + 7 * 5)


def test_a_probe_that_fails_teaches_nothing(cells, pretender, tmp_path):
    (pretender / "fail.txt").write_text("probe")
    pace = Pace()
    with Trainings() as trainings:
        pace.probe(cells[0], cells[0].words, trainings, tmp_path / "probe")
    assert not pace.knows(cells[0])


def test_times_in_words():
    times = {4: "4 s", 29: "29 s", 100: "2 min", 3599: "1 h 00 min", 7500: "2 h 05 min"}
    assert {seconds: in_words(seconds) for seconds in times} == times
