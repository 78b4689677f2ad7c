"""Lightning's accelerator for Ascend NPUs."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from typing_extensions import override

from amct_lightning.ascend.devices import (
    VISIBLE_DEVICES,
    NPUUnavailableError,
    device_count,
    npu,
    open_problem,
    parse_device_ids,
    unavailable_reason,
)
from amct_lightning.ascend.lightning_private import AcceleratorNames, add_npu_method, asks_for_cuda_streams
from amct_lightning.ascend.stats import NPUSmi, physical_position

_FIX = "Write Trainer(accelerator='npu', strategy='ascend', ...), or in YAML: strategy: ascend"
_FIX_SHARDED = "To shard the model over NPUs, write strategy='ascend_fsdp'."
_NO_CUDA = "torch.cuda.amp.GradScaler is enabled, but CUDA is not available"


class NPUAccelerator(Accelerator):
    """Ascend NPUs for ``Trainer(accelerator="npu", strategy="ascend")``.

    The name ``npu`` is known once ``amct_lightning`` is imported. Lightning's ``accelerator="auto"`` never chooses
    it: it looks at CUDA, MPS, XLA and the CPU only. Without ``strategy="ascend"``, Lightning would put the model on
    the CPU (one device) or fail in CUDA functions (several); both are refused with this advice. So are the strategies
    of Lightning that are given by the user.

    Device numbers count the visible devices: with ``ASCEND_RT_VISIBLE_DEVICES=4,6``, ``devices=[1]`` is device 6.

    Raises:
        NPUUnavailableError: If no NPU can be used. The message names the first obstacle (torch_npu missing, version
            that does not fit, CANN's environment not set, no device visible) and the command that removes it.

    Example:
        >>> NPUAccelerator.is_available() or NPUAccelerator.auto_device_count()
        0
    """

    def __init__(self) -> None:
        super().__init__()
        reason = unavailable_reason()
        if reason:
            raise NPUUnavailableError(f"accelerator='npu' cannot be used. {reason}")
        # For precision="16-mixed" Lightning makes a scaler for CUDA first, which the strategy then replaces.
        warnings.filterwarnings("ignore", re.escape(_NO_CUDA), UserWarning)
        self._smi = NPUSmi()

    @override
    def setup_device(self, device: torch.device) -> None:
        """Open a device for this process.

        Args:
            device: The device, of type ``npu``.

        Raises:
            MisconfigurationException: If it is not an NPU.
            NPUUnavailableError: If it is busy or cannot be opened for another reason.
        """
        if device.type != "npu":
            raise MisconfigurationException(
                f"accelerator='npu' was asked for, but Lightning's own choice of strategy would train on '{device}'. "
                f"{_FIX}"
            )
        add_npu_method()
        try:
            npu().set_device(device)
            npu().synchronize()  # set_device alone may postpone opening it
        except RuntimeError as error:
            raise open_problem(device, error) from error

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Refuse strategies and precision plugins that are made for other devices.

        Args:
            trainer: The trainer.

        Raises:
            MisconfigurationException: If the trainer has such a strategy or plugin.
        """
        strategy = trainer.strategy
        if type(strategy).__module__.startswith("lightning.") or asks_for_cuda_streams(strategy):
            raise MisconfigurationException(
                f"{type(strategy).__name__} is made for other devices: it calls functions of CUDA, or leaves out what "
                f"NPUs need (random generators, memory errors, checkpoints that load anywhere). {_fix(strategy)}"
            )
        plugin = trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.device != "npu":
            raise MisconfigurationException(
                f"precision='{plugin.precision}' would have no effect: with {type(strategy).__name__}, Lightning casts "
                f"for '{plugin.device}', not for the NPU. {_FIX}"
            )
        npu().empty_cache()

    @override
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Give numbers about a device, for ``DeviceStatsMonitor``.

        Args:
            device: The device.

        Returns:
            The statistics of torch_npu's memory allocator; where the program ``npu-smi`` is there also the
            utilisation, temperature, power and memory of the whole device, at most 10 seconds old.
        """
        number = torch.device("npu", device).index if isinstance(device, int) else torch.device(device).index
        number = npu().current_device() if number is None else number
        position = physical_position(number, os.environ.get(VISIBLE_DEVICES))
        return {**npu().memory_stats(number), **self._smi.chip(position)}

    @override
    def teardown(self) -> None:
        """Give cached memory back to the device."""
        if npu().is_initialized():
            npu().empty_cache()

    @staticmethod
    @override
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Turn ``Trainer(devices=...)`` into numbers of visible devices.

        Args:
            devices: ``"auto"``, -1, a number of devices, a list of numbers or a text such as ``"0,2"``.

        Returns:
            The numbers.

        Raises:
            MisconfigurationException: If the value is malformed or asks for devices that are not there.
        """
        return parse_device_ids(devices, device_count())

    @staticmethod
    @override
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """Name the devices.

        Args:
            devices: Their numbers.

        Returns:
            The devices, ``npu:<number>``.
        """
        npu()  # before torch_npu is imported, torch does not know the name
        return [torch.device("npu", number) for number in devices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        """Count the visible devices, without initialising any."""
        return device_count()

    @staticmethod
    @override
    def is_available() -> bool:
        """Tell whether there is an NPU: never raises, initialises nothing."""
        return device_count() > 0

    @staticmethod
    @override
    def name() -> str:
        """Give the name for ``Trainer(accelerator=...)``."""
        return "npu"

    @classmethod
    @override
    def register_accelerators(cls, accelerator_registry: AcceleratorNames) -> None:
        """Make the name known to Lightning; doing it again changes nothing.

        Args:
            accelerator_registry: Lightning's registry.
        """
        accelerator_registry.register(cls.name(), cls, description="Ascend NPUs through torch_npu", override=True)


def _fix(strategy: Strategy) -> str:
    sharded = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)) and "ascend_fsdp" in StrategyRegistry
    return _FIX_SHARDED if sharded else _FIX
