"""A progress bar on terminals; nothing is shown if the output goes to a file."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(images: int, title: str) -> tqdm:
    """Create a bar that counts images and shows img/s and the time left."""
    return tqdm(
        total=images,
        desc=title,
        unit=" img",
        dynamic_ncols=True,
        leave=False,
        disable=sys.stderr is None or not sys.stderr.isatty(),  # None: closed by the caller
    )
