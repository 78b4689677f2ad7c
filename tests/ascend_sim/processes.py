"""npu_run: a function or a script in fresh processes on the simulated machine, one per rank."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ascend_sim.cache import ROOT
from tests.ascend_sim.environment import npu_environment
from tests.ascend_sim.forked import Forked, fork

Process = subprocess.Popen[bytes] | Forked


@dataclass(frozen=True)
class RankResult:
    """What became of one rank."""

    rank: int
    returncode: int
    """Negative: the number of the signal that ended it."""
    output: str
    """Standard output and standard error, in the order written."""
    value: Any = None
    """What the function returned."""
    error: str | None = None
    """The traceback, where the function raised."""


def npu_run(
    target: Callable[..., Any] | Path | str,
    *args: Any,
    devices: int = 2,
    nproc: int = 1,
    env: Mapping[str, object] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
    check: bool = True,
) -> list[RankResult]:
    """Run `target` once per rank and wait for all of them.

    Args:
        target: A function of an importable module, or the path of a script.
        *args: Its arguments; those of a script are its command line.
        devices: Simulated NPUs that every rank sees.
        nproc: Ranks. With more than one, RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT
            are set.
        env: Further environment variables.
        cwd: The working directory; the repository by default.
        timeout: Seconds after which all ranks are killed, which is an AssertionError.
        check: Whether a rank that fails is an AssertionError.

    Returns:
        One result per rank, in order.
    """
    with tempfile.TemporaryDirectory(prefix="npu_run-") as name:
        folder = Path(name)
        command = _command(target, args, folder)
        port = free_ports(1)[0]
        ranks = []
        try:
            for rank in range(nproc):
                variables = npu_environment(devices, rank_variables(rank, nproc, port) | dict(env or {}))
                ranks.append(
                    start(
                        [*command, str(rank)] if callable(target) else command,
                        variables,
                        folder / f"output-{rank}",
                        cwd,
                    )
                )
            late = not _wait(ranks, timeout)
        finally:
            for process in ranks:
                end(process)
        results = [_result(rank, process, folder) for rank, process in enumerate(ranks)]
    failed = [result for result in results if result.returncode or result.error]
    if late or (check and failed):
        what = f"not all ranks ended within {timeout:g} s" if late else "failed"
        raise AssertionError(f"npu_run of {target}: {what}\n" + "\n".join(map(_describe, results if late else failed)))
    return results


def rank_variables(rank: int, nproc: int, port: int) -> dict[str, object]:
    """What torchrun would set, on one node; nothing for a single process."""
    if nproc == 1:
        return {}
    world = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, **world}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def start(command: list[str], variables: Mapping[str, str], output: Path, cwd: Path | None = None) -> Process:
    """Start a process in a session of its own, so that `end` reaches what it starts itself."""
    forked = fork(command, variables, output, cwd or ROOT)
    if forked is not None:
        return forked
    with output.open("wb") as file:
        return subprocess.Popen(
            command,
            env=variables,
            cwd=cwd or ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: Process) -> None:
    """Kill what is left of the process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _command(target: Callable[..., Any] | Path | str, args: tuple[Any, ...], folder: Path) -> list[str]:
    if not callable(target):
        return [sys.executable, str(target), *map(str, args)]
    if "<" in target.__qualname__ or target.__module__ == "__main__":
        raise ValueError(
            f"npu_run takes a function at the top level of a module, not {target.__module__}.{target.__qualname__}"
        )
    job = {"module": target.__module__, "name": target.__qualname__, "args": args}
    (folder / "job").write_bytes(pickle.dumps(job))
    return [sys.executable, "-m", "tests.ascend_sim.rank", str(folder)]


def _wait(ranks: list[Process], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    try:
        for process in ranks:
            process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return False
    return True


def _result(rank: int, process: Process, folder: Path) -> RankResult:
    output = (folder / f"output-{rank}").read_text(errors="replace")
    answer = folder / f"answer-{rank}"
    value, error = pickle.loads(answer.read_bytes()) if answer.exists() else (None, None)
    return RankResult(rank, process.returncode, output, value, error)


def _describe(result: RankResult) -> str:
    text = f"--- rank {result.rank} ended with {result.returncode}\n{result.output[-6000:]}"
    return text if result.error is None or result.error in text else f"{text}\n{result.error}"
