"""Ascend NPUs in Lightning: accelerator, strategies, precision, cluster environment.

Importing this package makes the names ``npu``, ``ascend`` and ``ascend_fsdp`` known to Lightning; torch_npu is imported
when an NPU is asked for.
"""

from amct_lightning.ascend.accelerator import NPUAccelerator
from amct_lightning.ascend.cluster.environment import AscendClusterEnvironment
from amct_lightning.ascend.devices import NPUUnavailableError
from amct_lightning.ascend.fabric import AscendFabricStrategy
from amct_lightning.ascend.fsdp.strategy import AscendFSDPStrategy
from amct_lightning.ascend.precision import NPUPrecision
from amct_lightning.ascend.registration import register
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

register()
