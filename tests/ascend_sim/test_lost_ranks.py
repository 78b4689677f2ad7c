"""Ranks that end or never come: the others get an error in short time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch
from torch import distributed as dist

from tests.ascend_sim import RankResult


def _join() -> int:
    rank = int(os.environ["RANK"])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl")
    dist.all_reduce(torch.ones(2, device="npu"))
    return rank


def one_is_killed() -> str:
    if _join() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.ones(2, device="npu"))
    except RuntimeError as error:
        return str(error)
    return "no error"


def one_is_late() -> str:
    if _join() == 1:
        time.sleep(4)
        return "late"
    try:
        dist.all_reduce(torch.ones(2, device="npu"))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_rank_that_was_killed_is_named(npu_run: Callable[..., list[RankResult]]) -> None:
    survivor, killed = npu_run(one_is_killed, nproc=2, timeout=60, check=False)

    assert killed.returncode == -signal.SIGKILL
    assert "rank 1 is gone" in survivor.value + survivor.output


def test_a_rank_that_does_not_come_is_a_timeout(npu_run: Callable[..., list[RankResult]]) -> None:
    waiting, _ = npu_run(one_is_late, nproc=2, env={"SIM_HCCL_TIMEOUT": 1}, timeout=60)

    assert "1 rank(s) arrived in" in waiting.value + waiting.output
