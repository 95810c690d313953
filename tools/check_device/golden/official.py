"""Golden numbers of the official implementation, and the deterministic weights behind them.

Tensors come from NumPy's PCG64, seeded by a number and the CRC-32 of the official name.
"""

import json
import zlib
from pathlib import Path

import mindspore as ms
import numpy as np

from src.models import create_model, uninitialised

FOLDER = Path(__file__).parent
REFERENCE = np.load(FOLDER / "official_reference.npz")
DESCRIPTION = json.loads((FOLDER / "official_reference.json").read_text())
NAMES = json.loads((FOLDER / "official_state_dict_keys.json").read_text())
SUFFIXES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
NANO = {"embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "depths": (1, 1, 2)}


def official_name(name: str) -> str:
    """Return a parameter's name in the official state dict."""
    prefix, _, suffix = name.rpartition(".")
    return f"{prefix}.{SUFFIXES.get(suffix, suffix)}"


def tensor(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the deterministic tensor of an official name."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("running_var"):
        return (0.5 + rng.random(shape)).astype(np.float32)
    z = rng.standard_normal(shape).astype(np.float32).astype(np.float64)
    if name.endswith(("running_mean", "bias")):
        z = 0.1 * z
    elif name.endswith("cls_token"):
        z = 0.5 * z
    elif len(shape) == 1:
        z = 1 + 0.1 * z
    else:
        z = z / np.sqrt(np.prod(shape[1:]))
    return z.astype(np.float32)


def model(case: dict):
    """Create the network of a case of official_reference.json with its weights."""
    name, options = case["model"], {}
    if name == "nano":
        name, options = "cvt_13", dict(NANO)
    if "stride_kv" in case:
        options["kv_stride"] = case["stride_kv"]
    if "method" in case:
        options["qkv_projection"] = case["method"]
    if "cls" in case:
        options["cls_token"] = case["cls"][-1]
    with uninitialised():
        net = create_model(name, num_classes=case.get("num_classes", 1000), **options)
    for parameter in net.get_parameters():
        value = tensor(case["seed"], official_name(parameter.name), parameter.shape)
        parameter.set_data(ms.Tensor(value))
    return net.set_train(False)


def images(case: dict) -> ms.Tensor:
    """Return the input of a case."""
    rng = np.random.default_rng([case["seed"], zlib.crc32(b"input")])
    return ms.Tensor(rng.standard_normal(case["input_shape"]).astype(np.float32))
