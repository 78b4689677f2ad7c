"""npu_run and npu_environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ascend_sim import RankResult, npu_environment

NpuRun = Callable[..., list[RankResult]]


def doubled(value: int) -> dict[str, object]:
    on_device = torch.tensor([value * 2], device=f"npu:{os.environ.get('RANK', '0')}")
    return {"value": on_device.cpu(), "rank": os.environ.get("RANK"), "world": os.environ.get("WORLD_SIZE")}


def fails() -> None:
    print("on the way")
    raise KeyError("lost")


def hangs() -> None:
    print("hanging", flush=True)
    threading.Event().wait()


def test_every_rank_returns_its_value(npu_run: NpuRun) -> None:
    results = npu_run(doubled, 21, nproc=2)

    assert [result.value["rank"] for result in results] == ["0", "1"]
    assert [result.value["world"] for result in results] == ["2", "2"]
    assert all(result.value["value"].item() == 42 for result in results)


def test_a_single_process_is_no_rank(npu_run: NpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    [result] = npu_run(doubled, 1)

    assert result.value["rank"] is None


def test_a_failure_shows_output_and_traceback(npu_run: NpuRun) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 0 ended with 1.*on the way.*KeyError: 'lost'"):
        npu_run(fails)


def test_a_hang_is_ended(npu_run: NpuRun) -> None:
    with pytest.raises(AssertionError, match=r"(?s)not all ranks ended within 6 s.*hanging"):
        npu_run(hangs, timeout=6)


def test_a_function_that_cannot_travel_is_refused(npu_run: NpuRun) -> None:
    with pytest.raises(ValueError, match="at the top level of a module"):
        npu_run(lambda: None)


def test_a_script_gets_its_command_line(npu_run: NpuRun, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, torch, torch_npu\nprint(sys.argv[1:], torch.ones(2, device='npu:2').device)")
    [result] = npu_run(script, "--epochs", 3, devices=3, cwd=tmp_path)

    assert "['--epochs', '3'] npu:2" in result.output


def test_torchrun_in_the_environment(npu_run: NpuRun, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch, torch_npu, torch.distributed as dist\n"
        "rank = int(os.environ['RANK']); torch.npu.set_device(rank); dist.init_process_group('hccl')\n"
        "x = torch.ones(1, device='npu'); dist.all_reduce(x)\n"
        "print(f'sum {x.item()}', flush=True); dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=npu_environment(2), capture_output=True, text=True, check=False)

    assert done.stdout.count("sum 2.0") == 2, done.stderr


def test_without_torch_npu_nothing_is_simulated(npu_run: NpuRun) -> None:
    code = (
        "import sys, torch; print(hasattr(torch, 'npu'), any('ascendcl' in line for line in open('/proc/self/maps')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=npu_environment(2), capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["False", "False"]
