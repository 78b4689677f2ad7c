"""Activations without a range: a scale per token in every forward, or none at all."""

from amct_lightning.quantizers.rangeless.executor import RangelessExecutor
from amct_lightning.quantizers.rangeless.quantizers import FloatActivations, RangelessQuantizer, TokenQuantizer

__all__ = ["FloatActivations", "RangelessExecutor", "RangelessQuantizer", "TokenQuantizer"]
