"""Random image operations whose random numbers belong to the sample, not to a worker thread.

A chain of MindSpore's own random operations is not independent. Within a worker all of them have
the same seed, so two `RandomChoice` pick the same entry for each image, and `RandomApply(0.5)` acts
exactly where `RandomHorizontalFlip(0.5)` does (measured with MindSpore 2.8). Python's global
generators would depend on the order of the threads.
"""

from __future__ import annotations

import abc

import numpy as np


class PerSampleOp(abc.ABC):
    """An operation on an image and its key, which `DataLoader` provides.

    The random numbers depend only on the key and `stream`, not on the number of workers.
    """

    stream: int  # unique to each class; classes with the same stream draw the same numbers
    output = "key"  # the second output column; a subclass that sets another one replaces the key

    def __call__(self, image: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the new image and the key, uint64 [2], for the next operation."""
        bits = np.random.Philox(key=key, counter=self.stream << 192)
        result = self.apply(image, np.random.Generator(bits))
        return result if isinstance(result, tuple) else (result, key)

    @abc.abstractmethod
    def apply(
        self, image: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the new image, with its value for `output` if that is set; keep the input."""
