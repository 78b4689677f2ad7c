"""The twin of AscendStrategy for Lightning Fabric, where the user writes the training loop."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins import MixedPrecision, Precision, TorchCheckpointIO
from lightning.fabric.plugins.precision import DoublePrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from amct_lightning.ascend.accelerator import NPUAccelerator
from amct_lightning.ascend.collectives import ReduceName, reduce_tensor
from amct_lightning.ascend.hccl import HCCLSettings
from amct_lightning.ascend.options import NPUOptions
from amct_lightning.ascend.precision import refuse_double
from amct_lightning.ascend.tensors import on_cpu


class AscendFabricStrategy(DDPStrategy):
    """Trains on one Ascend NPU or many: ``Fabric(accelerator="npu", devices=8, strategy="ascend")``.

    Like :class:`AscendStrategy` it uses one device directly and averages gradients over HCCL with more, and checkpoints
    hold CPU tensors. Ranks do not watch each other, and random generators are not in the checkpoints.

    Args:
        process_group_backend: ``"hccl"``; others are for tests.
        timeout: How long a process may wait for the others before an operation counts as failed.
        hccl: Settings of HCCL.
        options: Settings of torch_npu.
        **kwargs: As for Fabric's ``DDPStrategy``, such as ``start_method``, and arguments of
            ``DistributedDataParallel``.

    Example:
        >>> AscendFabricStrategy(find_unused_parameters=True).num_processes
        0
    """

    def __init__(
        self,
        process_group_backend: Literal["hccl", "gloo"] = "hccl",
        timeout: timedelta | None = None,
        hccl: HCCLSettings | None = None,
        options: NPUOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **kwargs)
        self._hccl, self._options = hccl or HCCLSettings(), options or NPUOptions()
        self.checkpoint_io = kwargs.get("checkpoint_io") or _OnCPU()

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The accelerator: an :class:`NPUAccelerator`."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        if accelerator is not None and not isinstance(accelerator, NPUAccelerator):
            raise MisconfigurationException(
                f"{type(self).__name__} trains on NPUs, but the accelerator is {type(accelerator).__name__} "
                f"(accelerator='auto' never chooses the NPU). Write Fabric(accelerator='npu', ...), or leave out the "
                f"strategy to train on another device."
            )
        self._accelerator = accelerator

    @property
    @override
    def precision(self) -> Precision:
        """The precision plugin; mixed precision that Fabric made for CUDA is replaced by its twin for NPUs."""
        return self._precision if self._precision is not None else Precision()

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if isinstance(precision, DoublePrecision):
            refuse_double()
        if type(precision) is MixedPrecision and precision.device != "npu":
            name = cast(Literal["16-mixed", "bf16-mixed"], precision.precision)
            precision = MixedPrecision(name, "npu", torch.amp.GradScaler("npu") if name == "16-mixed" else None)
        self._precision = precision

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:  # type: ignore[override]
        """How the data is split; None on one device."""
        return super().distributed_sampler_kwargs if self._is_distributed() else None

    @override
    def setup_environment(self) -> None:
        """Open the device, set its options and connect to the other ranks."""
        ParallelStrategy.setup_environment(self)
        self._options.apply()
        self._set_world_ranks()
        if not self._is_distributed():
            self._backward_sync_control = _NothingToSkip()  # type: ignore[assignment]
            return
        environment = self.cluster_environment
        assert environment is not None
        self._hccl.apply()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        if not dist.is_initialized():  # without device_id: with one, torch expects a backend that can split groups
            dist.init_process_group(self.process_group_backend, None, self._timeout, self.world_size, self.global_rank)

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Wrap a module for training on many devices."""
        if not self._is_distributed():
            return module
        return DistributedDataParallel(module, device_ids=[self.root_device.index], **self._ddp_kwargs)

    @override
    def all_reduce(
        self, tensor: Tensor, group: dist.ProcessGroup | None = None, reduce_op: ReduceName = "mean"
    ) -> Tensor:
        """Reduce a tensor over all ranks, whatever its dtype; the mean of integers is a float."""
        if not isinstance(tensor, Tensor) or not dist.is_initialized():
            return tensor
        return reduce_tensor(tensor.to(self.root_device), group, reduce_op).to(tensor.device)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier(device_ids=[self.root_device.index])

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Send an object of rank ``src`` to all ranks."""
        parcel = [obj]
        if dist.is_initialized():
            dist.broadcast_object_list(parcel, src, device=self.root_device)
        return parcel[0]

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Make the name ``ascend`` known to Fabric; doing it again changes nothing."""
        strategy_registry.register("ascend", cls, description="One or many Ascend NPUs over HCCL", override=True)

    def _is_distributed(self) -> bool:
        return self.num_nodes * self.num_processes > 1


class _OnCPU(TorchCheckpointIO):
    """Writes checkpoints that load where torch_npu is missing."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        super().save_checkpoint(on_cpu(checkpoint), path, storage_options)


class _NothingToSkip:
    """For ``Fabric.no_backward_sync`` on one device, where gradients are never exchanged."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()
