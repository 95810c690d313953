"""Recipes and options: what passes, what is refused, and with which words."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from src.command_line import load_config, parse, run_config_of, save_config
from src.config import Config, DataConfig
from src.errors import UserError

FILES = sorted((Path(__file__).parents[1] / "config").rglob("*.yaml"))
RECIPES = [path for path in FILES if path.parent.name != "study"]


def read(*argv, **options):
    return parse(argv, "train.py", "", lambda parser: parser.add_argument("--output"), **options)


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return f"--config={path}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_valid_and_says_how_to_run_it(path):
    load_config(path)
    name = f"config/{path.parent.name}/{path.name}"
    text = path.read_text()
    assert f"--config {name}" in text or f"scripts/run_distribute_train.sh {name}" in text


def test_options_override_the_recipe_in_any_order(tmp_path):
    file = recipe(tmp_path, "optimizer: {lr: 1e-3, eps: 1e-6}\nmodel: {image_size: [192, 256]}\n")
    for argv in ((file, "--optimizer.lr", "2e-3"), ("--optimizer.lr=2e-3", file)):
        config, arguments = read(*argv, "--output", "there")
        assert (config.optimizer.lr, config.optimizer.eps) == (2e-3, 1e-6)
        assert config.model.image_size == [192, 256]
        assert config.training == Config().training
        assert arguments.output == "there"


def test_a_saved_configuration_notices_every_flipped_bit(tmp_path):
    file = tmp_path / "config.yaml"
    save_config(Config(), file)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole) * 8, 60, replace=False):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match="config.yaml"):
            load_config(file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="config.yaml"):
        load_config(file)
    lines = whole.decode().splitlines(keepends=True)
    file.write_text("".join(lines[1:-1]).replace("0.05", "0.06"))  # as the message advises
    assert load_config(file).optimizer.weight_decay == 0.06


def test_a_saved_configuration_reads_back_equal(tmp_path):
    config, _ = read(
        "--data.class_names=['é', 'b c', '1e5', 'no', '12:30', '']",
        "--model.drop_path_rate=[0,0,0.1]",
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    plain = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert plain["data"]["class_names"] == ["é", "b c", "1e5", "no", "12:30", ""]


def test_a_path_that_is_no_utf_8_is_read_back(tmp_path):
    config = Config(data=DataConfig(path="/photos/caf\udce9", class_names=["狗", "a\x1b"]))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_config_of_a_run_is_found_beside_its_checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.ckpt").touch()
    assert run_config_of(folder / "best.ckpt") is None
    save_config(read("--optimizer.lr=0.5")[0], tmp_path / "run" / "config.yaml")

    def words(parser):
        parser.add_argument("--ckpt")

    argv = ["--ckpt", str(folder / "best.ckpt"), "--training.epochs=3"]
    config, arguments = parse(argv, "eval.py", "", words, config_beside="ckpt")
    assert (config.optimizer.lr, config.training.epochs) == (0.5, 3)
    assert arguments.config == tmp_path / "run" / "config.yaml"
    with pytest.raises(UserError, match="nowhere.ckpt: no such file"):
        parse(["--ckpt=nowhere.ckpt"], "eval.py", "", words, config_beside="ckpt")


@pytest.mark.parametrize(
    "text, words",
    [
        ("optimizer: {lrr: 1}", "unknown key optimizer.lrr: did you mean optimizer.lr?"),
        ("optimiser: {lr: 1}", "unknown key optimiser.lr: did you mean optimizer.lr?"),
        ("lr: 1", "unknown key lr"),
        ("optimizer: 3", "optimizer is a group of keys"),
        ("optimizer:", "optimizer is a group of keys"),
        ("a: [", "no valid YAML"),
        ("- 1", "expected keys and values"),
        ("", "expected keys and values"),
        ("model: {image_size: big}", "model.image_size: .*Got value: big"),
        ("model: {image_size: 2.5}", "model.image_size: .*Got value: 2.5"),
        ("data: {mean: [1, 2]}", "data.mean: .*3 elements"),
        ("training: {epochs: 1.5}", "training.epochs: .*1.5"),
        ("training: {epochs: true}", "training.epochs: .*True"),
        ("training: {epochs: 0}", "training.epochs: .*0"),
        ("optimizer: {lr: .nan}", "optimizer.lr: .*nan"),
        ("optimizer: {lr: -1}", "optimizer.lr: .*-1"),
        ("augment: {hflip: 1.5}", "augment.hflip: .*1.5"),
        ("runtime: {device: TPU}", "runtime.device: .*TPU"),
        ("\x00", "no valid YAML"),
    ],
)
def test_recipes_that_are_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        read(recipe(tmp_path, text + "\n"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config", "/nowhere/x.yaml"], "/nowhere/x.yaml: No such file"),
        (["--config"], "--config: expected a value"),
        (["--model.imagesize", "3"], "did you mean model.image_size"),
        (["--training.epochs"], "--training.epochs: expected one argument"),
        (["--training.epochs", "many"], "training.epochs: .*many"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_command_lines_that_are_refused(argv, words):
    with pytest.raises(UserError, match=words) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)


def test_help_names_every_key_with_type_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--optimizer.lr LR peak learning rate. (type: Positive, default: 0.001)" in text
    for group, keys in vars(Config()).items():
        for key in vars(keys):
            assert f"--{group}.{key} " in text
