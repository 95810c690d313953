"""Atomic writers: links, permissions, failures, early checks."""

import json
import os
import stat

import pytest

from src.errors import UserError
from src.files import (
    is_csv,
    is_json,
    remove_unfinished,
    replacing,
    replacing_together,
    require_replaceable,
    require_writable,
    write_csv,
    write_json,
)


@pytest.mark.parametrize("broken", [1, 2])
def test_files_that_belong_together_are_replaced_together(tmp_path, monkeypatch, broken):
    """A disk that fails while either is flushed leaves both old ones."""
    targets = tmp_path / "a.json", tmp_path / "a.mindir"
    for target in targets:
        target.write_text("old")
    flush, calls = os.fsync, []

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) == broken:
            raise OSError(5, "Input/output error")
        flush(descriptor)

    def write():
        with replacing_together(*targets) as unfinished:
            for each in unfinished:
                each.write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            write()
    assert [target.read_text() for target in targets] == ["old", "old"]
    write()
    assert [target.read_text() for target in targets] == ["new", "new"]
    assert len(os.listdir(tmp_path)) == 2


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("path", ["a.txt", "sub/a.txt"])
def test_a_failure_names_the_users_file(tmp_path, monkeypatch, path):
    """Not the temporary one; also where one write is inside another."""
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(FileNotFoundError, match=f"^.Errno 2. No such file or directory: '{path}'$"),
        replacing(path) as unfinished,
    ):
        unfinished.open()
    with (
        pytest.raises(FileNotFoundError, match=f"directory: 'missing' -> '{path}'$"),
        replacing(path) as unfinished,
    ):
        os.replace("missing", unfinished)
    with (
        pytest.raises(UserError, match=f"^{path}: disk full: {path}$"),
        replacing(path) as outer,
        replacing(outer) as inner,
    ):
        raise UserError(f"{outer}: disk full: {inner}")


def test_planted_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    for name in (".a.json.partial", ".a.json.partial-x", "a.json"):
        (tmp_path / name).symlink_to(victim)
    write_json([1], tmp_path / "a.json")
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert not (tmp_path / "a.json").is_symlink()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_the_permissions(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a") as unfinished:
            unfinished.write_text("x")
            unfinished.chmod(0o400)  # as MindSpore leaves its files
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_parent_folders_are_created(tmp_path):
    write_json({"é": 1}, tmp_path / "a/b/c.json")
    assert json.loads((tmp_path / "a/b/c.json").read_text("utf-8")) == {"é": 1}


def test_a_name_that_is_no_utf8_is_escaped(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    write_csv(["file"], [[name]], tmp_path / "a.csv")
    write_json([name], tmp_path / "a.json")
    assert (tmp_path / "a.csv").read_text("utf-8") == "file\ncaf\\udce9.jpg\n"
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == [name]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".last.ckpt.partial-abc").mkdir()
    (tmp_path / ".last.ckpt.partial-abc" / "last.ckpt").write_text("half")
    (tmp_path / "step-1.ckpt").write_text("whole")
    (tmp_path / ".last.ckpt.json.partial-abc").mkdir()
    remove_unfinished(tmp_path, "last.ckpt", "step-*.ckpt")
    assert sorted(os.listdir(tmp_path)) == [".last.ckpt.json.partial-abc", "step-1.ckpt"]
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["step-1.ckpt"]


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    require_writable(tmp_path / "new/folders/a.json", "--json")
    with pytest.raises(UserError, match=r"--json .*: is a folder; give a file"):
        require_writable(tmp_path, "--json")
    with pytest.raises(UserError, match=r"--json .*file is not a folder"):
        require_writable(tmp_path / "file/a.json", "--json")
    assert os.listdir(tmp_path) == ["file"]


def test_a_device_is_no_output(tmp_path):
    with pytest.raises(UserError, match="--json /dev/null: is not a regular file"):
        require_writable("/dev/null", "--json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"):
        require_writable(tmp_path / "pipe", "--json")


def ours(path):
    return is_json(path, lambda content: {"top1", "loss"} <= content.keys())


@pytest.mark.parametrize(
    "text",
    ["a,b\n1,2\n", "[1]", "7", '"top1 loss"', '{"top1": 1}', "[" * 100_000, "\0", "\ufeff{}"],
)
def test_a_file_of_the_users_is_not_replaced(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match="--json .*not an earlier result of this command.*--force"):
        require_replaceable(path, "--json", ours)
    require_replaceable(path, "--json", ours, force=True)
    assert path.read_text() == text


def test_an_earlier_result_may_be_replaced(tmp_path):
    require_replaceable(tmp_path / "new/a.json", "--json", ours)
    write_json({"top1": 1, "loss": 2, "images": 3}, tmp_path / "a.json")
    require_replaceable(tmp_path / "a.json", "--json", ours)
    (tmp_path / "empty").touch()
    require_replaceable(tmp_path / "empty", "--json", ours)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not an earlier result"):
        require_replaceable(tmp_path / "dangling", "--json", ours)
    write_csv(["class", "images, all"], [[1, 2]], tmp_path / "a.csv")
    assert is_csv(tmp_path / "a.csv", ["class", "images, all"])
    assert is_csv(tmp_path / "a.csv", ["class"]) and not is_csv(tmp_path / "a.csv", ["name"])
