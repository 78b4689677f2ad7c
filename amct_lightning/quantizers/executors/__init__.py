"""What runs the formulas of a quantized layer: the operators of torch one by one, or kernels that were compiled."""

from amct_lightning.quantizers.executors.base import COMPOSITE, Executor, Factors, WeightFactors

__all__ = ["COMPOSITE", "Executor", "Factors", "WeightFactors"]
