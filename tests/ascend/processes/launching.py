"""Jobs of several processes, each started by one command, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amct_lightning import QuantRecord
from tests.ascend_sim import npu_environment

_MARK = "TEST_JOB"
# What Lightning imports where it is installed and these jobs do not use: half of the time to start a process.
_UNUSED = "transformers,scipy,matplotlib"
PROGRAM = Path(__file__).with_name("launched.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@dataclass(frozen=True)
class Ended:
    """What became of a job."""

    returncode: int
    output: str
    left: list[int]
    """Processes that were still there half a minute after the one that was started."""


def script(folder: Path, *launcher: str, **options: Any) -> list[str]:
    """The command that runs `launched.py`."""
    folder.mkdir(exist_ok=True)
    return [sys.executable, *launcher, str(PROGRAM), str(folder), json.dumps(options)]


def run_job(
    command: list[str], *, env: Mapping[str, object] | None = None, cwd: Path | None = None, timeout: float = 200
) -> Ended:
    """Run a command on two simulated devices; wait for it, and for all processes that came of it."""
    mark = uuid.uuid4().hex
    variables = npu_environment(2, {_MARK: mark, "SIM_HIDE": _UNUSED, **(env or {})})
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            command,
            env=variables,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        finally:
            process.kill()
            process.wait()
            left = _wait_for(lambda: _marked(mark), 30)
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        file.seek(0)
        return Ended(process.returncode, file.read(), left)


def losses(folder: Path, rank: int) -> list[float]:
    return json.loads((folder / f"losses-{rank}.json").read_text())


def check_files(folder: Path) -> None:
    """The record is whole, there is no temporary file, and the last checkpoint has all that a run needs."""
    record = QuantRecord.load(folder / "record.txt")
    assert set(record) == {"net.0", "net.4"}
    record.validate()
    assert QuantRecord.load(folder / "last.record.txt").keys() == record.keys()
    assert not list(folder.glob(".*"))


def _marked(mark: str) -> list[int]:
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
    return found


def _wait_for(left: Callable[[], list[int]], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
