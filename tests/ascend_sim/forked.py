"""Processes that are forked from one that has imported the libraries: the side that asks for them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.ascend_sim.cache import ROOT

# Read by the simulated runtime, by torch and by the tests when they are needed: they may be set after the imports.
_LATE = {
    *("SIM_NPU", "SIM_NPU_MEM", "SIM_NPU_JOB", "SIM_HCCL_BLIND", "SIM_HCCL_TIMEOUT", "COLUMNS"),
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}


class Forked:
    """A process, as far as `subprocess.Popen` is needed here."""

    def __init__(self, warm: Warm, pid: int) -> None:
        self._warm, self.pid = warm, pid

    @property
    def returncode(self) -> int | None:
        """As of the last look at it."""
        status = self._warm.ended.get(self.pid)
        return None if status is None else os.waitstatus_to_exitcode(status)

    def poll(self) -> int | None:
        """The exit code, or None as long as it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while (code := self._look(min(0.2, max(0, deadline - time.monotonic())))) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def _look(self, seconds: float) -> int | None:
        if self.returncode is None:
            self._warm.listen(seconds)
        return self.returncode


class Warm:
    """The process that forks (`warm.py`); it ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.ended: dict[int, int] = {}
        self._started: list[int] = []
        self._rest = b""
        self._lock = threading.Lock()
        self._answers, answers = os.pipe()  # what is imported prints as well
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ascend_sim.warm", str(answers)],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[answers],
            start_new_session=True,
        )
        os.close(answers)

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: Path, folder: Path) -> Forked:
        """Start `python -m MODULE ARGUMENTS`, in a session of its own."""
        module, *arguments = command
        job = {"module": module, "arguments": arguments, "environment": dict(environment)}
        line = json.dumps({**job, "output": str(output), "folder": str(folder)})
        with self._lock:
            assert self._process.stdin
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            while not self._started:
                self._read(60)
            return Forked(self, self._started.pop())

    def listen(self, seconds: float) -> None:
        """Hear which processes have ended, for so long at most."""
        with self._lock:
            self._read(seconds)

    def _read(self, seconds: float) -> None:
        if not select.select([self._answers], [], [], seconds)[0]:
            return
        received = os.read(self._answers, 1 << 16)
        if not received:
            raise EOFError("the process that forks has ended")
        *lines, self._rest = (self._rest + received).split(b"\n")
        for message in map(json.loads, lines):
            if "started" in message:
                self._started.append(message["started"])
            else:
                self.ended[message["ended"]] = message["status"]


_running: list[Warm] = []


def fork(command: Sequence[str], environment: Mapping[str, str], output: Path, folder: Path) -> Forked | None:
    """Start a Python module from the process that has the libraries.

    Returns:
        None where only a new process can run the command: it is another one, it needs variables that are read by
        imports, or the libraries cannot be imported, of which a new process tells more.
    """
    if list(command[:2]) != [sys.executable, "-m"] or command[2] not in ("pytest", "tests.ascend_sim.rank"):
        return None
    early = {name: value for name, value in environment.items() if name not in _LATE}
    if not _running:
        _running.append(Warm(early))
    try:
        return _running[0].start(command[2:], environment, output, folder) if _running[0].environment == early else None
    except (EOFError, BrokenPipeError):
        return None
