"""The places where this room needs something of Lightning that is not public API, with the reason.

Checked with Lightning 2.6.6. What a strategy inherits from Lightning's, such as ``_launcher``, is used by it directly.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.accelerators.registry import _AcceleratorRegistry
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin, _update_properties
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_lightning.ascend.devices import npu

# Lightning hands its registries to public methods that it calls, and has no public name for their types.
AcceleratorNames = _AcceleratorRegistry
StrategyNames = _StrategyRegistry

# Lightning has no public launchers; its trainer looks for these very classes.
BaseProcessLauncher = _MultiProcessingLauncher
BaseScriptLauncher = _SubprocessScriptLauncher
# What Lightning's own launcher of scripts does in every process.
set_num_threads = _set_num_threads_if_needed

# Calls ``training_step`` through DDP's forward, aware of manual optimization; strategies other than DDPStrategy are not
# expected to wrap a module in DDP.
DDPForwardRedirection = _DDPForwardRedirection

# Sends parameters and buffers of rank 0 to all ranks, respecting what DDP is told to ignore; private in torch as well.
# DDPStrategy does it for validation and tests, where nothing wraps the model.
sync_module_states = _sync_module_states

# Gives the parameters of a module on the meta device memory and their first values; ModelParallelStrategy does it after
# ``configure_model`` has sharded the module.
materialize = _materialize_distributed_module


def trainer_of(module: pl.LightningModule | None) -> pl.Trainer | None:
    """Give the trainer of a module, if there is one.

    Private because the public property raises an error where there is none.

    Args:
        module: The module.

    Returns:
        The trainer.
    """
    return None if module is None else module._trainer


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
