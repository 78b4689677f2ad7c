"""A process with simulated devices that has imported the libraries, and forks whenever another one is wanted.

Every line on stdin is a job, as JSON. The file descriptor that is its argument tells who was started, {"started": id},
and who has ended, {"ended": id, "status": as of os.wait}. What is forked becomes `python -m MODULE ARGUMENTS`.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import sys
from typing import Any


def import_libraries() -> None:
    """What the processes have in common; not at the top, for torch_npu is not where the suite itself runs."""
    import lightning.pytorch  # noqa: F401
    import pytest  # noqa: F401
    import torch_npu  # noqa: F401

    import amct_lightning.public  # noqa: F401


def settle_threads_after_forks() -> None:
    """Let the first thread of a forked process replace the thread pool of torch, which a fork leaves unusable.

    torch does so when the pool is asked for next. In a backward pass several threads ask at once, and whoever comes in
    between finds none: "Invalid thread pool!".
    """
    import torch

    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


def tell(answers: int, **message: int) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")


def next_job(answers: int) -> dict[str, Any] | None:
    """Fork for every job; returns with it in the new process, and without one when no more will come."""
    woken, wakes = os.pipe()
    for end in (woken, wakes):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    rest = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 1024)
            _tell_who_has_ended(answers)
        if 0 in readable:
            received = os.read(0, 1 << 16)
            if not received:
                return None
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                process = os.fork()
                if not process:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for file in (woken, wakes, answers):
                        os.close(file)
                    return json.loads(line)
                tell(answers, started=process)


def _tell_who_has_ended(answers: int) -> None:
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not process:
            return
        tell(answers, ended=process, status=status)


def become(job: dict[str, Any]) -> None:
    """Take over what a new process would have been given, and run the module."""
    os.setsid()
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.path[0] = job["folder"]
    sys.argv[1:] = job["arguments"]
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    answers = int(sys.argv.pop())
    import_libraries()
    settle_threads_after_forks()
    gc.collect()
    gc.freeze()  # or every process would soon copy what it has in common with the others
    job = next_job(answers)
    if job is not None:
        become(job)
