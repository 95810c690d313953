"""Loading into a network: real files against the official logits, and everything that can't fit."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from safetensors.numpy import save_file

from src.config import Config, ModelConfig
from src.config_io import save_config
from src.errors import UserError
from src.models import create_model
from src.weights import WeightsMismatch, load_state, load_weights, save_checkpoint, save_weights
from src.weights.load import _assume_grid, interpolate_pos_embed, load_tensors
from src.weights.load_report import LoadReport
from src.weights.names import from_huggingface, from_official
from tests.conftest import ROOT, TINY
from tests.golden import pico

THEIRS = json.loads((pico.FOLDER / "hf_state_dict_keys.json").read_text())["cvt_13"]


def values(net: nn.Cell) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[name].tobytes() == second[name].tobytes() for name in first
    )


def saved(net: nn.Cell, path, **changes) -> str:
    """A file of the network's tensors, some of them changed or (None) left out."""
    tensors = {parameter.name: parameter for parameter in net.get_parameters()}
    tensors.update({name.replace("__", "."): change for name, change in changes.items()})
    save_weights({n: t for n, t in tensors.items() if t is not None}, path)
    return str(path)


@pytest.fixture(scope="module")
def net() -> nn.Cell:
    """Not to be changed."""
    return create_model("cvt_nano", **TINY)


@pytest.fixture
def other() -> nn.Cell:
    return create_model("cvt_nano", **TINY)


def test_files_of_real_libraries_give_the_official_logits():
    """A function is compiled before the first file and must see each; it would not see set_data."""
    model, images = pico.model(), pico.images()

    @ms.jit
    def compiled(images):
        return model(images)

    for name in pico.FILES:
        for parameter in model.get_parameters():
            ms.ops.assign(parameter, ms.ops.zeros_like(parameter))
        assert not compiled(images).asnumpy().any()
        report = load_weights(model, pico.FOLDER / name)
        limit = 2e-2 if "fp16" in name else 2e-5
        assert np.abs(compiled(images).asnumpy() - pico.LOGITS).max() <= limit, name
        assert len(report.loaded) == len(list(model.get_parameters())) == 203
        assert not (report.missing or report.unexpected or report.mismatched)
        assert set(report.ignored.values()) == {"num_batches_tracked"} and len(report.ignored) == 18
        assert report.naming == ("Hugging Face names" if "hf" in name else "official names")
        assert report.cast == ({"float16": 203} if "fp16" in name else {})
        assert ("read from state_dict" in report.notes) == ("wrapped" in name)


def test_round_trip_is_exact_to_the_bit(tmp_path, net, other):
    special = Tensor(np.array([3e38, -0.0, 1e-45, -1e-38] + [1 / 3] * 6, np.float32))
    first = saved(net, tmp_path / "a.ckpt", head__bias=special)
    load_weights(other, first)
    save_weights(other, tmp_path / "b.safetensors")
    again = create_model("cvt_nano", **TINY)
    load_weights(again, tmp_path / "b.safetensors")
    save_weights(again, tmp_path / "c.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "c.ckpt").read_bytes()
    assert values(again)["head.bias"].tobytes() == special.asnumpy().tobytes()


class Detector(nn.Cell):
    """A network of the user's, with ours as a part."""

    def __init__(self, net):
        super().__init__()
        self.backbone = net


@pytest.mark.parametrize("hold", [Detector, lambda net: nn.SequentialCell(Detector(net), net)])
def test_a_part_of_another_cell_loads_and_saves_as_itself(tmp_path, net, hold):
    """The cell that holds a network prepends its attribute's name to the parameters' names."""
    part = create_model("cvt_nano", **TINY)
    whole = hold(part)
    assert next(whole.get_parameters()).name.split(".")[0] != "stage0"
    report = load_weights(part, saved(net, tmp_path / "x.ckpt"))
    assert len(report.loaded) == len(values(net))
    save_weights(part, tmp_path / "y.ckpt")
    assert (tmp_path / "y.ckpt").read_bytes() == (tmp_path / "x.ckpt").read_bytes()


def test_plain_files_of_mindspore_load(tmp_path, net, other):
    """Without a checksum, with the state that MindSpore's own training loop adds."""
    entries = [{"name": p.name, "data": p} for p in net.get_parameters()]
    state = {"moments.head.weight": (2,), "global_step": (1,), "learning_rate": (5,)}
    entries += [{"name": n, "data": Tensor(np.zeros(s, np.float32))} for n, s in state.items()]
    ms.save_checkpoint(entries, str(tmp_path / "x.ckpt"), append_dict={"epoch_num": 3})
    ms.save_checkpoint(net, str(tmp_path / "y.safetensors"), format="safetensors")
    for file, left in (("x.ckpt", {*state, "epoch_num"}), ("y.safetensors", set())):
        report = load_weights(other, tmp_path / file)
        assert same(values(other), values(net)) and set(report.ignored) == left
        load_weights(other, saved(net, tmp_path / "z.ckpt", head__bias=Tensor(np.ones(10, "f4"))))


def test_bfloat16_and_other_types_are_converted(tmp_path, net, other):
    arrays = {name: array.astype(np.float64) for name, array in values(net).items()}
    save_file(arrays, tmp_path / "x.safetensors")
    report = load_weights(other, tmp_path / "x.safetensors")
    assert same(values(other), values(net)) and report.cast == {"float64": len(arrays)}
    assert f"{len(arrays)} cast from float64" in str(report)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda array: (array * 100).astype(np.int8),
            "holds int8, such as quantized weights; save",
        ),
        (lambda array: array.astype(np.float64) + 1e300, r"reaches 1.0e\+300, more than float32"),
        (
            lambda array: np.full(array.shape, np.inf, np.float16),
            "has infinity or NaN, as after",
        ),
        (lambda array: array * np.float32(np.nan), "has infinity or NaN"),
    ],
)
def test_numbers_that_float32_does_not_hold_are_refused(tmp_path, net, other, change, words):
    arrays, before = values(net), values(other)
    arrays["head.bias"] = change(arrays["head.bias"])
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"head.bias {words}"):
        load_weights(other, tmp_path / "x.safetensors")
    assert same(values(other), before)


@pytest.mark.parametrize(("dtype", "words"), [("V1", "float8"), ("c8", "complex64")])
def test_types_of_pytorch_that_no_network_takes_are_named(net, dtype, words):
    """Also with a new head, which a tensor left out would have become."""
    arrays = values(net)
    arrays["head.weight"] = np.zeros(arrays["head.weight"].shape, dtype)
    for new_head in (False, True):
        with pytest.raises(UserError, match=f"head.weight holds {words}; save float16 or float32"):
            load_tensors(net, arrays, LoadReport("x.pth"), new_head=new_head)


def test_of_a_training_state_the_average_is_taken(tmp_path, net, other):
    weights = values(net)
    state = {name: Tensor(array + 1) for name, array in weights.items()}
    state.update({f"moment1.{name}": Tensor(array) for name, array in weights.items()})
    state.update({f"ema.{name}": Tensor(array) for name, array in weights.items()})
    save_checkpoint({**state, "step": Tensor(7, ms.int32)}, tmp_path / "last.ckpt", best_top1=1.5)
    report = load_weights(other, tmp_path / "last.ckpt")
    assert same(values(other), weights) and report.averaged
    assert set(report.ignored.values()) == {"not averaged", "moment1", "step", "best_top1"}
    assert len(report.table().splitlines()) == 1 + len(weights) + len(report.ignored)
    assert "(the moving average)" in str(report) and f"{len(weights)} not averaged" in str(report)


MISFITS = {
    "missing": ({"norm__gamma": None}, "1 missing: norm.gamma"),
    "unexpected": (
        {"stage2__pos_embed": Tensor(np.ones((1, 4, 32), "f4"))},
        "1 unexpected: stage2",
    ),
    "misshapen": (
        {"norm__beta": Tensor(np.ones(31, "f4"))},
        r"of another shape: norm.beta \[31\] ",
    ),
    "transposed": ({"head__weight": Tensor(np.ones((32, 10), "f4"))}, r"\[32, 10\] for \[10, 32\]"),
}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize(("changes", "pattern"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    tmp_path, net, other, caplog, suffix, changes, pattern
):
    path, before = saved(net, tmp_path / f"x{suffix}", **changes), values(other)
    with caplog.at_level(logging.INFO), pytest.raises(WeightsMismatch, match=pattern) as caught:
        load_weights(other, path)
    assert same(values(other), before)
    message, report = str(caught.value), caught.value.report
    assert message.startswith(f"{path}: does not fit the network: 1 ") and "\n" not in message
    rows = report.table(everything=False).splitlines()
    assert len(rows) == 2 and rows[1] in caplog.text
    (name,) = (name.replace("__", ".") for name in changes)
    assert rows[1].split()[1] == name
    assert len(report.table().splitlines()) == 1 + len(report.shapes)

    report = load_weights(other, path, strict=False)
    expected = {**values(net), **{name: before[name] for name in before.keys() & {name}}}
    assert same(values(other), expected) and "NOT loaded: 1 " in str(report)
    assert len(report.loaded) == len(before.keys() - {name})


def test_nothing_at_all_fits(tmp_path, net):
    path = saved(
        create_model("cvt_nano", **{**TINY, "embed_dims": (16, 32, 64)}), tmp_path / "x.ckpt"
    )
    before = values(net)
    with pytest.raises(WeightsMismatch, match="of another shape: .* more") as caught:
        load_weights(net, path)
    assert same(values(net), before)
    rows = caught.value.report.table(everything=False, limit=5).splitlines()
    assert len(rows) == 7 and rows[-1].split()[1:3] == ["...", "and"]


def test_a_head_for_other_classes_is_new_only_when_asked(tmp_path, net):
    path = saved(net, tmp_path / "x.ckpt")
    other = create_model("cvt_nano", **{**TINY, "num_classes": 7})
    before = values(other)
    with pytest.raises(WeightsMismatch, match="only the head differs: .*--finetune"):
        load_weights(other, path)
    assert same(values(other), before)
    report = load_weights(other, path, new_head=True)
    after = values(other)
    assert report.new_head == ["head.weight", "head.bias"]
    assert "the head keeps its initial values (head.weight, head.bias)" in str(report)
    for name, array in values(net).items():
        expected = before[name] if name.startswith("head.") else array
        assert after[name].tobytes() == expected.tobytes(), name


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch, net, other):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(net, tmp_path / "w.ckpt")
    assert load_weights(other, "~/w.ckpt").path == str(tmp_path / "w.ckpt")
    assert same(values(net), values(other))


def test_a_new_head_excuses_nothing_else_and_a_head_that_fits_loads(tmp_path, net, other):
    path = saved(net, tmp_path / "x.ckpt", head__bias=Tensor(np.ones(9, "f4")), norm__beta=None)
    with pytest.raises(WeightsMismatch, match="network: 1 missing: norm.beta$"):
        load_weights(other, path, new_head=True)
    report = load_weights(other, saved(net, tmp_path / "y.ckpt"), new_head=True)
    assert same(values(other), values(net)) and not report.new_head
    backbone = create_model("cvt_nano", **{**TINY, "num_classes": 0})
    report = load_weights(backbone, tmp_path / "y.ckpt", new_head=True)
    assert report.new_head == ["head.weight", "head.bias"] and len(report.loaded) + 2 == len(
        values(net)
    )


def test_position_embeddings_are_interpolated_to_the_grid(tmp_path):
    options = {**TINY, "pos_embed": (True, False, True)}
    small = create_model("cvt_nano", **options, image_size=32)
    large = create_model("cvt_nano", **options, image_size=(64, 32))
    path = saved(small, tmp_path / "x.ckpt")
    report = load_weights(large, path)
    grids = [("stage0.pos_embed", (16, 16), (32, 16)), ("stage2.pos_embed", (4, 4), (8, 4))]
    assert report.interpolated == grids
    assert "stage2.pos_embed interpolated from 4 x 4 to 8 x 4" in str(report)
    embedding = small.stage2.pos_embed.asnumpy()
    expected = interpolate_pos_embed(embedding, (4, 4), (8, 4))
    np.testing.assert_array_equal(large.stage2.pos_embed.asnumpy(), expected)
    assert report.shapes["stage2.pos_embed"] == ((1, 16, 32), (1, 32, 32))

    back = create_model("cvt_nano", **options, image_size=(32, 16))  # from a grid not square
    assert load_weights(back, saved(large, tmp_path / "y.ckpt")).interpolated[1][1:] == (
        (8, 4),
        (4, 2),
    )
    odd = saved(small, tmp_path / "z.ckpt", stage2__pos_embed=Tensor(np.ones((1, 17, 32), "f4")))
    with pytest.raises(WeightsMismatch, match=r"stage2.pos_embed \[1, 17, 32\] for"):
        load_weights(large, odd)


@pytest.mark.parametrize(
    ("tokens", "like", "grid"),
    [
        (196, (14, 56), (14, 14)), (2304, (72, 128), (48, 48)), (2304, (36, 64), (36, 64)),
        (196, (28, 28), (14, 14)), (196, (20, 28), (14, 14)), (17, (8, 32), None),
        (98, (28, 14), (14, 7)), (35, (10, 15), (5, 7)),
    ],
)  # fmt: skip
def test_an_unknown_grid_is_the_networks_or_square_or_of_its_aspect(tokens, like, grid):
    assert _assume_grid(tokens, like) == grid


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [(18, 32), (36, 64)])
def test_the_grid_of_positions_is_that_of_the_weights_run(tmp_path, known, size):
    """A ramp along the rows, learnt at 24 x 24 px, stays one: 12 x 12 and 9 x 16 are 144 both."""
    options = {**TINY, "pos_embed": (True, False, False)}
    old = create_model("cvt_nano", **options, image_size=24)
    ramp = np.broadcast_to(np.arange(12.0, dtype="f4")[:, None, None], (12, 12, 8))
    path = saved(old, tmp_path / "x.ckpt", stage0__pos_embed=Tensor(ramp.reshape(1, 144, 8)))
    if known:
        save_config(Config(model=ModelConfig(image_size=24)), tmp_path / "config.yaml")
    net = create_model("cvt_nano", **options, image_size=size)
    report = load_weights(net, path)
    embedding = net.stage0.pos_embed.asnumpy().reshape(*net.grids(size)[0], 8)
    assert ("assumed" in str(report)) == (not known)
    if known or size == (36, 64):
        assert np.ptp(embedding, axis=1).max() < 1e-5
        assert report.interpolated == [("stage0.pos_embed", (12, 12), net.grids(size)[0])]
    else:  # they may be this network's own
        assert embedding.tobytes() == ramp.tobytes() and "assumed to be of 9 x 16" in str(report)


def test_weights_of_a_network_that_is_not_square_load_unchanged(tmp_path):
    options = {**TINY, "pos_embed": (True, False, False), "image_size": (18, 32)}
    net, other = create_model("cvt_nano", **options), create_model("cvt_nano", **options)
    path = saved(net, tmp_path / "x.ckpt")
    for written in (False, True):
        if written:
            save_config(Config(model=ModelConfig(image_size=[18, 32])), tmp_path / "config.yaml")
        report = load_weights(other, path)
        assert same(values(other), values(net)) and not report.interpolated
        assert ("assumed" in str(report)) != written


def test_hugging_faces_naming_tells_of_its_other_gelu(net, other, tmp_path):
    save_file(as_hugging_face(net), tmp_path / "model.safetensors")
    assert str(load_weights(other, tmp_path)).count("trained with GELU") == 1
    assert "GELU" not in str(load_weights(other, saved(net, tmp_path / "x.ckpt")))


def test_interpolation_keeps_a_ramp_and_its_orientation():
    rows, columns = np.mgrid[0:6, 0:4].astype(np.float32)
    embedding = np.stack([rows, columns], -1).reshape(1, 24, 2)
    resized = interpolate_pos_embed(embedding, (6, 4), (12, 8)).reshape(12, 8, 2)
    inside = np.s_[4:-4, 3:-3]
    np.testing.assert_allclose(resized[inside][..., 0], (np.mgrid[0:12, 0:8][0][inside] - 0.5) / 2)
    np.testing.assert_allclose(resized[inside][..., 1], (np.mgrid[0:12, 0:8][1][inside] - 0.5) / 2)
    same_grid = interpolate_pos_embed(embedding, (6, 4), (6, 4))
    np.testing.assert_array_equal(same_grid, embedding)


class Counter(nn.Cell):
    """A training step in small: parameters and a counter."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.weight = Parameter(Tensor(np.zeros(3, np.float32)), name="weight")
        self.step = Parameter(Tensor(0, ms.int32), name="step")


def test_a_state_sets_every_parameter_or_none():
    cell = Counter()
    load_state(cell, {"weight": np.ones(3, "f4"), "step": np.array(7, "i4")}, "last.ckpt")
    assert cell.weight.asnumpy().tolist() == [1, 1, 1] and int(cell.step.asnumpy()) == 7
    with pytest.raises(WeightsMismatch, match="last.ckpt: .*1 missing: step"):
        load_state(cell, {"weight": np.zeros(3, "f4")}, "last.ckpt")
    assert cell.weight.asnumpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["x.pth.tar", "x.ckpt", "x", "x.safetensors", "x.PT"])
def test_the_suffix_does_not_matter(tmp_path, name):
    for source in ("pico_official.pth", "pico_hf.safetensors", "pico_legacy.pth"):
        shutil.copy(pico.FOLDER / source, tmp_path / name)
        model = pico.model()
        load_weights(model, tmp_path / name)
        expected = pico.model()
        load_weights(expected, pico.FOLDER / source)
        assert same(values(model), values(expected))


def as_hugging_face(net: nn.Cell, headless: bool = False) -> dict[str, np.ndarray]:
    """A network's values under the names of a CvtForImageClassification, or of a CvtModel."""
    weights = values(net)
    theirs = {}
    for name in THEIRS:
        ours = from_official(from_huggingface(name) or "")
        if ours in weights:
            theirs[name] = weights[ours]
    assert len(theirs) == len(weights)
    if headless:
        return {n[4:]: array for n, array in theirs.items() if n.startswith("cvt.")}
    return theirs


def write_shards(folder, tensors: dict, count: int, stem: str = "model", **changes) -> None:
    names = [f"{stem}-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    shard_of = {name: names[n % count] for n, name in enumerate(tensors)}
    for shard in names:
        part = {n: a for n, a in tensors.items() if shard_of[n] == shard}
        save_file(part, folder / shard)
    index = {"metadata": {}, "weight_map": {**shard_of, **changes}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def test_folders_shards_and_an_index_load(tmp_path, net, other):
    theirs = as_hugging_face(net)
    for count in (1, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if count == 1:
            save_file(theirs, folder / "model.safetensors")
        else:
            write_shards(folder, theirs, count)
        load_weights(other, saved(net, tmp_path / "z.ckpt", head__bias=Tensor(np.ones(10, "f4"))))
        report = load_weights(other, folder)
        assert same(values(other), values(net)) and report.naming == "Hugging Face names"
        assert ("3 shards" in str(report)) == (count == 3)
    load_weights(other, folder / "model.safetensors.index.json")
    with pytest.raises(UserError, match="one of 3 shards; give their folder"):
        load_weights(other, folder / "model-00002-of-00003.safetensors")


def test_a_file_without_head_and_last_norm_takes_a_new_head(tmp_path, net, other):
    save_file(as_hugging_face(net, headless=True), tmp_path / "model.safetensors")
    before = values(other)
    with pytest.raises(WeightsMismatch, match="4 missing: .*; only the head differs"):
        load_weights(other, tmp_path)
    report = load_weights(other, tmp_path, new_head=True)
    assert report.new_head == ["norm.gamma", "norm.beta", "head.weight", "head.bias"]
    for name, array in values(net).items():
        expected = before[name] if name in report.new_head else array
        assert values(other)[name].tobytes() == expected.tobytes(), name


OPTIMIZERS = [
    lambda weights: nn.SGD(weights, momentum=0.9),
    lambda weights: nn.RMSProp(weights, centered=True),
    lambda weights: nn.Adagrad(weights),
    lambda weights: nn.Adam(weights, use_amsgrad=True),
    lambda weights: nn.ASGD(weights),
    lambda weights: nn.Rprop(weights, learning_rate=nn.CosineDecayLR(0.1, 0.2, 9)),
    lambda weights: nn.AdaMax([{"params": weights[:9], "lr": 0.1}, {"params": weights[9:]}]),
    lambda weights: nn.Momentum(weights[-2:], 0.1, 0.9),
]


@pytest.mark.parametrize("wrapped", ["", "network.", "train._backbone."])
@pytest.mark.parametrize("make", OPTIMIZERS, ids=range(len(OPTIMIZERS)))
def test_the_state_of_mindspores_optimizers_is_left(tmp_path, net, other, make, wrapped):
    optimizer = make(list(net.trainable_params()))
    names = {p.name for p in net.get_parameters()}
    state = {p.name: p for p in optimizer.get_parameters() if p.name not in names}
    entries = {wrapped + n: Tensor(array) for n, array in values(net).items()}
    for name, parameter in state.items():
        kind = next((name[: -len(n)] for n in names if name.endswith(f".{n}")), None)
        entries[name if kind is None else kind + wrapped + name[len(kind) :]] = Tensor(
            parameter.asnumpy()
        )
    save_checkpoint(entries, tmp_path / "x.ckpt")
    load_weights(other, saved(net, tmp_path / "z.ckpt", head__bias=Tensor(np.ones(10, "f4"))))
    report = load_weights(other, tmp_path / "x.ckpt")
    assert same(values(other), values(net))
    assert len(report.ignored) == len(entries) - len(names) >= 2


def test_weights_of_our_other_networks_load_with_prefix_and_average(tmp_path):
    resnet = create_model("resnet_nano", num_classes=3)
    weights = values(resnet)
    state = {f"network.{name}": Tensor(array + 1) for name, array in weights.items()}
    state.update({f"ema.network.{name}": Tensor(array) for name, array in weights.items()})
    state.update({f"moment1.network.{name}": Tensor(array) for name, array in weights.items()
                  if "moving" not in name})  # fmt: skip
    save_checkpoint(state, tmp_path / "x.ckpt")
    report = load_weights(resnet, tmp_path / "x.ckpt")
    assert same(values(resnet), weights) and report.averaged


def test_names_of_no_cvt_are_refused_with_the_path(tmp_path, net):
    save_file({"conv1.weight": np.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors: 1 of its 1 names belong to no CvT"):
        load_weights(net, tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", pico.FILES)
def test_damaged_files_are_refused_soon_and_change_nothing(tmp_path, name):
    model, rng = pico.model(), np.random.default_rng(0)
    before, sound = values(model), (pico.FOLDER / name).read_bytes()
    path = tmp_path / name
    cuts = [0, 1, 100, len(sound) // 2, len(sound) - 1]
    for raw in (*(sound[:cut] for cut in cuts), rng.bytes(len(sound)), bytes(len(sound))):
        path.write_bytes(raw)
        start = time.process_time()
        with pytest.raises(UserError) as caught:
            load_weights(model, path)
        assert time.process_time() - start < 1
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert same(values(model), before)


MEASURE = """
import sys, threading, time
import psutil
from src.device import prepare_environment
prepare_environment()
import mindspore as ms
from src.models import create_model
from src.weights import load_weights
ms.set_context(mode=ms.GRAPH_MODE)
net = create_model("cvt_13")
load_weights(net, "tests/golden/pico_hf.safetensors", strict=False)
process, peak, done = psutil.Process(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], process.memory_info().rss)
before = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
start = time.process_time()
load_weights(net, sys.argv[1])
seconds = time.process_time() - start
done.set()
thread.join()
print(seconds, peak[0] - before)
"""


@pytest.mark.big
def test_80_megabytes_load_in_3_seconds_and_two_and_a_half_times_the_memory(tmp_path):
    weights = create_model("cvt_13")
    for name in ("x.ckpt", "x.safetensors"):
        save_weights(weights, tmp_path / name)
        command = [sys.executable, "-c", MEASURE, str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, growth = map(float, done.stdout.split()[-2:])
        assert seconds <= 3 and growth <= 2.5 * (tmp_path / name).stat().st_size
