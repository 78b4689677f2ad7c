"""Quantization-aware training for Ascend hardware in PyTorch Lightning: one callback, AMCT's formats and numbers."""

from amct_lightning.api import create_quant_retrain_config, create_quant_retrain_model, prepare_qat
from amct_lightning.callbacks import QuantRetrainCallback
from amct_lightning.config import RetrainConfig
from amct_lightning.modules import quantized_layers
from amct_lightning.modules.calibration import calibrate
from amct_lightning.record import QuantRecord

__all__ = [
    "QuantRecord",
    "QuantRetrainCallback",
    "RetrainConfig",
    "calibrate",
    "create_quant_retrain_config",
    "create_quant_retrain_model",
    "prepare_qat",
    "quantized_layers",
]
