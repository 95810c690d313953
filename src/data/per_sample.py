"""Random image operations whose random numbers belong to the sample, not to a worker thread.

A chain of MindSpore's own random operations is not independent. Within a worker all of them have
the same seed, so two `RandomChoice` pick the same entry for each image, and `RandomApply(0.5)` acts
exactly where `RandomHorizontalFlip(0.5)` does (measured with MindSpore 2.8). Python's global
generators would depend on the order of the threads.
"""

from __future__ import annotations

import abc
import threading

import numpy as np

# By the system's number of the thread. MindSpore's threads are new to Python at each call, so they
# would find an empty `threading.local`.
_of_thread: dict[int, np.random.Generator] = {}


class PerSampleOp(abc.ABC):
    """An operation on an image and its key, which `DataLoader` provides.

    The random numbers depend only on the key and `stream`, not on the number of workers.
    """

    stream: int  # unique to each class; classes with the same stream draw the same numbers
    in_reader = False  # True if passing the image to a worker costs more than the operation
    output = "key"  # the second output column; a subclass that sets another one replaces the key

    def __call__(self, image: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the new image and the key, uint64 [2], for the next operation."""
        result = self.apply(image, _generator(key, self.stream))
        return result if isinstance(result, tuple) else (result, key)

    @abc.abstractmethod
    def apply(
        self, image: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the new image, with its value for `output` if that is set; keep the input.

        `rng` is the thread's own and is set anew for the next operation: do not keep it.
        """


def _generator(key: np.ndarray, stream: int) -> np.random.Generator:
    """Return this thread's generator in the state of Philox(key=key, counter=stream << 192).

    Creating it would take 0.02 ms, because NumPy also draws a seed from the system.
    """
    generator = _of_thread.get(threading.get_ident())
    if generator is None:
        generator = np.random.Generator(np.random.Philox(0))
        _of_thread[threading.get_ident()] = generator
    generator.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": (0, 0, 0, stream), "key": key},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,  # nothing is left in the buffer
        "has_uint32": 0,
        "uinteger": 0,
    }
    return generator
