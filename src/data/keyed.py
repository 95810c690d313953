"""Random operations whose random numbers belong to the sample, not to a thread.

MindSpore's own random operations do not serve for a chain of independent choices: within a worker
all of them are seeded alike, so two `RandomChoice` pick the same entry for each image, and every
`RandomApply(0.5)` fires exactly where `RandomHorizontalFlip(0.5)` does (MindSpore 2.8, tried).
Python's global generators would give numbers that depend on which thread comes first.
"""

from __future__ import annotations

import abc

import numpy as np


class Keyed(abc.ABC):
    """An operation on an image and its key; `loader.Batches` supplies the key.

    The numbers follow from key and `stream` alone, so they do not depend on the number of workers.
    """

    stream: int  # differs between the classes, else they would draw the same numbers
    output = "key"  # column beside the image; an operation with another one takes the key's place

    def __call__(self, image: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the changed image and the key, uint64 [2], for the next operation."""
        bits = np.random.Philox(key=key, counter=self.stream << 192)
        changed = self.change(image, np.random.Generator(bits))
        return changed if isinstance(changed, tuple) else (changed, key)

    @abc.abstractmethod
    def change(
        self, image: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the changed image, with another `output` also its value; the input stays as is."""
