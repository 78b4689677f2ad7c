"""The QAT layers and the conversion of a float model to them."""

from amct_lightning.modules.convert import convert_layers, input_quantizers, quantized_layers
from amct_lightning.modules.layers import QATConv2d, QATConvTranspose2d, QATLayer, QATLinear

__all__ = [
    "QATConv2d",
    "QATConvTranspose2d",
    "QATLayer",
    "QATLinear",
    "convert_layers",
    "input_quantizers",
    "quantized_layers",
]
