"""Ascend NPUs in Lightning: accelerator, strategies, precision, cluster environment.

Importing this package makes the names ``npu``, ``ascend`` and ``ascend_fsdp`` known to Lightning; torch_npu is imported
when an NPU is asked for.
"""

from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from amct_lightning.ascend.accelerator import NPUAccelerator
from amct_lightning.ascend.cluster.environment import AscendClusterEnvironment
from amct_lightning.ascend.devices import NPUUnavailableError
from amct_lightning.ascend.fabric import AscendFabricStrategy
from amct_lightning.ascend.fsdp.strategy import AscendFSDPStrategy
from amct_lightning.ascend.precision import NPUPrecision
from amct_lightning.ascend.strategy import AscendStrategy

__all__ = [
    "AscendClusterEnvironment",
    "AscendFSDPStrategy",
    "AscendFabricStrategy",
    "AscendStrategy",
    "NPUAccelerator",
    "NPUPrecision",
    "NPUUnavailableError",
]


def register() -> None:
    """Make ``accelerator="npu"`` and the strategies ``"ascend"`` and ``"ascend_fsdp"`` known to Lightning.

    Example:
        >>> register()
        >>> "npu" in AcceleratorRegistry.available_accelerators()
        True
        >>> {"ascend", "ascend_fsdp"} <= set(StrategyRegistry.available_strategies())
        True
    """
    NPUAccelerator.register_accelerators(AcceleratorRegistry)
    AscendStrategy.register_strategies(StrategyRegistry)
    AscendFSDPStrategy.register_strategies(StrategyRegistry)
    NPUAccelerator.register_accelerators(ACCELERATOR_REGISTRY)  # Fabric has registries of its own
    AscendFabricStrategy.register_strategies(STRATEGY_REGISTRY)


register()
