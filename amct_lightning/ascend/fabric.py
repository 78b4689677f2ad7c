"""The twin of AscendStrategy for Lightning Fabric, where the user writes the training loop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins import MixedPrecision, Precision, TorchCheckpointIO
from lightning.fabric.plugins.precision import DoublePrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.parallel import ParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from amct_lightning.ascend.hccl.settings import HCCLSettings, NPUOptions
from amct_lightning.ascend.on_npus import OnNPUs
from amct_lightning.ascend.precision import refuse_double
from amct_lightning.ascend.tensors import on_cpu


class AscendFabricStrategy(OnNPUs, DDPStrategy):
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

    _user = "Fabric"
    all_reduce = OnNPUs.reduce

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
        return super().distributed_sampler_kwargs if self.is_distributed else None

    @override
    def setup_environment(self) -> None:
        """Open the device, set its options and connect to the other ranks."""
        ParallelStrategy.setup_environment(self)
        self._options.apply()
        self._set_world_ranks()
        if not self.is_distributed:
            self._backward_sync_control = _NothingToSkip()  # type: ignore[assignment]
            return
        self._make_process_group()

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Wrap a module for training on many devices."""
        if not self.is_distributed:
            return module
        return DistributedDataParallel(module, device_ids=[self.root_device.index], **self._ddp_kwargs)


class _OnCPU(TorchCheckpointIO):
    """Writes checkpoints that load where torch_npu is missing."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        super().save_checkpoint(on_cpu(checkpoint), path, storage_options)


class _NothingToSkip:
    """For ``Fabric.no_backward_sync`` on one device, where gradients are never exchanged."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()
