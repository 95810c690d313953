"""Figures as files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from src.errors import UserError


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON, aside first and then in one move.

    Raises:
        UserError: the file can't be written.
    """
    write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", path)


def write_csv(head: Sequence[str], rows: Iterable[Sequence[Any]], path: str | Path) -> None:
    """Write a table; letters of a file's name that are no UTF-8 are escaped.

    Raises:
        UserError: the file can't be written.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(text.getvalue().encode("utf-8", "backslashreplace").decode(), path)


def write_text(text: str, path: str | Path) -> None:
    """Write a text file; a reader sees the old one or the new one, whole.

    Raises:
        UserError: the file can't be written.
    """
    aside = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that can be written") from None
