"""What strategies for Lightning and for Fabric have in common: the accelerator, the process group, its collectives."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from amct_lightning.ascend.accelerator import NPUAccelerator
from amct_lightning.ascend.hccl.collectives import ReduceName, connected, reduce_tensor
from amct_lightning.ascend.hccl.settings import HCCLSettings, NPUOptions
from amct_lightning.ascend.lightning_private import StrategyNames

_Given = TypeVar("_Given")


class OnNPUs:
    """What strategies for Lightning and for Fabric have in common; to be put before one of Lightning's.

    A class made from it sets ``_hccl``, ``_options``, ``_process_group_backend`` and ``_timeout``.
    """

    root_device: torch.device
    global_rank: int
    world_size: int
    num_nodes: int
    num_processes: int
    cluster_environment: ClusterEnvironment | None
    _hccl: HCCLSettings
    _options: NPUOptions
    _process_group_backend: str | None
    _timeout: timedelta | None
    _accelerator: Any
    _user: ClassVar[str] = "Trainer"
    _registered: ClassVar[tuple[str, str]] = ("ascend", "One or many Ascend NPUs over HCCL")

    @classmethod
    def register_strategies(cls, strategy_registry: StrategyNames) -> None:
        """Make the strategy's name known to Lightning or Fabric; doing it again changes nothing.

        Args:
            strategy_registry: The registry.
        """
        name, description = cls._registered
        strategy_registry.register(name, cls, description=description, override=True)

    @property
    def accelerator(self) -> Any:
        """The accelerator: an :class:`NPUAccelerator`."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        if accelerator is not None and not isinstance(accelerator, NPUAccelerator):
            raise MisconfigurationException(
                f"{type(self).__name__} trains on NPUs, but the accelerator is {type(accelerator).__name__} "
                f"(accelerator='auto' never chooses the NPU). Write {self._user}(accelerator='npu', ...), or leave out "
                f"the strategy to train on another device."
            )
        self._accelerator = accelerator

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process; the data is then split among them."""
        return self.num_nodes * self.num_processes > 1

    def _make_process_group(self) -> bool:
        """Connect the ranks over HCCL, if that has not happened yet.

        No ``device_id`` is given: with one, torch expects a backend that can split groups, and HCCL cannot.

        Returns:
            Whether it was necessary.
        """
        self._hccl.apply()
        if dist.is_initialized():
            return False
        environment = given(self.cluster_environment)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        dist.init_process_group(
            self._process_group_backend, timeout=self._timeout, rank=self.global_rank, world_size=self.world_size
        )
        return True

    def reduce(
        self, tensor: Tensor | Any, group: dist.ProcessGroup | None = None, reduce_op: ReduceName = "mean"
    ) -> Any:
        """Reduce a tensor over all ranks, whatever its dtype.

        Args:
            tensor: The tensor; anything else is given back as it is.
            group: The ranks; all of them if None.
            reduce_op: ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, ``"product"`` or a ``ReduceOp``.

        Returns:
            The reduced tensor; the mean of integers is a float.
        """
        if not isinstance(tensor, Tensor) or not connected():
            return tensor
        return reduce_tensor(tensor.to(self.root_device), group, reduce_op).to(tensor.device)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks.

        Args:
            *args: Not used.
            **kwargs: Not used.
        """
        if connected():
            dist.barrier(device_ids=[self.root_device.index])

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Send an object to all ranks.

        Args:
            obj: The object, of interest on rank ``src`` only.
            src: The rank that sends.

        Returns:
            The object of rank ``src``.
        """
        parcel = [obj]
        if connected():
            dist.broadcast_object_list(parcel, src, device=self.root_device)
        return parcel[0]


def given(value: _Given | None) -> _Given:
    """Return what the trainer has connected to a strategy before it calls a method that needs it.

    Args:
        value: The model, for example.
    """
    assert value is not None
    return value
