"""How an executable reports what the user can put right."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from src.errors import UserError, executable, printable
from src.progress import progress_bar
from tests.conftest import ROOT


def test_a_user_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "x"])

    @executable
    def main(argv):
        raise UserError(f"{argv[0]}: is wrong; mend it")

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "train.py: error: x: is wrong; mend it\n"


def test_a_lack_of_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as caught:
        executable(lambda argv: np.empty(1 << 58))()
    assert caught.value.code == 2
    words = "train.py: error: not enough memory: Unable to allocate 2.00 EiB"
    assert capsys.readouterr().err.startswith(words)


def stale(argv):
    """As a network file system whose server has restarted."""
    raise OSError(errno.ESTALE, "Stale file handle", "run")


def test_what_the_system_refuses_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    for fault, words in (
        (lambda argv: os.stat("a" * 5000), f"{'a' * 119}…: File name too long"),
        (lambda argv: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), "No space left on device"),
        (stale, "run: Stale file handle"),
    ):
        with pytest.raises(SystemExit) as caught:
            executable(fault)()
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"train.py: error: {words}\n"
    with pytest.raises(FileNotFoundError):
        executable(lambda argv: os.stat("/nowhere/at all"))()


def test_a_system_without_some_of_linuxs_names_is_enough():
    """Macs have no EREMOTEIO; Windows, which a line refuses, no hook for forks."""
    code = (
        "import errno, os, signal\n"
        "del errno.EREMOTEIO, os.register_at_fork, signal.SIGHUP\n"
        "import src.errors, src.forks, src.training.stop_signal"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])

    @executable
    def main(argv):
        raise KeyError("fault")

    with pytest.raises(KeyError):
        main()


def test_a_reader_that_went_away_is_no_fault():
    code = "import src.errors as e; e.executable(lambda argv: [print(i) for i in range(10**5)])()"
    words = f'"{sys.executable}" -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("print(1)", "standard output: No space left on device"),
        ("raise UserError('bad')", "bad"),
    ],
)
def test_output_that_a_full_disk_does_not_take_is_an_error(last, words):
    code = (
        "from src.device import log_to, logger\n"
        "from src.errors import UserError, executable\n"
        "def main(argv):\n"
        "    log_to()\n"
        "    logger.info('started')\n"
        f"    {last}\n"
        "executable(main)()\n"
    )
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, f"-c: error: {words}\n")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault(closed, tmp_path):
    """A file must not get the number of standard error: MindSpore's C++ code prints there."""
    code = (
        "import os, sys\n"
        "from src.errors import executable\n"
        "from src.progress import progress_bar\n"
        "def main(argv):\n"
        "    with progress_bar(1, 'images') as bar, open(argv[0], 'w') as file:\n"
        "        bar.write('out')\n"
        "        print('err', file=sys.stderr)\n"
        "        os.system('echo child >&2')\n"
        "        file.write(str(file.fileno() > 2))\n"
        "executable(main)()\n"
    )
    words = f'"{sys.executable}" -c "{code}" "{tmp_path}/file" {closed}'
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("out\n" if closed == "2>&-" else "")
    assert done.stderr == ("err\nchild\n" if closed == ">&-" else "")
    assert (tmp_path / "file").read_text() == "True"


def test_a_progress_bar_without_standard_error_shows_nothing(monkeypatch):
    """As in Python code whose process has none."""
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(1, "images") as bar:
        bar.update()
    assert bar.disable


def test_text_from_files_is_safe_to_print():
    assert printable("dir/\x1b[31mred\r\n") == "dir/\\x1b[31mred\\r\\n"
    assert printable("a\u202eb\x9b\udcff") == "a\\u202eb\\x9b\\xff"
    for kept in ("狗 ñ", "می\u200cخواهم", "👩\u200d🔬", "full\u3000width", "C:\\x"):
        assert printable(kept) == kept


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "gbk"])
def test_no_letter_ends_a_program(encoding):
    code = (
        "import src.errors as e\n"
        "def main(argv):\n"
        "    print('out 狗 \\udcff')\n"
        "    raise e.UserError('caf\\udce9/狗\\x1b[2J: is wrong')\n"
        "e.executable(main)()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    dog = "狗".encode(encoding, "backslashreplace")
    assert done.returncode == 2, done.stderr
    assert done.stdout == b"out " + dog + b" \\udcff\n"
    assert done.stderr == b"-c: error: caf\\xe9/" + dog + b"\\x1b[2J: is wrong\n"
