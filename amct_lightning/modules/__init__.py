"""The QAT layers, and what finds them in a model."""

from amct_lightning.modules.convert import (
    activation_quantizers,
    learned_factors,
    leave_out_of_broadcast,
    quantized_layers,
)
from amct_lightning.modules.layers import QATLayer, QATLinear

__all__ = [
    "QATLayer",
    "QATLinear",
    "activation_quantizers",
    "learned_factors",
    "leave_out_of_broadcast",
    "quantized_layers",
]
