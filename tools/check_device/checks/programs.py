"""Checks the executables: train.py on the digits, export.py in each format."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from tools.check_device.checks.training import last_line
from tools.check_device.registry import Finding, NotHere, Setting
from tools.check_device.runner import ROOT

RECIPE = ROOT / "config/digits/cvt_nano.yaml"
EPOCHS, LOWEST_TOP1 = 2, 70.0
# Largest difference of a probability; an image's classes differ by about 0.02.
ON_CPU, ON_CARD = 1e-5, 1e-3


def run_program(setting: Setting, name: str, *words: str) -> str:
    """Run an executable as a user does and return its output.

    Raises:
        RuntimeError: it failed; the message has its last error.
    """
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *words], cwd=setting.folder, capture_output=True,
        text=True,
    )  # fmt: skip
    text = done.stdout + done.stderr
    if done.returncode:
        print(text[-4000:])
        raise RuntimeError(f"{name} ended with exit code {done.returncode}: {last_line(text)}")
    return text


def train(setting: Setting) -> Finding:
    """Train two epochs of 4,000 digits."""
    run_program(
        setting, "train.py", "--config", str(RECIPE), "--output", "run",
        "--runtime.device", setting.device, f"--training.epochs={EPOCHS}",
        "--optimizer.warmup_epochs=0",
    )  # fmt: skip
    lines = (Path(setting.folder) / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    top1, speed = rows[-1]["top1"], rows[-1]["images_per_second"]
    return Finding(
        f"top-1 {top1:.1f} % after {EPOCHS} epochs; {speed:.0f} img/s", f">= {LOWEST_TOP1:g} %",
        top1 >= LOWEST_TOP1, details={"metrics": rows},
    )  # fmt: skip


def mindir(setting: Setting) -> Finding:
    """Export a MINDIR file, run it on this device, and compare it with the weights on the CPU."""
    return _export(setting, "mindir", setting.device)


def onnx(setting: Setting) -> Finding:
    """Export an ONNX file, run it in the installed engine, and compare it with the weights."""
    from src.deploy.writers import installed_engines

    if not installed_engines("onnx"):
        raise NotHere("neither onnxruntime nor OpenVINO is installed")
    return _export(setting, "onnx")


def air(setting: Setting) -> Finding:
    """Export an AIR file for ATC."""
    if setting.device != "Ascend":
        raise NotHere("MindSpore writes AIR on Ascend only")
    return _export(setting, "air")


def _export(setting: Setting, kind: str, device: str = "CPU") -> Finding:
    """Export random weights, and compare the file's predictions with theirs unless it is AIR."""
    folder = Path(setting.folder)
    checkpoint = _weights(folder)
    file = folder / f"model.{kind}"
    text = run_program(
        setting, "export.py", "--ckpt", str(checkpoint), "--format", kind, "--output", str(file)
    )
    print(text)
    details = {"export.py": text.splitlines()}
    size = f"{file.stat().st_size / 2**20:.1f} MB"
    if kind == "air":
        return Finding(f"{size}; {last_line(text)}", details=details)
    exact, found = _classify(setting, checkpoint, "CPU"), _classify(setting, file, device)
    difference = max(
        abs(exact[name][label] - found.get(name, {}).get(label, math.inf))
        for name in exact
        for label in exact[name]
    )
    limit = ON_CPU if device == "CPU" else ON_CARD
    return Finding(
        f"{size}; probabilities of {len(exact)} images differ by {difference:.1e}",
        f"<= {limit:.0e}", difference <= limit, details=details,
    )  # fmt: skip


def _classify(setting: Setting, model: Path, device: str) -> dict[str, dict[int, float]]:
    """Return what infer.py finds on the digits: by image, the probability of each class."""
    from src.data.samples import write_samples

    folder = Path(setting.folder)
    digits, output = folder / "digits", folder / f"predictions-{model.name}.json"
    if not digits.exists():
        write_samples(digits)
    run_program(
        setting, "infer.py", "--model", str(model), "--input", str(digits), "--top_k", "10",
        "--json", str(output), "--runtime.device", device,
    )  # fmt: skip
    entries = json.loads(output.read_text())
    return {e["file"]: {top["label"]: top["probability"] for top in e["top"]} for e in entries}


def _weights(folder: Path) -> Path:
    """Write random weights with a run's configuration beside them."""
    from src.build import build_model
    from src.config_io import CONFIG, load_config, save_config
    from src.splits import open_split, resolve_classes
    from src.weights import save_weights

    checkpoint = folder / "export" / "weights.ckpt"
    if not checkpoint.exists():
        checkpoint.parent.mkdir()
        config = load_config(RECIPE)
        config = resolve_classes(config, open_split(config, "val"))
        save_config(config, checkpoint.with_name(CONFIG))
        save_weights(build_model(config), checkpoint)
    return checkpoint
