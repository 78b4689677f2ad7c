"""``forking.py SCRIPT ARGUMENTS``: runs an example again and again, without importing the libraries each time.

Every line on stdin is a number of seconds after which a run is killed. Its status, as of ``os.wait``, is printed.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch  # noqa: F401
import sklearn.datasets  # noqa: F401

import amct_lightning.public  # noqa: F401


def start() -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            sys.argv = sys.argv[1:]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        finally:
            os._exit(status)
    return child


def status_within(child: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    for line in sys.stdin:
        print(status_within(start(), float(line)), flush=True)
