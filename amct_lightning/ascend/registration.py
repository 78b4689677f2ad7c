"""The names ``npu`` and ``ascend`` in Lightning's registries."""

from __future__ import annotations

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from amct_lightning.ascend.accelerator import NPUAccelerator
from amct_lightning.ascend.strategy import AscendStrategy


def register() -> None:
    """Make ``accelerator="npu"`` and ``strategy="ascend"`` known to Lightning.

    Example:
        >>> register()
        >>> "npu" in AcceleratorRegistry.available_accelerators(), "ascend" in StrategyRegistry.available_strategies()
        (True, True)
    """
    NPUAccelerator.register_accelerators(AcceleratorRegistry)
    AscendStrategy.register_strategies(StrategyRegistry)
