"""What runs the formulas of a quantized layer: the operators of torch one by one, or kernels that were compiled."""

from amct_lightning.quantizers.executors.base import COMPOSITE, Executor
from amct_lightning.quantizers.executors.choice import Execution, check_execution, executor_for, resolved
from amct_lightning.quantizers.executors.factors import Factors, WeightFactors, on_device

__all__ = [
    "COMPOSITE",
    "Execution",
    "Executor",
    "Factors",
    "WeightFactors",
    "check_execution",
    "executor_for",
    "on_device",
    "resolved",
]
