"""The fault campaign: runs that are killed, stopped and damaged at random, and must lose nothing.

    python -m tests.faults.campaign OUTPUT [--seed 0] [--kills 50] [--stops 20] [--rank_kills 10]
        [--flips 500] [--truncations 100] [--key=value ...]

Prints a table and writes every single result to OUTPUT/results.jsonl; started again with the same
OUTPUT it goes on behind what is there. Each number is the number of faults of that kind. Keys of
the recipe take the place of SIZES, for another network or a shorter run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("kills", "stops", "rank_kills", "flips", "truncations")
RECIPE = "config/digits/cvt_nano.yaml"
# Small, with everything random on, and a state every third step, so that many faults hit a save.
KEYS = [
    "--model.drop_path_rate=0.2", "--augment.mixup=0.8", "--augment.cutmix=1.0",
    "--augment.hflip=0.5", "--data.workers=1", "--training.ema_decay=0.9",
    "--training.save_every=3", "--evaluation.batch_size=500",
]  # fmt: skip
SIZES = [
    "--model.embed_dims=[8,16,32]", "--model.depths=[1,1,2]", "--data.train_images=2000",
    "--training.epochs=4",
]  # fmt: skip
TIMING = ("images_per_second", "seconds")


def train(folder: Path, ranks: int, *more: str) -> list[str]:
    """The command of a run on one or two ranks; both take 100 images a step."""
    keys = [*KEYS, f"--training.batch_size={100 // ranks}", "--output", str(folder), *more]
    if ranks == 1:
        return [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / RECIPE), *keys]
    script = ROOT / "scripts" / "run_distribute_train.sh"
    return ["bash", str(script), RECIPE, "-", str(ranks), *keys]


def start(folder: Path, ranks: int, sizes: list[str]) -> subprocess.Popen:
    """Start a run, or go on with it where it has a state."""
    more = [*sizes]
    if any((folder / "checkpoints").glob("step-*.ckpt")):
        more.append("--resume")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "DEVICE_TARGET": "CPU", "PYTHON": sys.executable}
    environ["MASTER_PORT"] = str(port)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.out", "a") as out:
        return subprocess.Popen(
            train(folder, ranks, *more), env=environ, stdout=out, stderr=out, start_new_session=True
        )


def outcome(folder: Path) -> dict:
    """What a finished run is judged by: every weight, average and moment, and every figure."""
    from src.weights.checkpoint import read_checkpoint

    last = read_checkpoint(folder / "checkpoints" / "last.ckpt").tensors
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt").tensors
    tensors = {f"last {n}": t.tobytes() for n, t in last.items() if n != "progress"}
    tensors |= {f"best {n}": t.tobytes() for n, t in best.items()}
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in row.items() if k not in TIMING} for row in rows]
    return {**tensors, "figures": figures}


class Campaign:
    """Faults of every kind, their results kept in a file."""

    def __init__(self, output: Path, seed: int, sizes: list[str] = SIZES) -> None:
        self.output = output
        self.seed = seed
        self.sizes = sizes
        self.file = output / "results.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        self.results = []
        if self.file.exists():
            self.results = [json.loads(line) for line in self.file.read_text().splitlines()]

    def done(self, kind: str) -> int:
        """How many faults of a kind there were."""
        return sum(result["kind"] == kind for result in self.results)

    def note(self, kind: str, good: bool, **more: object) -> None:
        """Keep a result."""
        self.results.append({"kind": kind, "good": good, **more})
        with open(self.file, "a") as file:
            file.write(json.dumps(self.results[-1]) + "\n")

    def reference(self, ranks: int) -> Path:
        """The run that nobody disturbs, made once; its time is kept beside it."""
        folder = self.output / f"reference{ranks}"
        stamp = self.output / f"reference{ranks}.seconds"
        if not stamp.exists():
            shutil.rmtree(folder, ignore_errors=True)
            began = time.time()
            if start(folder, ranks, self.sizes).wait() != 0:
                raise SystemExit(f"the undisturbed run failed, see {folder}.out")
            stamp.write_text(str(time.time() - began))
        return folder

    def disturb(self, kind: str, count: int, ranks: int, number: int) -> None:
        """Signals at random moments of as many runs as it takes; each run must end equal."""
        expected = outcome(self.reference(ranks))
        seconds = float((self.output / f"reference{ranks}.seconds").read_text())
        attempt = 0  # a run may end before it is hit, and must not be drawn the same again
        while self.done(kind) < count:
            turn, attempt = self.done(kind), attempt + 1
            rng = random.Random(f"{self.seed} {kind} {turn} {attempt}")
            folder = self.output / f"{kind}{turn}"
            shutil.rmtree(folder, ignore_errors=True)
            faults = []
            while True:
                job = start(folder, ranks, self.sizes)
                if len(faults) + turn < count and self._wait(job, folder, seconds, rng):
                    fault = self._strike(job, number, ranks, rng)
                    if fault["code"]:
                        faults.append(fault)
                        continue
                code = job.wait()  # 0 behind a signal too: the run was at its end
                break
            if code != 0:
                raise SystemExit(f"a resumed run failed with {code}, see {folder}.out")
            found = outcome(folder)
            different = [name for name in expected if found.get(name) != expected[name]]
            for fault in faults:
                self.note(kind, not different and fault["good"], different=different[:5], **{
                    name: value for name, value in fault.items() if name != "good"
                })  # fmt: skip
            print(f"{kind}: {self.done(kind)} of {count}, different: {different[:3]}", flush=True)
            if not different:
                shutil.rmtree(folder)

    def _wait(
        self, job: subprocess.Popen, folder: Path, seconds: float, rng: random.Random
    ) -> bool:
        """Wait for a random moment; whether the run is still there then.

        Every second moment lies behind the first state that this run saves, in its steps, saves and
        evaluations; the others anywhere, for half of so small a run is the start and compiling.
        """
        moment = rng.uniform(0.1, 0.8) * seconds
        if rng.random() < 0.5:
            began, last = time.time(), folder / "checkpoints" / "last.ckpt"
            while job.poll() is None and not (last.exists() and last.stat().st_mtime >= began):
                time.sleep(0.01)
            moment = rng.uniform(0.0, 0.3) * seconds
        try:
            job.wait(moment)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _strike(self, job: subprocess.Popen, number: int, ranks: int, rng: random.Random) -> dict:
        """Send the signal; with more ranks to a random one of them."""
        began = time.time()
        if ranks == 1:
            os.kill(job.pid, number)
        else:
            import psutil

            family = psutil.Process(job.pid).children(recursive=True)
            workers = [p for p in family if p.environ().get("MS_ROLE") == "MS_WORKER"]
            (rng.choice(workers) if workers else job).send_signal(number)
        code = job.wait()
        waited = time.time() - began
        # Before the first step there is nothing to save, and the signal itself ends the process,
        # which a shell reports as 143 too.
        stopped = code in (143, -signal.SIGTERM) and waited <= 10
        good = waited < 60 if number == signal.SIGKILL else stopped
        return {"good": good, "code": code, "seconds": round(waited, 2)}

    def damage(self, kind: str, count: int) -> None:
        """Flip a bit of, or cut, a random file of a run; every reader must name it."""
        source = self.reference(1)
        files = sorted((source / "checkpoints").glob("*.ckpt"))
        files += [source / "metrics.jsonl"]
        copy = self.output / "damaged"
        for turn in range(self.done(kind), count):
            rng = random.Random(f"{self.seed} {kind} {turn}")
            file = rng.choice(files)
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy)
            hit = copy / file.relative_to(source)
            content = bytearray(hit.read_bytes())
            place = rng.randrange(len(content))
            if kind == "flips":
                content[place] ^= 1 << rng.randrange(8)
            else:
                del content[place:]
            hit.unlink()
            hit.write_bytes(bytes(content))
            self.note(kind, noticed(hit, source), file=file.name, place=place)
        shutil.rmtree(copy, ignore_errors=True)

    def table(self) -> str:
        """Counts by kind."""
        lines = ["| fault | as it must be |", "|---|---|"]
        for kind in KINDS:
            results = [result for result in self.results if result["kind"] == kind]
            if results:
                good = sum(result["good"] for result in results)
                lines.append(f"| {kind} | {good} of {len(results)} |")
        waits = [r["seconds"] for r in self.results if r["kind"] == "stops"]
        if waits:
            lines.append(f"| seconds from SIGTERM to the end, median, longest | "
                         f"{np.median(waits):.1f}, {max(waits):.1f} |")  # fmt: skip
        return "\n".join(lines)


@functools.cache
def trainer_of(run: Path):
    """A trainer as resuming would make it, for its readers."""
    from src.config_io import load_config
    from src.splits import open_split, resolve_classes
    from src.training.trainer import Trainer

    config = load_config(run / "config.yaml")
    source = open_split(config, "train")
    return Trainer(resolve_classes(config, source), source, run)


def noticed(hit: Path, whole: Path) -> bool:
    """Whether whoever reads this file of a run names it as damaged.

    hit: the damaged file; whole: the same run, undamaged.
    """
    from src.errors import UserError
    from src.training.state import metrics_match, read_state
    from src.weights import load_weights

    step = trainer_of(whole).step
    if hit.name == "metrics.jsonl":
        return not metrics_match(hit, read_state(whole / "checkpoints" / "last.ckpt").progress)
    try:
        if hit.name == "best.ckpt":
            load_weights(step.net, hit)
        else:
            read_state(hit).load(step)
    except UserError as error:
        return hit.name in str(error)
    return False


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for kind, count in zip(KINDS, (50, 20, 10, 500, 100)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    arguments, keys = parser.parse_known_args()
    sys.path.insert(0, str(ROOT))
    from src.device import prepare_environment

    prepare_environment()
    campaign = Campaign(arguments.output.resolve(), arguments.seed, keys or SIZES)
    for kind in ("flips", "truncations"):
        if getattr(arguments, kind):
            campaign.damage(kind, getattr(arguments, kind))
    for kind, ranks, number in (
        ("kills", 1, signal.SIGKILL), ("stops", 1, signal.SIGTERM),
        ("rank_kills", 2, signal.SIGKILL),
    ):  # fmt: skip
        if getattr(arguments, kind):
            campaign.disturb(kind, getattr(arguments, kind), ranks, number)
    print(campaign.table())
    sys.exit(0 if all(result["good"] for result in campaign.results) else 1)


if __name__ == "__main__":
    main()
