"""How an executable reports what the user can put right."""

import pytest

from src.errors import UserError, executable


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
