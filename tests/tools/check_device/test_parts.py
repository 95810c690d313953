"""What the checks are made of: the command line, the table, limits, profiles."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from src import distributed
from src.deploy import writers
from src.errors import UserError
from tests.conftest import ROOT
from tools.check_device import limits, table
from tools.check_device.__main__ import parse, select_checks
from tools.check_device.checks import programs
from tools.check_device.checks.speed import PROFILED, forms, summarise
from tools.check_device.checks.training import last_line
from tools.check_device.compare import by_largest, by_norm, check_limits
from tools.check_device.registry import CHECKS, Finding, NotHere, Setting
from tools.check_device.runner import FAILED, NOT_HERE, PASSED, Result, run_checks


def test_checks_have_names_of_their_own_and_processes_that_follow_each_other():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    processes = [check.process for check in CHECKS]
    runs = [p for p, before in zip(processes, [None, *processes]) if p != before]
    assert len(runs) == len(set(runs))
    for process in runs:
        kinds = {(c.runtime, c.uses_device) for c in CHECKS if c.process == process}
        assert len(kinds) == 1, process


def test_only_the_named_checks_run_and_full_ones_when_asked():
    assert [check.name for check in select_checks(["AdamW"], False)] == ["environment", "AdamW"]
    assert {check.name for check in select_checks(None, True)} - {
        check.name for check in select_checks(None, False)
    } == {"late rank", "speed by form"}
    with pytest.raises(UserError, match="'Adam': no such check; choose from environment, "):
        select_checks(["Adam"], False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rank", "2"], "unknown key rank: did you mean ranks?"),
        (["--device", "NPU"], "invalid choice: 'NPU'"),
        (["--ranks", "1"], "--ranks 1: give 2, 3, 4, 6 or 8, or leave"),
        (["--ranks", "5"], "--ranks 5: give 2, 3, 4, 6 or 8, or leave"),
        (["--report", "/"], "--report /: is a folder"),
    ],
)
def test_wrong_options_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        parse(argv)


def test_onnx_is_not_checked_where_no_engine_is_installed(monkeypatch, tmp_path):
    """As after scripts/check_device.sh in a new clone: requirements.txt has none."""
    monkeypatch.setattr(writers, "installed_engines", lambda file_format: [])
    with pytest.raises(NotHere, match="neither onnxruntime nor OpenVINO"):
        programs.onnx(Setting("CPU", 0, False, str(tmp_path), []))


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ({0: 0.6, 1: 0.4}, True),
        ({0: 0.6 + 1e-6, 1: 0.4 - 1e-6}, True),
        ({0: 0.61, 1: 0.39}, False),
        ({0: 0.4, 1: 0.6}, False),
        ({0: 0.6}, False),  # a class is missing
    ],
)
def test_a_file_that_predicts_otherwise_than_its_weights_fails(
    monkeypatch, tmp_path, found, passed
):
    def program(setting, name, *words):
        if name == "export.py":
            Path(words[-1]).touch()
            return "exported\n"
        model, output = (Path(words[words.index(option) + 1]) for option in ("--model", "--json"))
        each = {0: 0.6, 1: 0.4} if model.suffix == ".ckpt" else found
        top = [{"label": label, "probability": value} for label, value in each.items()]
        output.write_text(json.dumps([{"file": "a.png", "top": top}]))
        return ""

    monkeypatch.setattr(programs, "run_program", program)
    monkeypatch.setattr(programs, "_weights", lambda folder: folder / "weights.ckpt")
    finding = programs.mindir(Setting("CPU", 0, False, str(tmp_path), []))
    assert finding.passed == passed and "1 images differ" in finding.measured


def test_the_checks_run_without_the_variables_of_a_cluster(monkeypatch, tmp_path):
    """With NODE_NUM=2, a job of the checks waits for another host."""
    cluster = {
        *distributed._OF_MSRUN, *distributed._OF_OTHERS, "NODE_NUM", "NODE_RANK", "MASTER_ADDR",
        "MASTER_PORT", "RANK_TABLE_FILE", "RANK_ID", "LOCAL_WORLD_SIZE", "MS_NODE_ID",
        "OMPI_COMM_WORLD_RANK", "PMIX_RANK",
    }  # fmt: skip
    kept = {"HCCL_EXEC_TIMEOUT", "MS_COMPILER_CACHE_PATH", "SLURM_JOB_ID"}
    for name in cluster | kept:
        monkeypatch.setenv(name, "2")
    worker = [sys.executable, "-c", "import os; print(*os.environ)"]
    (result,) = run_checks([check()], Setting("CPU", 0, False, str(tmp_path), worker))
    assert (cluster | kept) & set(result.log.split()) == kept


def test_a_device_that_is_not_here_fails_the_first_check_and_ends(tmp_path):
    command = [sys.executable, str(ROOT / "tools/check_device/__main__.py"), "--device", "Ascend"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "finds only" in done.stdout and "likely cause: the installation" in done.stdout
    assert "the other checks did not run" in done.stdout
    assert not list(tmp_path.iterdir())


def check(name="AdamW"):
    return next(each for each in CHECKS if each.name == name)


def test_a_line_for_each_outcome():
    passed = Result(check(), PASSED, Finding("1e-7", "1e-5"), 2.04)
    absent = Result(check(), NOT_HERE, Finding("the kernel is Ascend's"), 0.1)
    finding = Finding("1e-2", "1e-5", False, "outside: weight", {"worst": [float("nan")]})
    failed = Result(check(), FAILED, finding, 3.0, "log")
    assert table.line(passed).split() == ["AdamW", "1e-7", "1e-5", "2.0", "ok"]
    assert table.line(absent).split(maxsplit=1) == ["AdamW", "not here: the kernel is Ascend's"]
    first, *rest = table.line(failed).splitlines()
    assert first.endswith("FAILED") and "    likely cause: the Adam kernel" in rest[0]
    assert rest[-1] == "    outside: weight"
    assert table.summary([passed, absent, failed], 6.0) == (
        "3 checks: 1 ok, 1 not here, 1 FAILED; 0.1 minutes"
    )
    report = table.report([passed, absent, failed], "CPU")
    assert not report["passed"] and report["checks"][2]["log"] == "log"
    json.dumps(report, allow_nan=False)
    assert table.report([passed, absent], "CPU")["passed"]


def test_the_worst_difference_for_its_limit_is_shown():
    finding = check_limits({"a": 0.5, "b": 0.01}, {"a": 1.0, "b": 0.001})
    assert (finding.measured, finding.allowed, finding.passed) == ("1.0e-02 (b)", "0.001", False)
    assert "b" in finding.hint and check_limits({"a": 0.5}, 1.0).passed
    assert (
        not check_limits({"a": float("nan")}, 1.0).passed and check_limits({"a": 0.0}, 0.0).passed
    )


def test_differences_that_are_not_finite_are_infinite():
    right = np.array([1.0, -4.0])
    assert by_largest(np.array([1.0, -4.4]), right) == pytest.approx(0.1)
    assert by_norm(np.array([1.0, -4.0]), right) == 0
    for wrong in (np.array([np.nan, 1]), np.array([np.inf, 1]), np.array([1.0])):
        assert by_largest(wrong, right) == by_norm(wrong, right) == float("inf")


def rounded(bits, largest=np.inf):
    """A product by 1 on a device that keeps so many bits behind the first."""

    def product(value):
        step = 2.0 ** (np.floor(np.log2(value)) - bits)
        result = np.round(value / step) * step
        return np.array([result if result < largest else np.inf], np.float32)

    return product


@pytest.mark.parametrize(
    ("bits", "largest", "device", "kind"),
    [
        (23, np.inf, "CPU", limits.CPU),
        (23, np.inf, "Ascend", limits.CARD),
        (10, np.inf, "Ascend", limits.HF32),
        (10, 65520, "Ascend", limits.FLOAT16),
        (7, np.inf, "Ascend", limits.BFLOAT16),
    ],
)
def test_the_arithmetic_is_recognised(bits, largest, device, kind, monkeypatch):
    monkeypatch.setattr(limits, "current_device", lambda: device)
    assert limits._kind(rounded(bits, largest)) == kind


def test_limits_follow_the_coarser_of_device_and_network(monkeypatch):
    monkeypatch.setattr(limits, "arithmetic", lambda: limits.HF32)
    assert limits.limit("logits") == 5e-3
    assert limits.limit("logits", "float16") == 2e-2
    monkeypatch.setattr(limits, "arithmetic", lambda: limits.BFLOAT16)
    assert limits.limit("logits", "float16") == 1e-1


def test_a_profile_of_a_card_names_what_runs_on_the_host(tmp_path):
    """The tables as MindSpore 2.8 writes them for Ascend."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/kernel_details.csv").write_text(
        "Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us)\n"
        "x,MatMulV2,AI_CORE,1,4000,0\ny,MatMulV2,AI_CORE,2,4000,0\nz,RightShift,AI_CPU,3,1000,0\n"
    )
    (tmp_path / "a/cpu_op_detail_info_0.csv").write_text(
        "op_side,op_type,op_name,full_op_name,op_occurrences,op_total_time(ms),op_avg_time(ms)\n"
        "Host,Cast,Cast-op1,Default/Cast-op1,3,0.5,0.2\n"
    )
    found = summarise(tmp_path)
    assert found["slowest kernels"]["MatMulV2 (AI_CORE)"] == 8 / PROFILED
    assert found["kernels on the host"] == {"Cast": 0.5 / PROFILED, "RightShift": 1 / PROFILED}


def test_a_form_that_does_not_finish_leaves_the_others(monkeypatch, tmp_path):
    def run(command, **options):
        if json.loads(command[-1])["form"] == "shifts":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 0, '{"images_per_second": 3.5}\n', "")

    monkeypatch.setattr(subprocess, "run", run)
    found = forms(Setting("CPU", 1, True, str(tmp_path), []))
    assert found.measured == "fastest: O0, conv, 3.5 img/s" and not found.passed
    assert found.hint == "; ".join(f"O{k}, shifts: not finished after 1200 s" for k in (0, 1))
    assert [*found.details["by level and form"]] == ["O0, conv", "O1, conv"]


def test_the_last_error_is_told_before_what_is_logged_behind_it():
    text = "RuntimeError: Launch kernel failed\n\n  File x\n[INFO] DISTRIBUTED Start] success!\n"
    assert last_line(text) == "RuntimeError: Launch kernel failed"
    assert last_line("usage\n[INFO] Start]\n") == "usage" and last_line("\n") == "no message"


def test_a_report_replaces_only_a_report(tmp_path):
    """And the advised --force exists."""
    foreign, own = tmp_path / "package.json", tmp_path / "check.json"
    foreign.write_text('{"name": "x"}')
    own.write_text(json.dumps(table.report([], "CPU")))
    with pytest.raises(UserError, match="package.json: exists and is not .* add --force"):
        parse(["--report", str(foreign)])
    assert parse(["--report", str(foreign), "--force"]).report == str(foreign)
    assert parse(["--report", str(own)]).report == str(own)
