"""Where weights lie in a file: entries, prefixes, several sets, and what lies beside them."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest

from src.errors import UserError
from src.weights.select import select
from tests.golden import pico
from tools.check_device.golden import official

SHAPES = official.NAMES["cvt_13"]
WEIGHTS = [name for name in SHAPES if "num_batches" not in name]
TRAINED = [name for name in WEIGHTS if "running" not in name]
THEIRS = list(json.loads((pico.FOLDER / "hf_state_dict_keys.json").read_text())["cvt_13"])


class Window:
    """A tensor that is still in a file; equal where it is the same part of it."""

    def __init__(self, part: object, ndim: int = 2, shape: tuple[int, ...] = ()) -> None:
        self.part, self.ndim, self.shape = part, ndim, shape

    def __eq__(self, other: object) -> bool:
        return self.part == other.part

    __hash__ = None


def tensors(*entry: str, prefix: str = "", names=WEIGHTS, values: str = "", shapes=SHAPES) -> dict:
    """A set of weights under an entry and a prefix."""
    return {
        (*entry, f"{prefix}{name}"): Window(
            (values, name),
            0 if name.endswith("num_batches_tracked") else 2,
            tuple(shapes.get(name, ())),
        )
        for name in names
    }


PLACES = [
    ((), "model."),
    ((), "network._backbone."),
    (("net",), ""),
    (("weights", "params"), "module.model."),
    (("algorithm",), "net.encoder_q."),
    (("state",), "_orig_mod.module."),
    (("state_dict",), "cvt."),
    (("0",), "student.0."),
]


@pytest.mark.parametrize("names", [list(SHAPES), THEIRS], ids=["official", "Hugging Face"])
@pytest.mark.parametrize(("entry", "prefix"), PLACES)
def test_any_entry_and_prefix(entry, prefix, names):
    done = select(tensors(*entry, prefix=prefix, names=names))
    assert sorted(done.names.values()) == sorted(select(tensors(names=WEIGHTS)).names.values())
    text = "; ".join(done.notes)
    assert (f"read from {' > '.join(entry)}" in text) == bool(entry)
    cut = prefix.replace("_orig_mod.", "")
    assert (f"prefix {cut} removed" in text) == bool(cut)
    assert not done.averaged and set(done.ignored.values()) == {"num_batches_tracked"}


def test_names_inside_of_which_pytorch_wraps():
    names = [name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.") for name in WEIGHTS]
    done = select(tensors(prefix="_fsdp_wrapped_module.", names=names))
    assert sorted(done.names.values()) == sorted(select(tensors()).names.values())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((), ""), ((), "ema.")),
        (((), "student."), ((), "teacher.")),
        (((), "model."), ((), "ema_model.")),
        ((("model",), ""), (("model_ema",), "module.")),
        ((("state_dict",), "net."), (("callbacks", "EMA", "shadow"), "")),
        ((("params",), ""), (("swa_state",), "")),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_of_two_sets_the_average_is_taken_and_the_other_is_named(first, second, turned):
    both = [tensors(*entry, prefix=prefix) for entry, prefix in (first, second)]
    done = select({**both[turned], **both[not turned]})
    assert done.averaged and done.names.keys() == both[1].keys()
    label = ".".join([*first[0], first[1].rstrip(".")]).strip(".") or "top"
    plain = select({**both[0], **both[1]}, entry=label)
    assert plain.names.keys() == both[0].keys() and not plain.averaged
    told = " ".join([*done.notes, *done.ignored.values()])
    assert f"{label} holds other weights" in told or "not averaged" in told


def test_an_average_of_what_is_trained_is_completed_with_the_statistics():
    average = tensors("ema", names=TRAINED, values="ema")
    plain = tensors("model")
    done = select({**plain, **average})
    rest = len(WEIGHTS) - len(TRAINED)
    assert len(done.names) == len(WEIGHTS) and average.keys() <= done.names.keys()
    assert f"{rest} tensors without an average read from model" in done.notes


def test_of_two_plain_sets_the_user_chooses():
    found = {**tensors("model"), **tensors("best", prefix="net.", values="other")}
    with pytest.raises(UserError, match="2 sets of weights: model, best.net; choose .* --entry"):
        select(found)
    spaced = {**tensors("my model"), **tensors("best", values="other")}
    with pytest.raises(UserError, match="--entry 'my model'$"):
        select(spaced)
    for entry in ("best.net", "best", "net"):
        assert all(place[0] == "best" for place in select(found, entry=entry).names)
    with pytest.raises(UserError, match="no weights under --entry ema; choose one of: model, best"):
        select(found, entry="ema")


def test_an_optimal_model_is_no_optimizer():
    with pytest.raises(UserError, match="2 sets of weights: model, optimal_model"):
        select({**tensors("model"), **tensors("optimal_model", values="other")})


def test_the_same_tensors_in_two_places_are_one_set():
    assert len(select({**tensors("model"), **tensors("again")}).names) == len(WEIGHTS)


@pytest.mark.parametrize(
    "state",
    [
        tensors("optimizer", "momentum", names=TRAINED),
        tensors("optim", "ema", names=TRAINED),
        tensors("slots", names=TRAINED),
        tensors(prefix="exp_avg."),
        tensors(prefix="exp_avg_sq."),
        tensors(prefix="max_exp_avg_sq."),
        tensors(prefix="square_avg."),
        tensors(prefix="grad_avg."),
    ],
)
def test_the_state_of_an_optimizer_is_not_taken(state):
    plain = tensors(names=TRAINED)
    plain = plain if any(len(place) == 1 for place in state) else tensors("model")
    state = {p: t for p, t in state.items() if len(p) > 1 or p[0].split(".", 1)[1] in TRAINED}
    for found in ({**plain, **state}, {**state, **plain}):
        done = select(found)
        assert done.names.keys() == plain.keys() and not done.averaged


def network_of(names, **shapes) -> dict:
    return {"names": names, "shapes": {**SHAPES, **shapes}}


SHALLOW = [name for name in WEIGHTS if not name.startswith("stage2.blocks.9.")]
SMALL = [name for name in SHALLOW if not re.match(r"stage2\.blocks\.[1-8]\.", name)]
OTHERS = {
    "deeper": network_of([n for n in official.NAMES["cvt_21"] if "num_batches" not in n]),
    "shallower": network_of(SHALLOW),
    "less than half as many tensors": network_of(SMALL),
    "wider": network_of(WEIGHTS, **{"norm.weight": (768,)}),
    "without class token": network_of([n for n in WEIGHTS if "cls_token" not in n]),
    "without biases": network_of([n for n in WEIGHTS if not n.endswith("proj_q.bias")]),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("entries", [("student", "teacher"), ("teacher", "student")])
def test_two_networks_are_not_mixed(other, entries):
    plain, another = entries
    found = {**tensors(plain), **tensors(another, **other, values="other")}
    with pytest.raises(UserError, match="2 sets of weights: .*; choose .* --entry"):
        select(found)
    for entry in entries:
        done = select(found, entry=entry)
        assert not done.averaged and {place[0] for place in done.names} == {entry}


def test_a_teacher_does_not_take_the_students_head():
    backbone = [n for n in WEIGHTS if not n.startswith("head.")]
    with pytest.raises(UserError, match="2 sets of weights"):
        select({**tensors("student"), **tensors("teacher", names=backbone, values="other")})


def test_a_student_without_statistics_is_not_the_teachers_optimizer():
    linear = [n for n in SMALL if n in TRAINED]
    with pytest.raises(UserError, match="2 sets of weights"):
        select({**tensors("teacher"), **tensors("student", names=linear, values="other")})


def test_an_average_of_what_is_trained_is_completed_with_frozen_modules():
    frozen = ("stage0.", "stage2.blocks.0.", "stage1.patch_embed.proj.")
    average = tensors("ema", names=[n for n in TRAINED if not n.startswith(frozen)])
    done = select({**tensors("model"), **average})
    assert done.averaged and len(done.names) == len(WEIGHTS)


def test_mmengine_keeps_the_average_in_state_dict():
    """mmengine/hooks/ema_hook.py: `_swap_ema_state_dict` in `before_save_checkpoint`."""
    found = {
        **tensors("state_dict"),
        **tensors("ema_state_dict", prefix="module.", values="raw"),
    }
    assert {place[0] for place in select(found).names} == {"ema_state_dict"}
    found["ema_state_dict", "steps"] = Window(0, 0)
    done = select(found)
    assert {place[0] for place in done.names} == {"state_dict"} and done.averaged
    assert "MMEngine" in "; ".join(done.notes)
    raw = select(found, entry="ema_state_dict")
    assert {place[0] for place in raw.names} == {"ema_state_dict"} and not raw.averaged


def test_a_head_outside_of_the_backbone_belongs_to_it():
    backbone = [name for name in WEIGHTS if not name.startswith("head.")]
    found = {
        **tensors(prefix="model.backbone.", names=backbone),
        **tensors(prefix="model.", names=["head.weight", "head.bias"]),
    }
    done = select(found)
    assert done.names.keys() == found.keys()
    assert "with head.weight, head.bias from model" in done.notes


def test_strange_tensors_under_the_prefix_are_refused_and_others_are_named():
    with pytest.raises(UserError, match="1 of its .* names belong to no CvT .*: aux.weight"):
        select({**tensors(prefix="model."), ("model.aux.weight",): Window(0)})
    with pytest.raises(UserError, match="2 of its .* names belong to no CvT"):
        select({**tensors(), ("neck.norm.weight",): Window(0), ("neck.fc.weight",): Window(1)})
    done = select({**tensors(prefix="model."), ("loss.weight",): Window(0)})
    assert "skipped loss.weight" in done.notes and len(done.names) == len(WEIGHTS)


def test_only_counters_and_only_strangers():
    with pytest.raises(UserError, match="only training counters"):
        select({("step",): Window(0, 0)})
    with pytest.raises(UserError, match="2 of its 2 names belong to no CvT"):
        select({("fc.weight",): Window(0), ("a", "fc.bias"): Window(0)})


HOSTILE = {
    "strange": lambda n: f"a{n}.b.c.weight",
    "one layer each": lambda n: f"a{n}.norm.weight",
    "dots": lambda n: f"{n}{'.norm' * 100}.x",
    "of MindSpore": lambda n: f"stage0.blocks.{n}.norm1.gamma",
    "mixed": lambda n: f"stage0.blocks.{n}.norm1.gamma" if n % 2 else f"layernorm.{n}.weight",
    "copies": lambda n: f"{'m.' * (n % 100)}stage0.blocks.{n // 100}.norm1.gamma",
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_20_000_names_cost_little(make):
    found = {(make(number),): np.zeros((1, 1)) for number in range(20_000)}
    start = time.process_time()
    try:
        select(found)
    except UserError as error:
        assert len(str(error)) < 500
    # 1.3 s on an idle machine; processor time doubles while the other core is busy.
    assert time.process_time() - start < 5
