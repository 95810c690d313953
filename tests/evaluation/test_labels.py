"""ImageNet's protocols on made-up trees of tiny images."""

import dataclasses
import json
import logging

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from src.build import build_model, build_preprocessing
from src.config import Config, DataConfig, EvaluationConfig, ModelConfig
from src.config_io import load_config, save_config
from src.data import create_eval_loader
from src.data.imagenet_labels import imagenet_names, synsets
from src.errors import UserError
from src.evaluation.evaluator import evaluate_checkpoint
from src.evaluation.labels import compare_with_run, open_labeled_split, with_class_names
from src.training.run import train
from src.weights import save_weights
from tests.conftest import TINY, tiny_config

MODES = {0: "L", 1: "CMYK"}  # of the first images; the rest is RGB


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A validation tree of one image a class; image number k + 1 is of class (7 k) % 1000."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for k in range(1000):
        folder = root / "val" / synsets()[7 * k % 1000]
        folder.mkdir(parents=True)
        image = Image.fromarray(rng.integers(0, 256, (17, 20, 3), dtype=np.uint8))
        image.convert(MODES.get(k, "RGB")).save(folder / f"ILSVRC2012_val_{k + 1:08}.JPEG")
    return root


def config_of(root, **keys):
    data = DataConfig(path=str(root), workers=1, check_images=False, **keys)
    model = ModelConfig(name="cvt_nano", image_size=16, **{**TINY, "num_classes": 1000})
    return Config(model=model, data=data, evaluation=EvaluationConfig(batch_size=300))


@pytest.fixture(scope="module")
def weights(tmp_path_factory, imagenet):
    path = tmp_path_factory.mktemp("weights") / "w.ckpt"
    save_weights(build_model(config_of(imagenet)), path)
    return path


def write_real(path, lists):
    path.write_text(json.dumps(lists + [[1]] * (50_000 - len(lists))))
    return str(path)


def test_real_equals_a_count_of_single_images(imagenet, weights, tmp_path):
    """Every third list is empty; of the others some hold what the network says."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = config_of(imagenet)
    result, images = evaluate_checkpoint(config, str(weights), keep_outcomes=True)
    said = np.zeros(1000, int)  # by the files' numbers
    for k, prediction in enumerate(result.outcomes.prediction):
        said[int(images.source.describe(k)[-13:-5]) - 1] = prediction
    lists = [[[], [int(p)], [(int(p) + 1) % 1000, (int(p) + 2) % 1000]][k % 3]
             for k, p in enumerate(said)]  # fmt: skip
    lists[1] = [5 if said[1] != 5 else 6, int(said[1])]
    real = write_real(tmp_path / "real.json", lists)
    real_config = config_of(imagenet, labels="real", labels_file=real)
    result, images = evaluate_checkpoint(real_config, str(weights))
    assert result.metrics.images == len(images.source) == 666
    assert result.metrics.correct1 == sum(1 for k in range(1000) if k % 3 == 1)
    for k in range(666):
        number = int(images.source.describe(k)[-13:-5])
        assert images.label_lists[k] == lists[number - 1]
        assert images.source.labels[k] == 7 * (number - 1) % 1000


def test_grey_and_cmyk_files_are_counted_as_pillow_sees_them(imagenet):
    source = open_labeled_split(config_of(imagenet), "none.ckpt").source
    prepare = build_preprocessing(config_of(imagenet))
    batches = create_eval_loader(source, prepare.operations(source.encoded), 300, workers=1)
    prepared = np.concatenate([images for images, _ in batches.iterate(output_numpy=True)])
    assert len(prepared) == 1000
    seen = []
    for k in range(1000):
        with Image.open(source.describe(k)) as image:
            if image.mode != "RGB":
                seen.append(image.mode)
                expected = prepare(np.asarray(image.convert("RGB")))
                np.testing.assert_allclose(prepared[k], expected, atol=1e-5)
    assert sorted(seen) == ["CMYK", "L"]


@pytest.mark.parametrize("named", [False, True])
def test_v2_folders_are_classes_as_integers(named, tmp_path):
    for k in range(1000):
        (tmp_path / str(k)).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / str(k) / "x.png")
    names = list(synsets()) if named else None
    keys = {"val_folder": ".", "class_names": names}
    source = open_labeled_split(config_of(tmp_path, labels="v2", **keys), "none.ckpt").source
    assert source.labels.tolist() == list(range(1000))
    assert all(source.describe(k).endswith(f"/{k}/x.png") for k in range(1000))
    assert source.class_names == synsets()
    (tmp_path / "1000").mkdir()
    with pytest.raises(UserError, match="'1000' is none of the 1000 known classes"):
        open_labeled_split(config_of(tmp_path, labels="v2", **keys), "none.ckpt")


def refused(config, match):
    with pytest.raises(UserError, match=match) as caught:
        open_labeled_split(config, "none.ckpt")
    assert "\n" not in str(caught.value)


def test_held_out_training_images_are_said_to_be(tmp_path, caplog):
    """The key comes with the run's config.yaml, while the user may mean the other split."""
    caplog.set_level(logging.INFO)
    config = Config(data=DataConfig(source="digits", val_from_train=50))
    assert len(open_labeled_split(config, str(tmp_path / "w.ckpt")).source) == 50
    assert "50 images held out from the training images (data.val_from_train)" in caplog.text


@pytest.mark.parametrize(("now", "told"), [(20, False), (40, True)])
def test_images_that_the_weights_were_trained_on_are_told(tmp_path, caplog, now, told):
    config = Config(data=DataConfig(source="digits", val_from_train=20))
    save_config(config, tmp_path / "config.yaml")
    config.data.val_from_train = now
    open_labeled_split(config, str(tmp_path / "best.ckpt"))
    assert ("its run trained on 20 of the 40 images" in caplog.text) is told


def test_a_network_that_computes_otherwise_is_told(tmp_path, caplog):
    """Its tensors have the same names and shapes."""
    config = Config(model=ModelConfig(kv_stride=1), data=DataConfig(class_names=["a", "b"]))
    save_config(config, tmp_path / "config.yaml")
    compare_with_run(tmp_path / "best.ckpt", config)
    assert not caplog.text
    given = dataclasses.replace(config.model, num_heads=[1, 3, 6], qkv_projection="conv")
    compare_with_run(tmp_path / "best.ckpt", dataclasses.replace(config, model=given))
    assert not caplog.text, "these are the variant's own"
    config.model.kv_stride, config.data.class_names = None, ["b", "a"]
    compare_with_run(tmp_path / "best.ckpt", config)
    assert "model.kv_stride 1, not 2; the classes a, b, not b, a" in caplog.text
    config.model = ModelConfig("vit_nano")
    save_config(config, tmp_path / "config.yaml")
    given = dataclasses.replace(config.model, num_heads=[3])
    compare_with_run(tmp_path / "best.ckpt", dataclasses.replace(config, model=given))
    assert "model.num_heads None, not [3]" in caplog.text


@pytest.mark.parametrize("moved", [True, False])
def test_held_out_images_of_another_folder_are_warned_of(tmp_path, caplog, moved):
    """A test set in class folders would be evaluated in part only."""
    for number in range(4):
        (tmp_path / "test" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / "ab"[number % 2] / f"{number}.png")
    config = config_of(tmp_path / "test", train_folder=".", val_from_train=2)
    path = str(tmp_path / "photos") if moved else config.data.path
    run = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
    save_config(run, tmp_path / "run" / "config.yaml")
    assert len(open_labeled_split(config, str(tmp_path / "run")).source) == 2
    warned = "test: is not the folder of the training" in caplog.text
    assert warned is moved and caplog.text.count("--data.val_folder .") == moved


def test_a_class_of_another_set_is_named(imagenet, tmp_path, caplog):
    (tmp_path / "val").mkdir()
    for folder in (imagenet / "val").iterdir():
        (tmp_path / "val" / folder.name).symlink_to(folder)
    open_labeled_split(config_of(tmp_path), "none.ckpt")
    (tmp_path / "val" / synsets()[7]).rename(tmp_path / "val" / "n99999999")
    refused(
        config_of(tmp_path),
        f"class 7 is {synsets()[8]}, which is ImageNet's class 8; ImageNet's class 7 is",
    )
    names = sorted(p.name for p in (tmp_path / "val").iterdir())
    with caplog.at_level(logging.WARNING):
        open_labeled_split(config_of(tmp_path, class_names=names), "none.ckpt")
    assert "correct only for weights that were trained in that order" in caplog.text
    (tmp_path / "val" / "n99999999").rename(tmp_path / "away")
    refused(config_of(tmp_path), f"999 classes, not 1000: no {synsets()[7]}")


def test_a_permuted_class_order_is_noticed(imagenet, tmp_path, caplog):
    names = list(synsets())
    names[0], names[9] = names[9], names[0]
    with caplog.at_level(logging.WARNING):
        open_labeled_split(config_of(imagenet, class_names=names), "none.ckpt")
    assert f"class 0 is {synsets()[9]}, which is ImageNet's class 9" in caplog.text
    real = write_real(tmp_path / "real.json", [])
    for keys in ({"labels": "real", "labels_file": real}, {"labels": "v2"}):
        keys["class_names"] = names
        refused(config_of(imagenet, **keys), "the model's classes are not ImageNet-1k's .*class 0")


def test_keys_that_do_not_go_together_are_refused(imagenet, tmp_path):
    config = config_of(imagenet, labels="v2", classes=["1", "2"])
    refused(config, "data.classes: data.labels v2 covers all of ImageNet's classes")
    digits = dataclasses.replace(config.data, source="digits", classes=None)
    refused(dataclasses.replace(config, data=digits), "data.source is digits; remove data.labels")
    refused(config_of(imagenet, labels="real"), "--data.labels_file FILE")
    refused(config_of(imagenet, labels_file="real.json"), "add --data.labels real")
    with pytest.raises(UserError, match="give these keys to eval.py"):
        train(config_of(imagenet, labels="v2"), tmp_path / "run")


def write_pets(folder, labels: list[str]) -> Config:
    """Three dogs and one cat in folders, and a Hugging Face folder that always answers output 0."""
    for name, count in (("cat", 1), ("dog", 3)):
        (folder / "val" / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (20, 20)).save(folder / "val" / name / f"{k}.png")
    config = Config(
        model=ModelConfig(name="cvt_nano", image_size=16, **{**TINY, "num_classes": 2}),
        data=DataConfig(path=str(folder), workers=1, check_images=False),
    )
    net = build_model(config)
    net.head.weight.set_data(ms.Tensor(np.zeros((2, 32), np.float32)))
    net.head.bias.set_data(ms.Tensor(np.float32([1, 0])))
    save_weights(net, folder / "model.safetensors")
    names = {"id2label": dict(enumerate(labels))}
    (folder / "config.json").write_text(json.dumps(names))
    return config


@pytest.mark.parametrize(
    ("labels", "top1"), [(["dog", "cat"], 75), (["cat", "dog"], 25), (["LABEL_0", "LABEL_1"], 25)]
)
def test_images_are_labelled_by_the_names_in_hugging_faces_config(tmp_path, labels, top1):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = write_pets(tmp_path, labels)
    for checkpoint in (tmp_path, tmp_path / "model.safetensors"):
        assert evaluate_checkpoint(config, str(checkpoint))[0].metrics.top1 == top1
    config.data.class_names = ["cat", "dog"]  # the user's word
    assert evaluate_checkpoint(config, str(tmp_path))[0].metrics.top1 == 25


def test_other_classes_than_in_hugging_faces_config_are_refused(tmp_path):
    config = write_pets(tmp_path, ["dog", "fox"])
    with pytest.raises(UserError, match="'cat' is none of the 2 known classes .dog, fox"):
        evaluate_checkpoint(config, str(tmp_path))


def test_a_recipe_without_names_takes_those_of_the_weights_run(tmp_path):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = write_pets(tmp_path, ["LABEL_0", "LABEL_1"])
    run = dataclasses.replace(config, data=DataConfig(class_names=["dog", "cat"]))
    save_config(run, tmp_path / "config.yaml")
    assert evaluate_checkpoint(config, str(tmp_path))[0].metrics.top1 == 75


def test_imagenets_words_leave_the_order_to_the_synsets(imagenet, tmp_path):
    config = config_of(imagenet)
    names = {"id2label": dict(enumerate(imagenet_names()))}
    (tmp_path / "config.json").write_text(json.dumps(names))
    assert with_class_names(config, tmp_path) == config


def test_other_preprocessing_than_the_runs_is_told(trained, caplog):
    """As with --config and a recipe beside a run's checkpoint."""
    weights, config = trained / "checkpoints/best.ckpt", load_config(trained / "config.yaml")
    compare_with_run(weights, config)
    assert not caplog.records
    config.data.mean = [0.5, 0.5, 0.5]
    compare_with_run(weights, config)
    assert "its run had mean (0.1, 0.1, 0.1), not (0.5, 0.5, 0.5)" in caplog.text


def test_a_folder_of_unknown_order_is_told(imagenet, tmp_path, caplog):
    save_weights(build_model(tiny_config()), tmp_path / "w.ckpt")
    config = tiny_config(data=DataConfig(source="imagefolder", path=str(imagenet)))
    with_class_names(config_of(imagenet), tmp_path / "w.ckpt")  # ImageNet's order is checked
    assert not caplog.records
    with_class_names(config, tmp_path / "w.ckpt")
    assert "w.ckpt: its class names are unknown" in caplog.text
