"""The measured process for our own code; see `tools.benchmark.protocol`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from src.config import Config
from src.config_io import load_config
from src.device import log_to, prepare_environment, setup
from src.errors import UserError
from tools.benchmark.protocol import Work, serve

STEPS = 100_000  # in the schedule; more than any measurement takes
MATMUL_SIZE = 2048


def make(job: dict) -> Work:
    """Prepare a job; its recipe is in the file job["config_file"]."""
    if job["mode"] == "predictor":
        return predictor(job)
    prepare_environment()
    log_to()
    import mindspore

    from src.build import uses_compiled

    config = load_config(Path(job["config_file"]))
    config.runtime.compiled_ops = job.get("compiled_ops", config.runtime.compiled_ops)
    device, _ = setup(config.runtime)
    work = WORKS[job["mode"]](config, job)
    compiled = job["mode"] in ("infer", "train") and uses_compiled(config.runtime)
    return dataclasses.replace(
        work,
        what=f"{work.what}MindSpore {mindspore.__version__}" + ", compiled operators" * compiled,
        facts={**work.facts, "device": device},
    )


def infer(config: Config, job: dict) -> Work:
    """Run the network as eval.py does."""
    from src.build import accelerate, build_model
    from src.evaluation.evaluator import inference

    run = inference(accelerate(build_model(config), config.runtime))
    images = _noise(job)
    return Work(lambda: len(run(images)), "")


def predictor(job: dict) -> Work:
    """Run `Predictor` on a checkpoint in a plain Python process, without any set-up."""
    os.environ.pop("OMP_WAIT_POLICY", None)  # set by the parent process
    import mindspore

    from src.build import build_model
    from src.deploy import Predictor
    from src.weights import save_weights

    file = Path(job["config_file"])
    weights = file.with_name("weights.ckpt")
    save_weights(build_model(load_config(file)), weights)
    predict = Predictor(weights, file, job["batch_size"])
    images = _noise(job)
    facts = {"device": mindspore.get_context("device_target")}
    what = f"Predictor, MindSpore {mindspore.__version__}"
    return Work(lambda: len(predict.logits(images)), what, facts)


def infer_file(config: Config, job: dict) -> Work:
    """Run an exported file as infer.py does."""
    from src.deploy.engines import open_model

    path = Path(job["model_file"])
    run = open_model(path, job["engine"], job["threads"])
    images = _noise(job)
    try:
        classes = run(images).shape[1]
    except Exception as error:  # many types of MindSpore's and onnxruntime's
        raise UserError(
            f"--model_file {path}: does not accept images {list(images.shape)}; give the "
            "file's --batch_size and --model.image_size, or export it with --batch_size dynamic"
        ) from error
    if classes != job["num_classes"]:
        raise UserError(
            f"--model_file {path}: has {classes} classes, the network "
            f"{job['num_classes']}; give the file's --model.name and --model.num_classes"
        )
    return Work(lambda: len(run(images)), f"{path.name} in {run.engine}, written by ")


def train(config: Config, job: dict) -> Work:
    """Run the training step of train.py on one batch repeatedly."""
    from mindspore import Tensor

    from src.data import ArraySource
    from src.distributed import SINGLE_PROCESS
    from src.training.setup import build_training
    from src.training.train_loader import TrainLoader

    batch, accumulate = job["batch_size"], config.training.accumulate
    config.training.epochs = max(config.training.epochs, STEPS)  # of one step each
    config.training.epoch_steps = None  # else the schedule would be that many times longer
    classes = config.model.num_classes
    labels = np.arange(batch * accumulate, dtype=np.int32) % classes
    blank = np.zeros((len(labels), 1, 1, 3), np.uint8)
    names = [str(label) for label in range(classes)]
    loader = TrainLoader(config, ArraySource(blank, labels, names, "noise"), SINGLE_PROCESS)
    setup = build_training(config, SINGLE_PROCESS, loader, None)
    setup.set_train()
    pixels = np.random.default_rng(0).integers(256, size=(batch, *job["image_size"], 3))
    images, labels = Tensor(pixels.astype(np.uint8)), Tensor(labels[:batch])
    boxes = [Tensor(np.zeros((batch, 4), np.int32))] * setup.step.preprocess.erasing

    def step() -> int:
        for part in range(accumulate):
            result = setup.step.run_batch(images, labels, loader.draw_mixing(0, part), part, *boxes)
        loss = float(result[0].asnumpy())
        if not np.isfinite(loss) and not setup.step.dynamic:
            raise UserError(f"the loss is {loss}: lower optimizer.lr")
        return batch * accumulate

    return Work(step, "")


def data(config: Config, job: dict) -> Work:
    """Run passes of train.py's pipeline over images spread evenly over the training split."""
    from src.data.loader import resolve_num_workers
    from src.distributed import SINGLE_PROCESS
    from src.splits import open_split
    from src.training.train_loader import TrainLoader

    source = open_split(config, "train")
    if not len(source):
        raise UserError(f"{source.title}: contains no images; add some")
    spread = np.arange(job["images"]) * len(source) // job["images"]
    source = source.subset(spread)
    loader = TrainLoader(config, source, SINGLE_PROCESS)
    passes = iter(range(STEPS))

    def step() -> int:
        batches = loader.batches(next(passes)).iterate()
        return sum(len(labels) for _, labels, *_ in batches)

    return Work(step, "", {"workers": resolve_num_workers(config.data.workers)})


def matmul(_: Config, job: dict) -> Work:
    """Multiply large float32 matrices, the machine's best case; one product counts as an image."""
    from mindspore import Tensor, ops

    square = Tensor(np.random.default_rng(0).random((MATMUL_SIZE,) * 2, np.float32))

    def step() -> int:
        ops.matmul(square, square).asnumpy()
        return 1

    return Work(step, f"matmul {MATMUL_SIZE} x {MATMUL_SIZE} float32 in ")


def _noise(job: dict) -> np.ndarray:
    shape = (job["batch_size"], 3, *job["image_size"])
    return np.random.default_rng(0).standard_normal(shape, np.float32)


WORKS = {function.__name__: function for function in (infer, infer_file, train, data, matmul)}


if __name__ == "__main__":
    serve(make)
