"""Small networks with every option, their weights such that no fault stays without effect."""

import zlib

import mindspore as ms
import numpy as np

from src.models import create_model
from tests.conftest import TINY

# Model, options, image size: each is written and run by the tests of fuse and of the files.
NETWORKS = {
    "conv": ("cvt_nano", TINY, (32, 40)),
    "linear": ("cvt_nano", {**TINY, "qkv_projection": "linear"}, (32, 40)),
    "linear-mean": ("cvt_nano", {**TINY, "qkv_projection": "linear", "cls_token": False}, (32, 32)),
    "avg": ("cvt_nano", {**TINY, "qkv_projection": "avg", "kv_stride": 3}, (32, 40)),
    "avg-mean": ("cvt_nano", {**TINY, "qkv_projection": "avg", "cls_token": False}, (36, 52)),
    "patch": ("cvt_nano", {**TINY, "patch_embed": "patch", "kv_stride": 1}, (32, 40)),
    "positions": (
        "cvt_nano",
        {**TINY, "pos_embed": True, "image_size": (32, 40), "cls_token": False},
        (32, 40),
    ),
    "feature": (
        "cvt_nano",
        {**TINY, "num_classes": 0, "drop_path_rate": 0.1, "drop_rate": 0.1, "in_channels": 1},
        (32, 40),
    ),
    "vit": ("vit_nano", {"depth": 2, "num_classes": 10}, (32, 32)),
    "vit-feature": ("vit_nano", {"depth": 1, "num_classes": 0, "image_size": (16, 32)}, (16, 32)),
    "resnet": ("resnet_nano", {"depths": (1, 2), "width": 8, "num_classes": 10}, (18, 32)),
    "resnet-stem": ("resnet_50", {"depths": (1, 1), "width": 4, "num_classes": 0}, (33, 48)),
}


def network(name: str):
    """One of `NETWORKS` in evaluation mode, and three images for it."""
    model, options, size = NETWORKS[name]
    net = create_model(model, **options).set_train(False)
    for parameter in net.get_parameters():
        rng = np.random.default_rng(zlib.crc32(parameter.name.encode()))
        low = 0 if parameter.name.endswith("variance") else -0.3
        noise = rng.uniform(low, 0.3, parameter.shape).astype(np.float32)
        parameter.set_data(parameter + ms.Tensor(noise))
    shape = (3, options.get("in_channels", 3), *size)
    return net, np.random.default_rng(0).standard_normal(shape).astype(np.float32)
