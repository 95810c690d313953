"""Checks the executables: train.py on the digits, export.py in each format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools.check_device.checks.training import last_line
from tools.check_device.registry import Finding, NotHere, Setting
from tools.check_device.runner import ROOT

RECIPE = ROOT / "config/digits/cvt_nano.yaml"
EPOCHS, LOWEST_TOP1 = 2, 70.0


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
    """Export a MINDIR file, which export.py checks, and run it on this device by infer.py."""
    return _export(setting, "mindir", "--runtime.device", setting.device)


def onnx(setting: Setting) -> Finding:
    """Export an ONNX file and run it in the installed engine."""
    from src.deploy.writers import installed_engines

    if not installed_engines("onnx"):
        raise NotHere("neither onnxruntime nor OpenVINO is installed")
    return _export(setting, "onnx")


def air(setting: Setting) -> Finding:
    """Export an AIR file for ATC."""
    if setting.device != "Ascend":
        raise NotHere("MindSpore writes AIR on Ascend only")
    return _export(setting, "air")


def _export(setting: Setting, kind: str, *words: str) -> Finding:
    """Export random weights, and classify digits with the file unless it is AIR."""
    folder = Path(setting.folder)
    checkpoint = _weights(folder)
    file = folder / f"model.{kind}"
    text = run_program(
        setting, "export.py", "--ckpt", str(checkpoint), "--format", kind, "--output", str(file)
    )
    print(text)
    size = file.stat().st_size / 2**20
    measured = f"{size:.1f} MB; {last_line(text)}"
    if kind != "air":
        from src.data.samples import write_samples

        digits = folder / "digits"
        if not digits.exists():
            write_samples(digits)
        run_program(
            setting, "infer.py", "--model", str(file), "--input", str(digits), "--json",
            str(folder / f"{kind}.json"), *words,
        )  # fmt: skip
        found = json.loads((folder / f"{kind}.json").read_text())
        measured = f"{size:.1f} MB, {len(found)} images classified"
    return Finding(measured, details={"export.py": text.splitlines()})


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
