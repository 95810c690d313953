"""The shell scripts: clean, and honest about an interpreter that can't do."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_an_interpreter_that_cannot_do_is_refused(tmp_path):
    """A copy of the scripts with a Python that has no MindSpore and is too old."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    old = tmp_path / "python3.7"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(old)}
    command = ["bash", str(tmp_path / "scripts/quickstart.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not Python 3.9 to 3.12" in done.stderr
    assert not Path(tmp_path / ".venv").exists()


def interpreter(path, version, mindspore=False):
    """A stand-in for Python of a version, perhaps with all packages, that prints its words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\ncase "$2" in\n"import mindspore"*) exit {int(not mindspore)};;\n'
        f"*print*) echo {version};;\n*exit*) exit {int(version not in ('3.10', '3.11'))};;\n"
        f'import*) exit {int(not mindspore)};;\n*) echo "ran $*";;\nesac\n'
    )
    path.chmod(0o755)
    return path


def installed(folder, version):
    """A copy of the scripts with a .venv that has all packages."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    interpreter(folder / ".venv/bin/python", version)
    interpreter(folder / ".venv/bin/pip", version)
    lists = [(folder / name).read_bytes() for name in ("requirements.txt", "requirements.txt")]
    digest = subprocess.run(["cksum"], input=b"".join(lists), capture_output=True, check=True)
    (folder / ".venv/installed-requirements.txt").write_bytes(digest.stdout)


def environment_of(folder, **variables):
    script = (
        "source scripts/environment.sh; environment requirements.txt; c=$?; echo $PYTHON; exit $c"
    )
    variables = {key: str(value) for key, value in variables.items()}
    clean = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    command = ["bash", "-c", script]
    return subprocess.run(
        command, cwd=folder, env={**clean, **variables}, capture_output=True, text=True
    )


def test_an_installed_environment_needs_no_other_interpreter(tmp_path):
    """Where python3 is too new, or gone, .venv still has its own."""
    installed(tmp_path, "3.11")
    interpreter(tmp_path / "bin/python3", "3.13")
    done = environment_of(tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python\n"), done.stderr


def test_an_environment_without_pip_is_made_anew(tmp_path):
    """As Debian leaves it where python3-venv is missing; the user then installs that."""
    installed(tmp_path, "3.11")
    (tmp_path / ".venv/bin/pip").unlink()
    (tmp_path / ".venv/machine").write_text("any\n")
    done = environment_of(tmp_path, PYTHON=interpreter(tmp_path / "python", "3.11"))
    assert done.returncode == 0 and "ran -m venv --clear .venv" in done.stdout, done.stderr
    assert (tmp_path / ".venv/machine").read_text() != "any\n"


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_a_second_script_waits_for_the_first_to_install(tmp_path):
    """Two hosts with one folder start at once; the first has made .venv, but not its pip."""
    installed(tmp_path, "3.11")
    (tmp_path / ".venv/bin/pip").unlink()
    python = interpreter(tmp_path / "python", "3.11")
    with open(tmp_path / "requirements.txt") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(environment_of, tmp_path, PYTHON=python)
        with pytest.raises(FutureTimeout):
            second.result(0.5)
        interpreter(tmp_path / ".venv/bin/pip", "3.11")
        fcntl.flock(lock, fcntl.LOCK_UN)
        done = second.result(20)
    waited = "another script is installing into .venv; waiting for it\n.venv/bin/python\n"
    assert (done.returncode, done.stdout) == (0, waited), done.stderr


@pytest.mark.parametrize("linked", [False, True])
def test_an_environment_of_the_users_is_not_replaced(tmp_path, linked):
    """As uv makes it, without pip; or a link to one that is elsewhere."""
    installed(tmp_path, "3.11")
    (tmp_path / ".venv/bin/pip").unlink()
    if linked:
        (tmp_path / ".venv/machine").write_text("any\n")
        (tmp_path / ".venv").rename(tmp_path / "elsewhere")
        (tmp_path / ".venv").symlink_to("elsewhere")
    done = environment_of(tmp_path, PYTHON=interpreter(tmp_path / "python", "3.11"))
    assert done.returncode == 2 and "was not made by this script" in done.stderr
    assert "--clear" not in done.stdout


@pytest.mark.parametrize(("version", "code"), [("3.11", 0), ("3.10", 2)])
def test_an_environment_of_another_version_is_refused(tmp_path, version, code):
    installed(tmp_path, "3.11")
    done = environment_of(tmp_path, PYTHON=interpreter(tmp_path / "python", version))
    assert done.returncode == code, done.stderr
    assert ("is Python 3.10, and .venv has 3.11; remove .venv" in done.stderr) == bool(code)


def test_an_environment_of_another_processor_is_refused(tmp_path):
    """Hosts of two kinds may share the project's folder."""
    installed(tmp_path, "3.11")
    (tmp_path / ".venv/machine").write_text("pdp11\n")
    done = environment_of(tmp_path, PYTHON=interpreter(tmp_path / "python", "3.11"))
    assert done.returncode == 2 and ".venv is for pdp11, this host is" in done.stderr
    assert (tmp_path / ".venv/bin/pip").exists()


def test_a_mindspore_that_cannot_be_imported_is_not_replaced(tmp_path):
    """As with NumPy 2 on an Ascend host: another MindSpore in .venv might not fit its CANN."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    host = tmp_path / "python"
    host.write_text(
        '#!/bin/sh\ncase "$2" in\n"import importlib"*) exit 0;;\n*prefix*) echo /usr;;\n'
        "*) echo 'ImportError: numpy.core failed' >&2; exit 1;;\nesac\n"
    )
    host.chmod(0o755)
    done = environment_of(tmp_path, PYTHON=host)
    assert done.returncode == 2 and "cannot import it (ImportError: numpy.core" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_windows_is_refused(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    interpreter(tmp_path / "bin/uname", "").write_text("#!/bin/sh\necho MINGW64_NT-10.0\n")
    done = environment_of(tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 2 and "WSL 2" in done.stderr


def test_scripts_find_their_project_and_the_interpreter_from_any_folder(tmp_path):
    """With CDPATH, which makes `cd scripts/..` go elsewhere, and PYTHON from the user's folder."""
    project, user = tmp_path / "project", tmp_path / "user"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    (tmp_path / "elsewhere/scripts").mkdir(parents=True)
    for folder, scripts in ((user, "../project/scripts"), (project, "scripts")):
        interpreter(folder / folder.name / "python", "3.11", mindspore=True)
        (folder / "photos").mkdir()
        variables = {"PYTHON": f"{folder.name}/python", "CDPATH": str(tmp_path / "elsewhere")}
        done = subprocess.run(
            ["bash", f"{scripts}/run_infer.sh", "photos", "photos"],
            cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True,
        )  # fmt: skip
        assert f"ran {project}/infer.py" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["run_infer.sh", "README.md", "docs"],
        ["run_export.sh", "-", "README.md", "air"],
        ["run_eval.sh", "-", "-", "README.md"],
        ["run_standalone_train.sh", "config/digits/cvt_nano.yaml", "-"],
    ],
)
def test_only_a_given_card_overrides_the_environments(words):
    """`--runtime.device_id 0` would beat DEVICE_ID, which chooses the card on a shared host."""
    command = ["bash", f"scripts/{words[0]}", *words[1:]]
    found = {}
    takes_card = words[0] in ("run_eval.sh", "run_standalone_train.sh")
    for more in ([], ["3"] if takes_card else ["--runtime.device_id", "3"]):
        done = subprocess.run(
            [*command, *more, "--dry_run"], cwd=ROOT, capture_output=True, text=True
        )
        found[bool(more)] = done.stdout.strip()
    assert found[False].endswith("--runtime.device Ascend")
    assert found[True] == f"{found[False]} --runtime.device_id 3"


@pytest.mark.parametrize(
    "words",
    [
        ["run_eval.sh", "-", "-", "README.md"],
        ["run_standalone_train.sh", "config/digits/cvt_nano.yaml", "-"],
    ],
)
def test_an_empty_card_is_none(words):
    """As "$ID" is where ID is not set."""
    command = ["bash", f"scripts/{words[0]}", *words[1:]]
    without, empty = (
        subprocess.run([*command, *more, "--dry_run"], cwd=ROOT, capture_output=True, text=True)
        for more in (["--data.workers=1"], ["", "--data.workers=1"])
    )
    assert without.returncode == 0 and empty.stdout == without.stdout


@pytest.mark.parametrize("word, code", [("--help", 0), ("-h", 0), ("--batch_size", 2)])
def test_the_quickstart_starts_nothing_with_arguments(word, code):
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", word], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code
    assert "handwritten digits" in done.stdout if code == 0 else "takes no arguments" in done.stderr


def test_the_quickstart_writes_its_samples(tmp_path):
    """Its one line of Python, as it stands in the script; the folder's name is no part of it."""
    text = (ROOT / "scripts/quickstart.sh").read_text()
    (words,) = re.findall(r'"\$PYTHON" (-c ".*)$', text, re.M)
    folder = tmp_path / "it's'); import os; os.abort() #"
    environment = {**os.environ, "PYTHON": sys.executable, "digits": str(folder)}
    subprocess.run(["bash", "-c", f'"$PYTHON" {words}'], cwd=ROOT, env=environment, check=True)
    assert len(list(folder.glob("*.png"))) == 10


@pytest.mark.parametrize(("version", "numpy"), [("2.7.1", "numpy<2"), ("2.9.0", "numpy")])
def test_packages_beside_a_mindspore_bring_no_numpy_that_it_cannot_use(tmp_path, version, numpy):
    """A stand-in for the interpreter of an Ascend host: MindSpore is there, jsonargparse is not."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mindspore.py").write_text(f"__version__ = '{version}'\n")
    host = tmp_path / "python"
    host.write_text(
        f'#!/bin/sh\ncase $1$2 in\n-mpip) shift; echo "$*" >{tmp_path}/asked; exit;;\n'
        f'*jsonargparse*) exit 1;;\nesac\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n'
    )
    host.chmod(0o755)
    script = "source scripts/environment.sh; environment requirements.txt; echo $PYTHON"
    environment = {**os.environ, "PYTHON": str(host)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == str(host), done.stdout + done.stderr
    asked = (tmp_path / "asked").read_text().split()
    assert numpy in asked and "jsonargparse[signatures]" in asked
    assert not any(word.startswith("mindspore") for word in asked)


def test_scripts_keep_their_line_endings_on_windows():
    """With Windows line endings bash finds no command."""
    names = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    command = ["git", "check-attr", "eol", "--", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    assert all(line.endswith(": eol: lf") for line in done.stdout.splitlines())


def test_an_export_lies_where_export_py_puts_it(tmp_path):
    """Beside the checkpoint, also of a run's folder: the shell does not make up a name."""
    (tmp_path / "lr0.1").mkdir()
    script = ["bash", str(ROOT / "scripts/run_export.sh"), "-", "./lr0.1", "mindir", "--dry_run"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--ckpt ./lr0.1 --format mindir" in done.stdout and "--output" not in done.stdout
