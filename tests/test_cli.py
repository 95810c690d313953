"""Recipes and options: what passes, what is refused, and with which words."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import infer
from src.cli import find_resumed_run, parse, require_free_port
from src.config import Config, DataConfig, OptimizerConfig, RuntimeOnly, Study
from src.config_io import (
    is_run_config,
    load_config,
    require_outside_images,
    run_config_of,
    save_config,
)
from src.data.headers import MAX_PIXELS
from src.errors import UserError
from src.hints import _ALIASES
from tests.conftest import ROOT

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


def test_a_key_of_a_saved_configuration_can_be_edited(tmp_path):
    file = tmp_path / "config.yaml"
    save_config(Config(), file)
    text = file.read_text()
    assert '"weight_decay": 0.05' in text
    file.write_text(text.replace('"weight_decay": 0.05', '"weight_decay": 0.06'))
    assert load_config(file).optimizer.weight_decay == 0.06
    for more in ("\n", " \n", "# by hand\n"):
        file.write_text(text + more)
        assert load_config(file) == Config()
    count = text.count("\n")
    for lines in (1, 2, *range(5, count, 5), count - 1):
        file.write_text("".join(text.splitlines(keepends=True)[:lines]))
        with pytest.raises(
            UserError, match="config.yaml: truncated" if lines > 1 else "config.yaml"
        ):
            load_config(file)


def test_a_file_of_another_program_beside_the_weights_is_told(tmp_path):
    """As Lightning writes it; of a run's own file or a recipe, only the key is wrong."""
    foreign = "; if the file is another program's, give a recipe with --config"
    file = tmp_path / "config.yaml"
    file.write_text("seed_everything: 1\n")
    with pytest.raises(UserError, match=f"unknown key seed_everything: .*{foreign}$"):
        load_config(file)
    save_config(Config(), file)
    file.write_text(file.read_text().replace("# End", "seed_everything: 1\n# End"))
    with pytest.raises(UserError, match="unknown key seed_everything") as caught:
        load_config(file)
    assert foreign not in str(caught.value)


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


def test_a_configuration_is_utf_8_in_any_locale(tmp_path):
    config = Config(data=DataConfig(path="/фото", class_names=["é", "狗"]))
    save_config(config, tmp_path / "config.yaml")
    program = (
        "import pathlib, sys, src.config_io as c;"
        "data = c.load_config(pathlib.Path(sys.argv[1])).data;"
        "print(ascii([data.path, *data.class_names]))"
    )
    words = [sys.executable, "-X", "utf8=0", "-c", program, str(tmp_path / "config.yaml")]
    ascii_only = {**os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(words, cwd=ROOT, env=ascii_only, capture_output=True, text=True)
    assert done.stdout.strip() == ascii(["/фото", "é", "狗"]), done.stderr


def test_reading_a_configuration_does_not_change_the_current_folder(tmp_path, monkeypatch):
    """Another thread may read relative paths."""
    save_config(Config(), tmp_path / "config.yaml")
    monkeypatch.setattr(os, "chdir", lambda folder: pytest.fail(f"change to {folder}"))
    assert load_config(tmp_path / "config.yaml") == Config()


def test_a_recipe_may_be_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"optimizer: {lr: 0.5}\n")
    os.close(writer)
    config, _ = read(f"--config=/dev/fd/{reader}", "--training.epochs=3")
    os.close(reader)
    assert (config.optimizer.lr, config.training.epochs) == (0.5, 3)


def test_a_key_that_a_study_needs_may_be_an_option(tmp_path):
    text = "recipe: r.yaml\nmodels: {a: {}}\ntrain_images: [20]\nseeds: [0]\nevaluate_every: 10\n"
    file = recipe(tmp_path, text)
    assert read(file, "--steps", "20", schema=Study)[0].steps == 20
    with pytest.raises(UserError, match="recipe.yaml: .*required: steps"):
        read(file, schema=Study)


def test_the_config_of_a_run_is_found_beside_its_checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.ckpt").touch()
    assert run_config_of(folder / "best.ckpt") is None
    save_config(read("--optimizer.lr=0.5")[0], tmp_path / "run" / "config.yaml")
    (tmp_path / "blobs").mkdir()  # a cache of files by their checksums
    (folder / "best.ckpt").rename(tmp_path / "blobs" / "sha")
    (folder / "best.ckpt").symlink_to(tmp_path / "blobs" / "sha")
    assert run_config_of(folder / "best.ckpt") == tmp_path / "run" / "config.yaml"
    (tmp_path / "link.ckpt").symlink_to(folder / "best.ckpt")
    assert run_config_of(tmp_path / "link.ckpt") is None, "the file's own place has none"
    (folder / "best.ckpt").unlink()
    (folder / "best.ckpt").touch()
    assert run_config_of(tmp_path / "link.ckpt") == tmp_path / "run" / "config.yaml"

    def words(parser):
        parser.add_argument("--ckpt")

    argv = ["--ckpt", str(folder / "best.ckpt"), "--training.epochs=3"]
    config, arguments = parse(argv, "eval.py", "", words, config_beside="ckpt")
    assert (config.optimizer.lr, config.training.epochs) == (0.5, 3)
    assert arguments.config == tmp_path / "run" / "config.yaml"
    with pytest.raises(UserError, match="nowhere.ckpt: no such file"):
        parse(["--ckpt=nowhere.ckpt"], "eval.py", "", words, config_beside="ckpt")


def test_the_card_of_a_training_run_is_not_that_of_its_evaluation(tmp_path):
    """Runs of earlier versions have 0 in their config.yaml, which would beat DEVICE_ID."""
    trained = Config()
    trained.runtime.device_id = 3
    save_config(trained, tmp_path / "config.yaml")
    (tmp_path / "best.ckpt").touch()
    words = ["--ckpt", str(tmp_path / "best.ckpt")]

    def device_id(*more):
        def add_arguments(parser):
            parser.add_argument("--ckpt", type=str)

        given = [*words, *more]
        return parse(given, "", "", add_arguments, config_beside="ckpt")[0].runtime.device_id

    assert device_id() is None
    assert device_id("--runtime.device_id=2") == 2
    assert device_id("--config", str(tmp_path / "config.yaml")) == 3


def test_a_resumed_run_keeps_its_card(tmp_path):
    trained = Config()
    trained.runtime.device_id = 3
    save_config(trained, tmp_path / "config.yaml")

    def device_id(*more):
        return read("--output", str(tmp_path), *more, config_beside="output")[0].runtime.device_id

    assert device_id() == 3
    assert device_id("--runtime.device_id=2") == 2


def test_a_value_is_not_appended():
    with pytest.raises(UserError, match="--model.depths[+]: cannot append"):
        read("--model.depths+=3")


@pytest.mark.parametrize(
    "text, words",
    [
        ("optimizer: {lrr: 1}", "unknown key optimizer.lrr: did you mean optimizer.lr?"),
        ("optimiser: {lr: 1}", "unknown key optimiser.lr: did you mean optimizer.lr?"),
        ("lr: 1", "unknown key lr"),
        ("optimizer: 3", "optimizer is a group of keys"),
        ("a: [", "invalid YAML"),
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
        ("\x00", "invalid YAML"),
        # Options of the programs, which a file from elsewhere must not choose.
        ("json: /victim", "unknown key json: .*a recipe has the groups runtime, model"),
        ("{force: true}", "unknown key force"),
        ("config: other.yaml", "unknown key config"),
        ("{model.name: cvt_13, model: {name: cvt_21}}", "model.name is outside its group; move"),
        ("{optimizer: {lr: 1}, optimizer.eps: 1}", "optimizer.eps is outside its group; move"),
        ("{optimizer: {lr: null}}", "optimizer.lr is null; give a value, or remove the key"),
        ("{data: {mean: }}", "data.mean is null"),
        ("{training.epochs: ~}", "training.epochs is null"),
        ("{model.name: cvt_13, model: 5}", "model is a group of keys"),
    ],
)
def test_recipes_that_are_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        read(recipe(tmp_path, text + "\n"))
    assert "\n" not in str(caught.value) and ".yaml: " in str(caught.value)


def test_a_group_whose_keys_are_commented_out_is_empty(tmp_path):
    config, _ = read(recipe(tmp_path, "optimizer:\n  # lr: 1\nmodel: {name: cvt_13}\n"))
    assert config.optimizer == OptimizerConfig() and config.model.name == "cvt_13"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config", "/nowhere/x.yaml"], "/nowhere/x.yaml: No such file"),
        (["--config"], "--config: expected a value"),
        (["--config", "a.yaml", "--optimizer.lr=1", "--config=b.yaml"], "--config: is given twice"),
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


def test_a_port_that_is_taken_or_none_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; give another"):
            require_free_port(port)
    require_free_port(port)
    with pytest.raises(UserError, match="--port 70000: must be 1 to 65535"):
        require_free_port(70000)


def test_an_option_for_several_values_may_be_repeated():
    """As users of other programs do; the earlier values count too."""
    words = ["--model=m", "--input", "a.jpg", "b.jpg", "--input", "c.jpg"]
    _, arguments = parse(words, "infer.py", "", infer.add_arguments, schema=RuntimeOnly)
    assert arguments.input == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", ""], r"--config: is empty \(an unset shell variable\?\); give a file"),
        (["--output="], r"--output: is empty \(an unset shell variable\?\)"),
        (["--data.path="], "path: is empty; give a path"),
    ],
)
def test_an_empty_value_is_not_the_current_folder(words, message):
    with pytest.raises(UserError, match=message):
        read(*words)


@pytest.mark.parametrize("program", ["eval.py", "export.py"])
def test_an_exported_file_is_no_checkpoint(run_here, program):
    done = run_here(program, "--ckpt=m.onnx", "--config", str(RECIPES[0]), "--data.path=x")
    assert done.returncode == 2 and "m.onnx: is an exported file, which infer.py" in done.stderr


def test_infer_takes_images_as_large_as_training_does(monkeypatch, tmp_path, run_here):
    def predictor(*_, max_pixels, **__):
        raise UserError(f"at most {max_pixels}")

    monkeypatch.setattr("src.deploy.predictor.Predictor", predictor)
    # On a host without Ascend, whose name run_infer.sh passes: ONNX files run on the CPU.
    done = run_here("infer.py", "--model=m.onnx", "--input=a.jpg", "--runtime.device=Ascend")
    assert done.returncode == 2 and f"at most {MAX_PIXELS}" in done.stderr


def test_attention_of_an_exported_file_is_refused_before_it_is_opened(run_here):
    done = run_here("infer.py", "--model=m.onnx", "--input=a.jpg", "--attention=a.png")
    assert done.returncode == 2
    assert "--attention: m.onnx is an exported file, whose layers are not accessible" in done.stderr


def test_the_current_folder_without_weights_is_one_line(tmp_path, run_here):
    recipe = FILES[0].parents[1] / "digits/cvt_nano.yaml"
    words = ("--ckpt=.", f"--config={recipe}", "--format=mindir", "--model.num_classes=10")
    done = run_here("export.py", *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "one weight file" in done.stderr


def test_help_names_every_key_with_type_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--optimizer.lr LR peak learning rate. (type: Positive, default: 0.001)" in text
    for group, keys in vars(Config()).items():
        for key in vars(keys):
            assert f"--{group}.{key} " in text


@pytest.mark.parametrize(
    "option, meant",
    [
        ("--lr", "optimizer.lr"), ("--batch_size", "training.batch_size"),
        ("--batch-size", "training.batch_size"), ("-b", "training.batch_size"),
        ("--epochs", "training.epochs"), ("--device_target", "runtime.device"),
        ("--data_dir", "data.path"), ("--data-path=x", "data.path"),
        ("--num_classes", "model.num_classes"), ("--workers", "data.workers"),
        ("--img_size", "model.image_size"), ("--amp_level", "runtime.precision"),
        ("--output_dir", "output"),
        # Groups, for which jsonargparse has options of its own.
        ("--data", "data.path"), ("--data=/x", "data.path"), ("--model", "model.name"),
        ("--optimizer", "optimizer.name"), ("--runtime=CPU", "runtime.device"),
        ('--training={"epochs": 3}', "training.keep"),
    ],
)  # fmt: skip
def test_names_of_other_programs_are_answered_with_ours(option, meant):
    with pytest.raises(UserError, match=f"unknown key .*: did you mean {meant}\\?"):
        read(option, "1")


def test_every_hint_is_a_key_or_an_option_of_some_command():
    keys = {f"{group}.{key}" for group, keys in vars(Config()).items() for key in vars(keys)}
    sources = "".join(path.read_text() for path in Path(__file__).parents[1].glob("*.py"))
    for meant in set(_ALIASES.values()) - keys:
        assert "." not in meant and (f'"--{meant}"' in sources or meant == "config"), meant


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "infer.py --model m.onnx --input a.jpg --model.image_size 64",
            "model.image_size: is a key",
        ),
        ("infer.py --model m.onnx --input a.jpg --data.crop_ratio=1", "data.crop_ratio: is a key"),
        (
            "convert.py --src a.pth --dst b.ckpt --model.num_classes 3",
            "model.num_classes: is a key",
        ),
        ("infer.py --model m.onnx --input a.jpg --model.x 64", "unknown key model.x"),
        ("infer.py --model m.onnx --input a.jpg --sheet.size=1", "unknown key sheet.size"),
        ("infer.py --model m.onnx --input a.jpg --input.x b.jpg", "unknown key input.x"),
        ("train.py --model.name.x 3", "unknown key model.name.x"),
    ],
)
def test_a_key_that_a_command_has_not_is_no_part_of_its_option(run_here, words, message):
    """jsonargparse would read --model.x as a part of --model."""
    done = run_here(*words.split())
    assert done.returncode == 2 and f"error: {message}" in done.stderr
    assert ("set it there, and give the recipe with --config" in done.stderr) is ("is a" in message)


def test_a_mapping_has_keys_of_its_own(run_here):
    study = str(ROOT / "config/study/cifar10.yaml")
    words = ("--config", study, "--output=o", "--settings.training.epochs=1", "--dry_run")
    assert "training.epochs follows from the study's" in run_here("tools.study", *words).stderr


@pytest.mark.parametrize("path", ["#1", " #a b", "photos #1"])
def test_a_value_that_is_a_comment_to_yaml_is_a_name(path):
    assert read("--data.path", path)[0].data.path == path


def test_a_leading_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = recipe(tmp_path, "data: {path: ~/images, index: ~/index.json, train_folder: ~t}\n")
    config, arguments = read("--config=~/recipe.yaml", "--output=~/run")
    assert file == f"--config={tmp_path}/recipe.yaml"
    assert (
        config.data.path == f"{tmp_path}/images" and config.data.index == f"{tmp_path}/index.json"
    )
    assert config.data.train_folder == "~t", "no path"
    assert arguments.output == f"{tmp_path}/run"
    config, _ = read("--data.path=~/a", "--data.labels_file", "~/b")
    assert (config.data.path, config.data.labels_file) == (f"{tmp_path}/a", f"{tmp_path}/b")
    (tmp_path / "study.yaml").write_text(
        "recipe: ~/r.yaml\nmodels: {a: {}}\ntrain_images: [1]\nseeds: [0]\nsteps: 1\n"
        "evaluate_every: 1\n"
    )
    assert read("--config=~/study.yaml", schema=Study)[0].recipe == f"{tmp_path}/r.yaml"


def test_only_a_runs_own_configuration_is_one(tmp_path):
    save_config(Config(), tmp_path / "config.yaml")
    assert is_run_config(tmp_path / "config.yaml")
    (tmp_path / "other.yaml").write_text("model: {name: cvt_13}\n")
    assert not is_run_config(tmp_path / "other.yaml") and not is_run_config(tmp_path / "nowhere")


def test_a_state_is_continued_in_another_folder(tmp_path):
    """The message of one command line is what works."""
    run, new = tmp_path / "run", tmp_path / "new"
    state = run / "checkpoints/step-00000014.ckpt"
    state.parent.mkdir(parents=True)
    state.touch()
    save_config(Config(), run / "config.yaml")
    argv = ["--resume", str(state), "--output", str(new)]
    with pytest.raises(UserError, match="to continue the state there, add --config .*config.yaml"):
        find_resumed_run(argv)
    argv += ["--config", str(run / "config.yaml")]
    assert find_resumed_run(argv) == (state, argv)


@pytest.mark.parametrize(
    ("output", "held_out", "refused"),
    [
        ("train", None, True),
        ("train/roses/run", None, True),
        ("val/x", None, True),
        ("val/x", 4, False),
        ("runs/x", None, False),
        ("../elsewhere", None, False),
    ],
)
def test_a_run_among_its_images_is_refused(tmp_path, output, held_out, refused):
    """It would be a class of the next run."""
    data = DataConfig(source="imagefolder", path=str(tmp_path / "f"), val_from_train=held_out)
    context = (
        pytest.raises(UserError, match="lies among the images of .*; give a folder outside")
        if refused
        else contextlib.nullcontext()
    )
    with context:
        require_outside_images(Config(data=data), tmp_path / "f" / output)


def test_a_deleted_current_folder_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'cd "{gone}"; rmdir "{gone}"; exec "{sys.executable}" "{ROOT}/infer.py" --help'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().endswith("the current folder was deleted; change to another")
