"""Lightning's launchers, made to say which rank ended, and to leave no process behind."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from amct_lightning.ascend.devices import npu
from amct_lightning.ascend.lightning_private import BaseProcessLauncher, BaseScriptLauncher, set_num_threads
from amct_lightning.ascend.processes.lost_rank import PATIENCE, end_process

MAIN_PROCESS = "AMCT_LIGHTNING_MAIN_PROCESS"
# How long a process that ends waits for those it has started, and that know of it: they may have a file to finish.
_LONGEST_END = 30.0
_PAUSE = 0.5


class ScriptLauncher(BaseScriptLauncher):
    """Runs the script again for every further device, or joins a launched job.

    Lightning's own kills everything, without a traceback, as soon as it sees that a child has ended badly; it does
    nothing for the children if the main process ends.

    Args:
        environment: The cluster environment.
        processes: Processes on this node.
        nodes: Number of nodes.
        connected: Tells whether the ranks watch each other. As long as they do not, this launcher watches.
    """

    def __init__(
        self, environment: ClusterEnvironment, processes: int, nodes: int, connected: Callable[[], bool]
    ) -> None:
        super().__init__(environment, processes, nodes)
        self._connected = connected

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the processes and do this one's part."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[MAIN_PROCESS] = str(os.getpid())
            self._call_children_scripts()
            threading.Thread(target=self._watch_children, name="children", daemon=True).start()
        elif os.environ.get(MAIN_PROCESS, str(os.getpid())) != str(os.getpid()):
            threading.Thread(target=self._watch_main_process, name="main-process", daemon=True).start()
        set_num_threads(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except BaseException:
            if self.procs:  # after a good end they may take as long as they like
                atexit.register(_end_children, self.procs, _LONGEST_END if self._connected() else PATIENCE)
            raise

    def _watch_children(self) -> None:
        while not any(process.poll() for process in self.procs):
            if all(process.returncode == 0 for process in self.procs):
                return
            time.sleep(_PAUSE)
        unconnected = 0.0
        while unconnected < PATIENCE:
            unconnected = 0.0 if self._connected() else unconnected + _PAUSE
            time.sleep(_PAUSE)
        failed = next(index for index, process in enumerate(self.procs) if process.returncode)
        process = self.procs[failed]
        rank = self.cluster_environment.node_rank() * self.num_processes + failed + 1
        for other in self.procs:
            other.kill()
        end_process(f"Rank {rank} (process {process.pid}) {_how(process.returncode)}. All others end too.")

    def _watch_main_process(self) -> None:
        main = int(os.environ[MAIN_PROCESS])
        parent = os.getppid() == main  # else it is gone already, or has started this process through another one
        while not self._connected():
            if os.getppid() != main if parent else not _exists(main):
                end_process(
                    f"The main process ({main}) has ended before all ranks were connected. "
                    f"Rank {self.cluster_environment.global_rank()} ends too."
                )
            time.sleep(_PAUSE)


class ProcessLauncher(BaseProcessLauncher):
    """Starts processes from this one (spawn, fork, forkserver); fork only while no device is in use."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the processes and wait for them."""
        if self._start_method in ("fork", "forkserver") and npu().is_initialized():
            raise RuntimeError(
                f"start_method='{self._start_method}' cannot be used after this process has used an NPU: a forked "
                f"process cannot initialise it again. Use start_method='popen' (the default) or 'spawn', or do "
                f"nothing on the NPU before trainer.fit()."
            )
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except ProcessException as error:
            self._add_rank(error)
            raise
        except BaseException:
            self._interrupt_children()
            raise

    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        # A fork leaves torch's pool of threads unusable, and whoever asks for it next makes a new one. In a backward
        # pass the threads of all devices ask at once, and one that comes in between ends with "Invalid thread pool!".
        torch.set_num_threads(torch.get_num_threads())
        # Lightning tells strategies about exceptions in the process that called trainer.fit() only
        try:
            super()._wrapping_function(*args, **kwargs)
        except BaseException as error:
            self._strategy.on_exception(error)
            if isinstance(error, KeyboardInterrupt):  # which torch would take for a good end
                raise SystemExit(1) from error
            raise

    def _add_rank(self, error: ProcessException) -> None:
        environment = self._strategy.cluster_environment
        assert environment is not None
        rank = environment.node_rank() * len(self.procs) + error.error_index
        how = _how(error.exit_code) if isinstance(error, ProcessExitedException) else "has failed"
        error.args = (f"Rank {rank} (process {error.error_pid}) {how}. {error.msg}",)

    def _interrupt_children(self) -> None:
        """An interrupt that only this process has got is for them as well."""
        self.kill(signal.SIGINT)
        deadline = time.monotonic() + _LONGEST_END
        for process in self.procs:
            process.join(max(deadline - time.monotonic(), 0))
        self.kill(signal.SIGKILL)

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned process unpickles this object first: its trainer holds devices, which need torch_npu to be imported.
        return _empty_launcher, (), self.__getstate__()


def _empty_launcher() -> ProcessLauncher:
    npu()
    return ProcessLauncher.__new__(ProcessLauncher)


def _end_children(children: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """For the end of a main process whose run has failed: its children notice and end by themselves, or are ended."""
    deadline = time.monotonic() + patience
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(deadline - time.monotonic(), 0))
        child.kill()


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _how(code: int) -> str:
    if code >= 0:
        return f"has ended with exit code {code}; the reason is in its output"
    try:
        return f"was ended by the signal {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
