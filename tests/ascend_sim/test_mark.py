"""The mark `npu` and its process, seen from outside: pytest on small test files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ascend_sim.cache import ROOT
from tests.ascend_sim.plugin import require

Pytest = Callable[..., str]


@pytest.fixture
def run_pytest(tmp_path: Path) -> Pytest:
    """Runs pytest on the text of a test file; returns what it prints."""

    def run(text: str, *options: str, **env: str) -> str:
        (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.ascend_sim.plugin"]\n')
        (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
        (tmp_path / "test_it.py").write_text(f"import os, pytest\n{text}")
        command = [sys.executable, "-m", "pytest", "-v", "-rA", "-p", "no:cacheprovider", *options]
        environment = {"PYTHONPATH": str(ROOT)} | {k: v for k, v in os.environ.items() if k != "CI"} | env
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        ).stdout

    return run


def _outcomes(output: str) -> dict[str, str]:
    return dict(re.findall(r"^test_it\.py::(\S+) ([A-Z]+)", output, re.MULTILINE))


OUTCOMES = """
import torch
PIDS = "pids"

@pytest.mark.npu
def test_first(tmp_path): open(PIDS, "w").write(str(os.getpid()))

@pytest.mark.npu
def test_same_process(): assert open(PIDS).read() == str(os.getpid())

@pytest.mark.npu(fresh=True)
def test_fresh(): assert open(PIDS).read() != str(os.getpid())

@pytest.mark.npu
def test_fails():
    print("printed before")
    assert torch.npu.device_count() == 77

@pytest.mark.npu
def test_skips(): pytest.skip("not today")

@pytest.mark.npu
@pytest.mark.xfail(reason="known")
def test_xfails(): assert False

@pytest.mark.npu
@pytest.mark.xfail(raises=OSError)
def test_fails_otherwise(): assert False

@pytest.fixture
def broken(): raise RuntimeError("in the fixture")

@pytest.mark.npu
def test_setup_error(broken): pass

@pytest.mark.npu
@pytest.mark.timeout(2)
def test_hangs():
    import time
    time.sleep(60)

@pytest.mark.npu
def test_crashes(): os.abort()

def test_ordinary(): assert not hasattr(torch, "npu")

@pytest.mark.npu(env={"GREETING": "hello"}, devices=5)
def test_env(): assert os.environ["GREETING"] == "hello" and torch.npu.device_count() == 5

@pytest.mark.npu
def test_after_the_crash(): assert torch.npu.device_count() == 2
"""


def test_outcomes_are_those_of_the_other_process(run_pytest: Pytest) -> None:
    require()
    output = run_pytest(OUTCOMES)

    assert _outcomes(output) == {
        "test_first": "PASSED",
        "test_same_process": "PASSED",
        "test_fresh": "PASSED",
        "test_fails": "FAILED",
        "test_skips": "SKIPPED",
        "test_xfails": "XFAIL",
        "test_fails_otherwise": "FAILED",
        "test_setup_error": "ERROR",
        "test_hangs": "FAILED",
        "test_crashes": "FAILED",
        "test_ordinary": "PASSED",
        "test_env": "PASSED",
        "test_after_the_crash": "PASSED",
    }
    for text in ("printed before", "assert 2 == 77", "not today", "in the fixture", "Timeout (>2.0s)", "ended with -6"):
        assert text in output


RANKS = """
import torch

@pytest.mark.npu(nproc=2)
def test_one_fails():
    torch.npu.set_device(int(os.environ["RANK"]))
    torch.distributed.init_process_group("hccl")
    if os.environ["RANK"] == "1": raise ValueError("no wish to go on")
    torch.distributed.all_reduce(torch.ones(2, device="npu"))

@pytest.mark.npu(nproc=2)
@pytest.mark.parametrize("time", [1, 2])
def test_next(time):
    torch.npu.set_device(int(os.environ["RANK"]))
    torch.distributed.init_process_group("hccl")
    total = torch.ones(2, device="npu")
    torch.distributed.all_reduce(total)
    assert total.tolist() == [2, 2]
"""


def test_a_rank_that_fails_fails_the_test_and_not_the_next(run_pytest: Pytest) -> None:
    require()
    output = run_pytest(RANKS)

    assert _outcomes(output) == {"test_one_fails": "FAILED", "test_next[1]": "PASSED", "test_next[2]": "PASSED"}
    assert "no wish to go on" in output
    assert "rank 1 of 2" in output


ONE = "@pytest.mark.npu\ndef test_one(): pass\n"


def test_a_skip_says_what_is_missing(run_pytest: Pytest, tmp_path: Path) -> None:
    output = run_pytest(ONE, PATH=str(tmp_path))

    assert _outcomes(output) == {"test_one": "SKIPPED"}
    assert "no simulated NPUs: the simulated Ascend runtime is built with gcc, which was not found" in output


def test_with_ci_a_skip_is_a_failure(run_pytest: Pytest, tmp_path: Path) -> None:
    output = run_pytest(ONE, PATH=str(tmp_path), CI="true")

    assert _outcomes(output) == {"test_one": "ERROR"}
    assert "which was not found" in output


def test_a_wheel_that_cannot_be_fetched_is_a_skip_that_says_so(run_pytest: Pytest, tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nno-index = true\n")
    output = run_pytest(ONE, ASCEND_SIM_CACHE=str(tmp_path / "cache"), PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))

    assert _outcomes(output) == {"test_one": "SKIPPED"}
    assert "the wheel torch_npu==2.13.0 could not be fetched. It takes a network connection once" in output


def test_a_wrong_argument_is_an_error(run_pytest: Pytest) -> None:
    output = run_pytest("@pytest.mark.npu(device=2)\ndef test_one(): pass\n")

    assert "device" in output
    assert "PASSED" not in output
