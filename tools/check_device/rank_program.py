"""The program of one rank, started by msrun, or directly for a single rank.

Each rank writes its results as JSON to FOLDER/rank_<rank>.json.
"""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"1 KB": 256, "300 KB": 76_800, "64 MB": 16_777_216}  # float32 elements
STEPS, BATCH, CLIP_NORM, LR = 20, 48, 0.5, 1e-3  # BATCH: images of all ranks
TEXT = "rank {}: ¹²³ äöü 漢字"


def main(what: str, folder: str, device: str, late_seconds: float = 0.0) -> None:
    """Run the program "collectives", "training" or "late"."""
    from src.config import RuntimeConfig
    from src.device import setup

    _, ranks = setup(RuntimeConfig(device=device))
    programs = {"collectives": collectives, "training": training, "late": late}
    found = programs[what](ranks, late_seconds)
    (Path(folder) / f"rank_{ranks.rank}.json").write_text(json.dumps(found))
    ranks.announce_end(0)


def collectives(ranks: Any, _: float) -> dict[str, Any]:
    """Exchange texts and bits, and sum messages of three sizes."""
    from mindspore import Parameter, Tensor, ops

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 1001, np.uint32)  # NaN and infinity among them
    parameter = Parameter(Tensor(bits.view(np.float32) if ranks.is_first else np.zeros(1001, "f4")))
    ranks.broadcast([parameter])
    own = np.random.default_rng(ranks.rank).integers(0, 2**63, 7).view(np.float64)
    others = [np.random.default_rng(r).integers(0, 2**63, 7) for r in range(ranks.world)]
    found: dict[str, Any] = {
        "texts": ranks.gather_texts(TEXT.format(ranks.rank))
        == [TEXT.format(rank) for rank in range(ranks.world)],
        "broadcast": parameter.asnumpy().tobytes() == bits.tobytes(),
        "gather": ranks.gather(own).tobytes() == np.stack(others).tobytes(),
        "sums": {}, "exact": {}, "milliseconds": {},
    }  # fmt: skip
    add = ops.AllReduce()
    for name, size in SIZES.items():
        whole = (np.arange(size) % 1000).astype(np.float32)
        total = add(Tensor(whole * (ranks.rank + 1))).asnumpy()
        right = whole * (ranks.world * (ranks.world + 1) // 2)
        found["exact"][name] = bool((total == right).all())
        noise = Tensor(np.random.default_rng(ranks.rank).standard_normal(size, np.float32))
        found["sums"][name] = zlib.crc32(add(noise).asnumpy())
        start = time.perf_counter()
        for _ in range(3):
            add(noise)[:1].asnumpy()
        found["milliseconds"][name] = (time.perf_counter() - start) / 3 * 1000
    return found


def training(ranks: Any, _: float) -> dict[str, Any]:
    """Run twenty steps with drop path, clipping and synchronised BatchNorm statistics."""
    from mindspore import Tensor

    from src.build import accelerate
    from src.config import RuntimeConfig
    from src.models.sync_batchnorm import synchronise_batchnorm
    from tools.check_device.checks.cells import build_step
    from tools.check_device.checks.state import network

    net = network(drop_path_rate=0.3)
    if ranks.world > 1:
        synchronise_batchnorm(net, ranks.world)
    ranks.broadcast(net.get_parameters())
    accelerate(net, RuntimeConfig())
    step = build_step(net, LR, STEPS, clip_norm=CLIP_NORM, rank=ranks.rank, world=ranks.world)
    rng, losses, norms = np.random.default_rng(0), [], []
    for number in range(STEPS):
        if number == 1:  # the first one compiles
            start = time.perf_counter()
        images = rng.standard_normal((BATCH, 3, 32, 32)).astype(np.float32)
        labels = rng.integers(0, 10, BATCH).astype(np.int32)
        own = slice(ranks.rank, None, ranks.world)
        loss, norm = step.run_batch(Tensor(images[own]), Tensor(labels[own]))
        losses.append(float(loss.asnumpy()))
        norms.append(float(norm.asnumpy()))
    checksum = 0
    for parameter in step.get_parameters():
        checksum = zlib.crc32(parameter.asnumpy(), checksum)
    messages = len(step.updates.buckets.bounds) + 1 if ranks.world > 1 else 0
    milliseconds = (time.perf_counter() - start) / (STEPS - 1) * 1000
    return {
        "losses": losses, "norms": norms, "checksum": checksum, "messages": messages,
        "milliseconds": milliseconds,
    }  # fmt: skip


def late(ranks: Any, seconds: float) -> dict[str, Any]:
    """Delay the last rank before a collective and measure the wait."""
    ranks.gather([0.0])
    start = time.perf_counter()
    if ranks.rank == ranks.world - 1:
        time.sleep(seconds)
    ranks_seen = ranks.gather([float(ranks.rank)])
    return {
        "waited": time.perf_counter() - start,
        "right": ranks_seen[:, 0].tolist() == list(range(ranks.world)),
    }
