"""How an executable reports what the user can put right."""

import subprocess
import sys

import pytest

from src.errors import UserError, executable
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
