"""The checks pass on this CPU, and each planted fault fails exactly the checks that it should."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools.check_device.registry import CHECKS, Setting
from tools.check_device.runner import FAILED, NOT_HERE, PASSED, run_checks

NAMED = {check.name: check for check in CHECKS}
OPERATORS = [check.name for check in CHECKS if check.process == "operators"]
TRAINING = [check.name for check in CHECKS if check.process == "training"]
STATE = [check.name for check in CHECKS if check.process == "state"]
two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="two CPU ranks need two cores",
)


def run(names, folder, fault=None):
    """Results by name, of a device with a fault."""
    worker = [sys.executable, "-m", "tools.check_device.worker"]
    if fault is not None:
        worker = [sys.executable, str(Path(__file__).with_name("faults.py")), fault]
    setting = Setting("CPU", 0, False, str(folder), worker)
    return {result.check.name: result for result in run_checks([NAMED[n] for n in names], setting)}


@pytest.mark.parametrize(
    ("fault", "names", "expected", "words"),
    [
        ("saturating_hash", ["random numbers", "drop path", "mixup and cutmix", "AdamW"],
         {"random numbers", "drop path"}, "do not wrap modulo 2^32"),
        ("labels_not_reversed", ["random numbers", "mixup and cutmix", "loss"],
         {"mixup and cutmix"}, "labels are not mixed with the batch in reverse order"),
        ("epsilon_of_adam", ["mixup and cutmix", "loss", "AdamW"],
         {"AdamW"}, "epsilon"),
        ("drop_path_off_by_one", ["random numbers", "drop path", "mixup and cutmix"],
         {"drop path"}, "another branch's numbers"),
        pytest.param("statistics_not_restored", TRAINING,
                     {"overflow"}, "leaves something behind", marks=pytest.mark.slow),
        pytest.param("flipped_byte", STATE, {"save and resume", "state on the CPU"},
                     "the file was changed on its way to the disk", marks=pytest.mark.slow),
        pytest.param("convolution_in_float16",
                     ["layer: token embedding", "logits float32", *TRAINING],
                     {"logits float32", "gradients", "trajectory float32", "running statistics"},
                     "forward pass", marks=pytest.mark.slow),
        pytest.param("norm_of_each_rank", ["collectives", "data parallel"], {"data parallel"},
                     "a rank updates by numbers of its own",
                     marks=[pytest.mark.slow, two_cores]),
    ],
)  # fmt: skip
def test_a_fault_fails_the_checks_that_it_should(fault, names, expected, words, tmp_path):
    results = run(names, tmp_path, fault)
    failed = {name for name, result in results.items() if result.status == FAILED}
    assert failed == expected, {name: results[name].finding for name in failed ^ expected}
    assert any(words in results[name].check.cause for name in expected)


def test_a_crash_a_failure_and_a_hang_stop_no_other_check(tmp_path):
    names = ["layer: class token", "layer: QuickGELU", "loss", "AdamW"]
    hasty = {**NAMED, "loss": dataclasses.replace(NAMED["loss"], seconds=2)}
    worker = [sys.executable, str(Path(__file__).with_name("faults.py")), "crash_and_hang"]
    results = run_checks(
        [hasty[name] for name in names], Setting("CPU", 0, False, str(tmp_path), worker)
    )
    assert [result.status for result in results] == [FAILED, FAILED, FAILED, PASSED]
    crash, failure, hang, _ = (result.finding.measured for result in results)
    assert crash == "ended early by SIGSEGV"
    assert failure == "RuntimeError" and "Traceback" in results[1].log
    assert results[1].finding.hint == "aclnnSoftmax failed"
    assert hang == "no result within 2 s"


def test_the_script_checks_this_cpu_and_writes_a_report(interpreter, tmp_path):
    """Operators, accumulated parts of a CvT, and states, from the user's folder."""
    names = [*OPERATORS, "accumulation", "logits bfloat16", "export AIR", *STATE]
    command = ["bash", str(ROOT / "scripts/check_device.sh"), "--device", "CPU", "--report",
               "check.json", "--only", *names]  # fmt: skip
    environment = {**os.environ, "PYTHON": interpreter, "HCCL_BUFFSIZE": "1", "SECRET": "s3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["passed"] and report["device"] == "CPU"
    statuses = {check["name"]: check["status"] for check in report["checks"]}
    assert list(statuses) == ["environment", *OPERATORS, "logits bfloat16", "accumulation", *STATE,
                              "export AIR"]  # fmt: skip
    assert {name for name, status in statuses.items() if status == NOT_HERE} == {
        "logits bfloat16", "export AIR"
    }  # fmt: skip
    facts = report["checks"][0]["details"]
    assert facts["versions"]["mindspore"] and facts["variables"]["HCCL_BUFFSIZE"] == "1"
    assert "SECRET" not in str(report)
    assert "not here: MindSpore has bfloat16 kernels for Ascend only" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]
