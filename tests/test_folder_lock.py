"""The lock on an output folder."""

import errno
import fcntl

import pytest

from src.errors import UserError
from src.folder_lock import MARK, lock_folder


def test_the_lock_has_no_race(tmp_path):
    """Who opened the file before its holder removed it must not hold a lock that nobody sees."""
    folder = tmp_path / "run"
    folder.mkdir()
    real, opened = fcntl.flock, []

    def flock(file, how):
        """The first holder ends, and another one begins, between opening and locking."""
        if not opened:
            opened.append(file)
            (folder / ".lock").unlink()
            other = open(folder / ".lock", "w")  # noqa: SIM115 - held until the end
            print(MARK, end="", file=other, flush=True)
            opened.append(other)
            real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return real(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with (
            pytest.raises(UserError, match="another run is using"),
            lock_folder(folder),
        ):
            pass
    opened[1].close()
    with lock_folder(folder), pytest.raises(UserError, match="another run"), lock_folder(folder):
        pass
    assert folder.exists() and not list(folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"\xff of another program"])
def test_another_programs_file_stays(tmp_path, content):
    """It is locked all the same, as versions do that use the name without a mark."""
    (tmp_path / ".lock").write_bytes(content)
    with lock_folder(tmp_path):
        with pytest.raises(UserError, match="another run"), lock_folder(tmp_path):
            pass
        assert (tmp_path / ".lock").read_bytes() == content
    assert (tmp_path / ".lock").read_bytes() == content


def test_the_file_of_a_killed_run_is_removed(tmp_path):
    with lock_folder(tmp_path):
        left = (tmp_path / ".lock").read_bytes()
    (tmp_path / ".lock").write_bytes(left)
    with lock_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_leaves_no_empty_folder(tmp_path):
    with pytest.raises(KeyError), lock_folder(tmp_path / "a/b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with lock_folder(tmp_path / "a/b"):
        (tmp_path / "a/b/file").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["file"]


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    """As Lustre mounted without `-o flock`."""

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run/file").write_text("")
    assert "this file system has no locks" in caplog.text and (tmp_path / "run/file").exists()
