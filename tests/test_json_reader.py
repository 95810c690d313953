"""JSON files of a stranger's: refused as invalid, in little time and memory."""

import json
import os

import pytest

from src.json_reader import read_json


def test_a_file_is_read(tmp_path):
    file = tmp_path / "a.json"
    content = {"é": [1, 2.5, None, True, ["x"]]}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    size = file.stat().st_size
    assert read_json(file) == read_json(str(file), size) == content
    with pytest.raises(ValueError, match="has more than 0 MiB"):
        read_json(file, size - 1)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[" * 200_000 + "]" * 200_000])
def test_deep_nesting_is_invalid(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="nested too deep"):
        read_json(tmp_path / "a.json")


def test_a_device_a_pipe_and_a_folder_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nowhere")
