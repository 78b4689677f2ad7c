"""The QAT layers, and what finds them in a model."""

from amct_lightning.modules.convert import (
    activation_quantizers,
    learned_factors,
    leave_out_of_broadcast,
    quantized_layers,
)
from amct_lightning.modules.convolutions import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose1d,
    QATConvTranspose2d,
    QATConvTranspose3d,
)
from amct_lightning.modules.layers import QATLayer, QATLinear
from amct_lightning.modules.recurrent import QATGRU, QATLSTM

__all__ = [
    "QATGRU",
    "QATLSTM",
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATConvTranspose1d",
    "QATConvTranspose2d",
    "QATConvTranspose3d",
    "QATLayer",
    "QATLinear",
    "activation_quantizers",
    "learned_factors",
    "leave_out_of_broadcast",
    "quantized_layers",
]
