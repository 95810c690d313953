"""Progress on a terminal; silent where the output goes to a file."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(images: int, title: str) -> tqdm:
    """A bar that counts images, with img/s and the time left; update it by images."""
    return tqdm(
        total=images,
        desc=title,
        unit=" img",
        dynamic_ncols=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
