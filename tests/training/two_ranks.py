"""Twenty steps of one of two ranks, each of which sees the gradients' norm a little differently.

Prints the checksum of everything that would be saved. The updates are plain: the ranks agree on the
norm before any update, so compiled ones get the same.
"""

import zlib

from src.device import prepare_environment

prepare_environment()

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402

from src.distributed import join  # noqa: E402
from src.models import create_model  # noqa: E402
from src.training.loss import LabelSmoothingCrossEntropy  # noqa: E402
from src.training.optimizer import AdamW  # noqa: E402
from src.training.train_step import TrainStep  # noqa: E402

STEPS = 20
SIZES = {"depths": (1,), "width": 8, "num_classes": 10}


class NoisyStep(TrainStep):
    """A step on a device whose reductions round in an order of their own."""

    def gradient_norm(self, gradients):
        return self.updates.gradient_norm(gradients) * self.noise


def main() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    ranks = join()
    ms.set_seed(1)
    net = create_model("resnet_nano", **SIZES)
    ranks.broadcast(net.get_parameters())
    step = NoisyStep(
        net, LabelSmoothingCrossEntropy(0.1), AdamW(net.trainable_params()),
        np.full(STEPS, 1e-2, np.float32), clip_norm=0.1, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip
    step.noise = ms.Tensor(1 + 1.2e-7 * ranks.rank, ms.float32)
    step.set_train(True)
    rng = np.random.default_rng(ranks.rank)
    for _ in range(STEPS):
        images = ms.Tensor(rng.standard_normal((4, 3, 32, 32)).astype(np.float32))
        loss, norm = step.run_batch(images, ms.Tensor(rng.integers(0, 10, 4).astype(np.int32)))
    checksum = 0
    for parameter in step.get_parameters():
        checksum = zlib.crc32(parameter.asnumpy(), checksum)
    print(f"checksum {checksum} loss {float(loss.asnumpy())!r} norm {float(norm.asnumpy())!r}")


if __name__ == "__main__":
    main()
