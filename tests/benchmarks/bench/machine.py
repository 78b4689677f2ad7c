"""The machine that figures belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured.

    Attributes:
        cpu: The model of the processor.
        cores: How many of its cores this process may use.
        capability: The vector instructions that torch uses.
        load: The load averages of the last minute, before and after; above 1 per core, others were running.
        torch: The version of torch.
        python: The version of Python.
        commit: The commit of the working tree, with ``+`` if files differ from it.
        date: When the measurement began, in UTC.
    """

    cpu: str
    cores: int
    capability: str
    load: list[float]
    torch: str
    python: str
    commit: str
    date: str

    @classmethod
    def this(cls) -> Machine:
        """Return the one that this runs on."""
        return cls(
            cpu=_cpu(),
            cores=cores(),
            capability=torch.backends.cpu.get_cpu_capability(),
            load=[round(os.getloadavg()[0], 1)],
            torch=torch.__version__,
            python=platform.python_version(),
            commit=_commit(),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        )

    def __str__(self) -> str:
        load = " to ".join(map(str, self.load))
        return (
            f"{self.cpu}, {self.cores} cores, {self.capability}, torch {self.torch}, Python {self.python}, "
            f"commit {self.commit}, {self.date} UTC, load {load}"
        )


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")
