"""How a tensor is quantized: formulas, quantizer modules and calibration. Imports torch only."""

from amct_lightning.quantizers.activation import ActivationQuantizer
from amct_lightning.quantizers.base import Quantizer, is_exporting
from amct_lightning.quantizers.functions.weight import ChannelLayout
from amct_lightning.quantizers.shift_search import ShiftSearch
from amct_lightning.quantizers.starting.weight import RatioWeightQuantizer, SearchedLearnedWeightQuantizer
from amct_lightning.quantizers.weight import LearnedWeightQuantizer, WeightQuantizer

__all__ = [
    "ActivationQuantizer",
    "ChannelLayout",
    "LearnedWeightQuantizer",
    "Quantizer",
    "RatioWeightQuantizer",
    "SearchedLearnedWeightQuantizer",
    "ShiftSearch",
    "WeightQuantizer",
    "is_exporting",
]
