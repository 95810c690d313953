"""From a study's file to its cells."""

import dataclasses
import re

import pytest

from src.cli import parse
from src.config import Config, Study
from src.config_io import load_config
from src.errors import UserError
from tests.conftest import ROOT
from tools.study.cells import expand_study

STUDIES = sorted((ROOT / "config/study").glob("*.yaml"))


def test_every_seed_of_all_models_before_the_next(cells):
    assert [cell.name for cell in cells] == ["conv-40-0", "linear-40-0", "conv-40-1", "linear-40-1"]
    assert [cell.steps for cell in cells] == [6] * 4


def test_the_arguments_give_the_configuration(study, study_file):
    study.models["odd"] = {
        "model": {"drop_path_rate": [0, 0, 0.1], "pos_embed": True, "kv_stride": None},
        "data": {"class_names": ["1e5", "null"], "path": "a folder"},
        "optimizer": {"lr": "1e-3"},
    }
    for cell in expand_study(study, study_file, ["--data.val_folder=held out"]):
        config, _ = parse(list(cell.arguments), "", "", lambda parser: None)
        assert config == cell.config
    assert config.model.pos_embed is True
    assert config.data.class_names == ["1e5", "null"]
    assert (config.data.path, config.data.val_folder) == ("a folder", "held out")
    assert (config.optimizer.lr, config.runtime.seed) == (1e-3, 1)
    assert (config.training.epochs, config.training.epoch_steps) == (2, 3)


def test_a_model_overrides_the_settings_and_the_command_line_both(study, study_file):
    study.settings["optimizer"] = {"lr": 0.1, "eps": 0.1, "min_lr": 0.1}
    study.models["linear"]["optimizer"] = {"eps": 0.2, "min_lr": 0.2}
    conv, linear, *_ = expand_study(study, study_file, ["--optimizer.min_lr=0.3"])
    conv, linear = conv.config.optimizer, linear.config.optimizer
    assert (conv.lr, conv.eps, conv.min_lr) == (0.1, 0.1, 0.3)
    assert (linear.lr, linear.eps, linear.min_lr) == (0.1, 0.2, 0.3)


def test_a_budget_for_each_number_of_images(study, study_file):
    study.train_images, study.steps = [40, 400], [3, 12]
    got = {cell.train_images: cell.steps for cell in expand_study(study, study_file)}
    assert got == {40: 3, 400: 12}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seeds": []}, "seeds: is empty"),
        ({"models": {}}, "models: is empty"),
        ({"train_images": [40, 40]}, "train_images .* contains a value twice"),
        ({"models": {"../up": {}}}, "'../up' names a folder"),
        ({"steps": 7}, "steps 7: not a multiple of evaluate_every 3"),
        ({"steps": [3, 6]}, "one for each of train_images"),
        ({"recipe": "nowhere.yaml"}, "recipe nowhere.yaml: no such file"),
        ({"models": {"a": {"modle": {"depths": 1}}}}, "models.a: unknown key modle.depths"),
        ({"models": {"a": {"optimizer": {"lr": -1}}}}, "models.a: optimizer.lr"),
        ({"models": {"a": {"runtime": {"seed": 1}}}}, "models.a: runtime.seed follows"),
        ({"settings": {"training": {"epochs": 1}}}, "settings: training.epochs follows"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_studies_that_are_refused(study, study_file, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        expand_study(dataclasses.replace(study, **changes), study_file)
    assert "\n" not in str(caught.value)


def test_the_command_line_cannot_set_what_the_study_does(study, study_file):
    with pytest.raises(UserError, match="command line: data.train_images follows"):
        expand_study(study, study_file, ["--data.train_images=3"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_valid_says_how_to_run_it_and_augments_alike(path):
    study, _ = parse([f"--config={path}"], "", "", lambda parser: None, schema=Study)
    cells = expand_study(study, path)
    assert f"python -m tools.study --config config/study/{path.name}" in path.read_text()
    recipe = load_config(path.parent / study.recipe)
    assert all(cell.config.augment == recipe.augment for cell in cells)
    assert len({(c.train_images, c.steps, c.config.training.batch_size) for c in cells}) == len(
        study.train_images
    )


def test_a_recipe_is_no_study():
    recipe = ROOT / "config/digits/cvt_nano.yaml"
    with pytest.raises(UserError, match="unknown key model"):
        parse([f"--config={recipe}"], "", "", lambda parser: None, schema=Study)
    assert not {key.name for key in dataclasses.fields(Study)} & {
        key.name for key in dataclasses.fields(Config)
    }


def test_the_example_in_the_documentation_is_a_study(tmp_path):
    text = (ROOT / "docs/results.md").read_text()
    file = tmp_path / "study.yaml"
    file.write_text(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    study, _ = parse([f"--config={file}"], "", "", lambda parser: None, schema=Study)
    assert len(expand_study(study, ROOT / "config/study/own.yaml")) == 12
