"""The lock on an output folder."""

import errno
import fcntl

import pytest

from src.errors import UserError
from src.folder_lock import lock_folder


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
            other = open(folder / ".lock", "a")  # noqa: SIM115 - held until the end
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
