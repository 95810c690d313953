"""The figures of docs/deploy.md: what a deployed CvT differs by, needs, and how fast it is.

    python -m tests.deploy.measure OUTPUT [--photos FOLDER] [--only PART ...]

Prints the tables and appends every result to OUTPUT/results.jsonl; started again with the same
OUTPUT it goes on behind what is there. FOLDER is an image folder with val/<class>/*.jpg; without
it `photos` is left out, and `folder` makes its photographs of noise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.deploy.operators import profile, profile_table
from tests.deploy.photographs import make_photographs

ROOT = Path(__file__).resolve().parents[2]
SIZES = {  # what each network is compared at; its files are written for the first
    "cvt_nano": ((32, 32), (48, 64)),
    "cvt_13": ((224, 224), (192, 256)),
    "cvt_21": ((224, 224), (160, 192)),
}
COLUMNS = {
    "fused": "fused network, two sizes",
    "mindir_fused": "MINDIR file to fused net",
    "mindir_checkpoint": "MINDIR file to checkpoint",
    "onnx_checkpoint": "ONNX file to checkpoint",
    "compiled": "checkpoint in compiled operators",
}
PARTS = ("formats", "photos", "digits", "folder", "speed")
FORMATS = ("mindir", "onnx")
BATCHES = (1, 3, 16)  # of a file that takes any number
ROUNDS = 11  # of the speed, the first of which compiles
FILES, EARLY, LATE = 1000, 144, 960  # photographs, and how many are done when memory is read
LIMITS = {"fused": 1e-4, "mindir_checkpoint": 1e-5, "onnx_checkpoint": 1e-4, "compiled": 1e-4}
# What must hold; differences of logits whose standard deviation is 1, or shares.
HOLDS = {
    "formats": lambda r: all(np.max(r[column]) <= limit for column, limit in LIMITS.items()),
    "photos": lambda r: r["of_range"] <= 1 / 255 and set(r["agreeing"].values()) == {r["images"]},
    "digits": lambda r: set(r["correct"].values()) == {r["eval"]},
    "folder": lambda r: r["code"] == 0 and r["late_mb"] <= 1.05 * r["early_mb"],
    "speed": lambda r: r["logits"] <= 1e-4,
}


def run(name: str, *words: object) -> None:
    """Run an executable of the repository as a user would."""
    subprocess.run([sys.executable, str(ROOT / name), *map(str, words)], check=True)


def exported(checkpoint: Path, kind: str) -> Path:
    """What export.py writes of a run's checkpoint for any batch size, once."""
    path = checkpoint.parents[1].with_suffix(f".{kind}")
    if not path.exists():
        words = ("--ckpt", checkpoint, "--output", path, "--format", kind)
        run("export.py", *words, "--batch_size", "dynamic")
    return path


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest, as a plain number."""
    return float(np.abs(one - other).max())


def noise(count: int, size: tuple[int, int]) -> np.ndarray:
    """Images float32 [count, 3, H, W]."""
    return np.random.default_rng(0).standard_normal((count, 3, *size)).astype(np.float32)


def measure_formats(name: str, output: Path) -> dict:
    """Largest differences of a network's forms, weights and statistics as in the golden data."""
    from mindspore import Tensor

    from src.build import accelerate
    from src.config import RuntimeConfig
    from src.deploy.engines import open_model
    from src.deploy.fuse import fuse
    from src.deploy.writers import installed_engines, write_model
    from tools.check_device.golden import official

    def network():
        return official.model({"model": name, "seed": 0})

    net, size = network(), SIZES[name][0]
    inference, images = fuse(net), noise(max(BATCHES), size)
    small = noise(2, SIZES[name][1])
    expected, fused = (each(Tensor(images)).asnumpy() for each in (net, inference))
    figures = {
        "std": float(expected.std()),
        "fused": [
            difference(fused, expected),
            difference(inference(Tensor(small)).asnumpy(), net(Tensor(small)).asnumpy()),
        ],
    }
    compiled = accelerate(network(), RuntimeConfig())(Tensor(images)).asnumpy()
    figures["compiled"] = difference(compiled, expected)
    for kind in FORMATS:
        to_fused, to_checkpoint = [], []
        for batch in (1, None):
            path = output / f"{name}.{kind}"
            write_model(net, (batch, 3, *size), path, kind)
            for engine in installed_engines(kind):
                opened = open_model(path, engine)
                for count in BATCHES if batch is None else (1,):
                    found = opened(images[:count])
                    to_fused.append(difference(found, fused[:count]))
                    to_checkpoint.append(difference(found, expected[:count]))
            path.unlink()
        figures |= {f"{kind}_fused": max(to_fused), f"{kind}_checkpoint": max(to_checkpoint)}
    return figures


def flower_run(output: Path, photos: Path) -> Path:
    """A checkpoint of cvt_13 whose classes all occur among the photographs."""
    from mindspore import Tensor

    from src.build import build_preprocessing
    from src.config_io import load_config, save_config
    from src.data import create_eval_loader
    from src.splits import open_split, resolve_classes
    from src.weights import save_weights
    from tools.check_device.golden import official

    checkpoint = output / "flowers" / "checkpoints" / "best.ckpt"
    if checkpoint.exists():
        return checkpoint
    config = load_config(ROOT / "config/imagefolder/cvt_13_224.yaml")
    config.data.path = str(photos.resolve())
    source = open_split(config, "val")
    config = resolve_classes(config, source)
    net = official.model({"model": "cvt_13", "seed": 0, "num_classes": config.model.num_classes})
    operations = build_preprocessing(config).operations(source.encoded)
    batches = create_eval_loader(source, operations, 10).iterate(output_numpy=True)
    logits = np.concatenate([net(Tensor(images)).asnumpy() for images, _ in batches])
    # Random weights prefer a class whatever they see; agreement on it would mean nothing.
    net.head.bias.set_data(net.head.bias - Tensor(logits.mean(0)))
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    save_config(config, output / "flowers" / "config.yaml")
    save_weights(net, checkpoint)
    return checkpoint


def measure_photos(output: Path, photos: Path) -> dict:
    """Inputs and classes of a Predictor against those of the evaluation, held-out photographs."""
    from src.config_io import load_config
    from src.data import create_eval_loader
    from src.deploy import Predictor
    from src.evaluation.evaluator import evaluate_checkpoint
    from src.splits import open_split

    checkpoint = flower_run(output, photos)
    files = [exported(checkpoint, kind) for kind in FORMATS]
    config = load_config(output / "flowers" / "config.yaml")
    result, _ = evaluate_checkpoint(config, str(checkpoint), keep_outcomes=True)
    expected = result.outcomes.prediction.astype(int)
    source = open_split(config, "val")
    paths = [source.describe(k) for k in range(len(source))]
    agreeing, differences = {}, None
    for path in (*files, checkpoint):
        predict = Predictor(path)
        if differences is None:
            operations = predict.preprocessing.operations(source.encoded)
            batches = create_eval_loader(source, operations, len(source)).iterate(output_numpy=True)
            inputs = np.stack([predict.prepare(each) for each in paths])
            differences = np.abs(inputs - next(batches)[0])
        labels = [ranked[0].label for ranked in predict(paths, top_k=1)]
        agreeing[path.suffix] = int((np.array(labels) == expected).sum())
    mean = float(differences.mean())
    return {
        "images": len(paths), "classes": len(set(expected.tolist())), "agreeing": agreeing,
        "largest": float(differences.max()), "mean": mean, "of_range": mean * max(config.data.std),
    }  # fmt: skip


def digits_run(output: Path) -> Path:
    """The best checkpoint of two epochs on the digits."""
    checkpoint = output / "digits" / "checkpoints" / "best.ckpt"
    if not checkpoint.exists():
        shutil.rmtree(output / "digits", ignore_errors=True)
        recipe = ROOT / "config" / "digits" / "cvt_nano.yaml"
        keys = ["--training.epochs=2", "--model.embed_dims=[8,16,32]", "--model.depths=[1,1,1]"]
        run("train.py", "--config", recipe, "--output", output / "digits", *keys)
    return checkpoint


def measure_digits(output: Path) -> dict:
    """Right answers among the held-out digits: eval.py's, and a loop's over a Predictor."""
    from src.config_io import load_config
    from src.deploy import Predictor
    from src.splits import open_split

    checkpoint = digits_run(output)
    run("eval.py", "--ckpt", checkpoint, "--json", output / "digits.json")
    figures = json.loads((output / "digits.json").read_text())
    source = open_split(load_config(output / "digits" / "config.yaml"), "val")
    images, labels = zip(*(source[k] for k in range(len(source))))
    files = [exported(checkpoint, kind) for kind in FORMATS]
    correct = {}
    for path in (*files, checkpoint):
        results = Predictor(path)(images, top_k=1)
        correct[path.suffix] = sum(r[0].label == int(y) for r, y in zip(results, labels))
    right = round(figures["top1"] / 100 * figures["images"])
    return {"images": figures["images"], "eval": right, "correct": correct}


def measure_folder(output: Path, photos: Path | None) -> dict:
    """infer.py on a folder of mixed photographs: its exit code and its memory on the way."""
    import psutil

    model = exported(digits_run(output), "mindir")
    folder = output / "photographs"
    shutil.rmtree(folder, ignore_errors=True)
    make_photographs(folder, FILES, photos)
    command = [sys.executable, str(ROOT / "infer.py"), "--model", str(model)]
    command += ["--input", str(folder), "--json", str(output / "folder.json")]
    began, memory = time.time(), {}
    with open(output / "folder.err", "w") as err, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=err, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as job:  # fmt: skip
        lines = (line for line in job.stdout if line.startswith(str(folder)))
        for done, _ in enumerate(lines, 1):
            if done in (EARLY, LATE):
                memory[done] = psutil.Process(job.pid).memory_info().rss / 1e6
    seconds = time.time() - began
    entries = json.loads((output / "folder.json").read_text())
    shutil.rmtree(folder)
    return {
        "images": len(entries), "errors": sum("error" in each for each in entries),
        "code": job.returncode, "early_mb": memory[EARLY], "late_mb": memory[LATE],
        "seconds": seconds,
    }  # fmt: skip


def measure_speed(output: Path) -> dict:
    """Fused against unfused MINDIR, in turn: medians of the rounds' ratios."""
    from mindspore import Tensor, export

    from src.deploy.engines import open_model
    from src.deploy.fuse import fuse
    from tools.check_device.golden import official

    net = official.model({"model": "cvt_13", "seed": 0})
    images, runs, profiles = noise(16, (224, 224)), [], []
    for name, each in (("unfused", net), ("fused", fuse(net))):
        path = output / f"{name}.mindir"
        export(each, Tensor(images), file_name=str(path), file_format="MINDIR")
        runs.append(open_model(path))
        with multiprocessing.get_context("spawn").Pool(1, setup) as pool:
            profiles.append(pool.apply(profile, (path, images)))
    seconds, logits = np.zeros((ROUNDS, 2, 2)), [None, None]  # [..., wall and processor]
    for turn in range(ROUNDS):
        for k, forward in enumerate(runs):
            start = np.array([time.perf_counter(), time.process_time()])
            logits[k] = forward(images)
            seconds[turn, k] = np.array([time.perf_counter(), time.process_time()]) - start
    ratios = np.median(seconds[1:, 0] / seconds[1:, 1], axis=0)
    best = 16 / seconds[1:, :, 0].min(axis=0)
    return {
        "ratio": float(ratios[0]), "processor_ratio": float(ratios[1]), "rounds": ROUNDS - 1,
        "best_images_per_second": best.tolist(), "logits": difference(*logits),
        "profiles": profiles,
    }  # fmt: skip


def tables(results: list[dict]) -> str:
    """The figures as docs/deploy.md has them."""
    table = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    others = []
    for r in results:
        if r["part"] == "formats":
            first, second = (f"{h}" if h == w else f"{h}x{w}" for h, w in SIZES[r["name"]])
            cells = [f"{np.max(r[column]):.1e}" for column in COLUMNS]
            table.append(f"| `{r['name']}`, {first} and {second} px | {' | '.join(cells)} |")
        else:
            shown = [k for k in r if k not in ("part", "name", "profiles")]
            others += ["", f"{r['part']}: {', '.join(f'{k} {r[k]}' for k in shown)}"]
            others += profile_table(*r["profiles"]) if "profiles" in r else []
    return "\n".join(table + others)


def broken(results: list[dict]) -> list[str]:
    """The results that do not hold."""
    return [f"{r['part']} {r['name']}".strip() for r in results if not HOLDS[r["part"]](r)]


def setup() -> None:
    """As the executables do."""
    from src import device
    from src.config import RuntimeConfig

    device.prepare_environment()
    device.log_to()
    device.setup(RuntimeConfig(seed=0))


def main() -> None:
    """Measure what is asked for and not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    output, photos = arguments.output.resolve(), arguments.photos
    output.mkdir(parents=True, exist_ok=True)
    file, results = output / "results.jsonl", []
    if file.exists():
        results = [json.loads(line) for line in file.read_text().splitlines()]
    setup()
    todo = [(measure_formats, name, output) for name in SIZES]
    todo += [(measure_photos, output, photos)] if photos else []
    todo += [(measure_digits, output), (measure_folder, output, photos), (measure_speed, output)]
    done = {(r["part"], r["name"]) for r in results}
    for measure, *given in todo:
        part = measure.__name__.removeprefix("measure_")
        name = given[0] if part == "formats" else ""
        if part in arguments.only and (part, name) not in done:
            results.append({"part": part, "name": name, **measure(*given)})
            with open(file, "a") as stream:
                stream.write(json.dumps(results[-1]) + "\n")
            print(json.dumps(results[-1]), flush=True)
    print(tables(results))
    faults = broken(results)
    sys.exit(f"does not hold: {', '.join(faults)}" if faults else 0)


if __name__ == "__main__":
    main()
