"""The places where this room needs something of Lightning that is not public API, one function each.

Checked with Lightning 2.6.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin, _update_properties
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_lightning.ascend.devices import npu
from amct_lightning.ascend.processes.launchers import ProcessLauncher, ScriptLauncher


def process_launcher(strategy: ParallelStrategy, method: Literal["spawn", "fork", "forkserver"]) -> _Launcher:
    """Make the launcher that starts processes from this one.

    Private because Lightning has no public launchers.

    Args:
        strategy: The strategy.
        method: How to start.

    Returns:
        The launcher.
    """
    return ProcessLauncher(strategy, start_method=method)


def script_launcher(
    environment: ClusterEnvironment, processes: int, nodes: int, connected: Callable[[], bool]
) -> _Launcher:
    """Make the launcher that runs the script again for every further device, or joins a launched job.

    Private because Lightning has no public launchers.

    Args:
        environment: The cluster environment.
        processes: Processes on this node.
        nodes: Number of nodes.
        connected: Tells whether the ranks watch each other.

    Returns:
        The launcher.
    """
    return ScriptLauncher(environment, processes, nodes, connected)


def ddp_redirection() -> _ForwardRedirection:
    """Make the object that calls ``training_step`` through DDP's forward, aware of manual optimization.

    Private because strategies other than DDPStrategy are not expected to wrap a module in DDP.

    Returns:
        The redirection.
    """
    return _DDPForwardRedirection()


def sync_module_states(module: nn.Module) -> None:
    """Send parameters and buffers of rank 0 to all ranks, respecting what DDP is told to ignore.

    Private in Lightning and in torch; DDPStrategy does it for validation and tests, where nothing wraps the model.

    Args:
        module: The module.
    """
    _sync_module_states(module)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give the parameters of a module on the meta device memory and their first values.

    Private in Lightning; ModelParallelStrategy does it after ``configure_model`` has sharded the module.

    Args:
        module: The module.
        device: The device.
    """
    _materialize_distributed_module(module, device)


def flush_static_graph(model: DistributedDataParallel) -> None:
    """Start the reduction that DDP postpones to the end of the first backward of a static graph.

    Private in torch: with manual optimization, DDP's own trigger does not run (Lightning 2.6 does the same).

    Args:
        model: The wrapped model.
    """
    model.reducer._delay_all_reduce()  # type: ignore[attr-defined]


def asks_for_cuda_streams(strategy: Strategy) -> bool:
    """Tell whether a strategy wraps the model as DDPStrategy does, which asks CUDA for a stream.

    Private because it is the method that tells: a class made from DDPStrategy may have replaced it.

    Args:
        strategy: The strategy.

    Returns:
        Whether it has DDPStrategy's own method.
    """
    return isinstance(strategy, DDPStrategy) and type(strategy)._setup_model is DDPStrategy._setup_model


def add_npu_method() -> None:
    """Let ``LightningModule.npu()`` update ``module.device``, as ``cuda()`` and ``cpu()`` do.

    Private: the class that keeps the property has no hook for further device types; torch_npu's ``npu()`` leaves the
    property at ``cpu``. Called when torch_npu is in use, so that modules have no such method without it.
    """
    if "npu" in vars(_DeviceDtypeModuleMixin):
        return

    def move(self: nn.Module, device: torch.device | int | None = None) -> nn.Module:
        number = device.index if isinstance(device, torch.device) else device
        target = torch.device("npu", npu().current_device() if number is None else number)
        _update_properties(self, device=target)
        return nn.Module.npu(self, target.index)  # type: ignore[attr-defined,no-any-return]

    _DeviceDtypeModuleMixin.npu = move  # type: ignore[attr-defined]
