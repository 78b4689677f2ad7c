"""The public names of the package, all of them; loaded when one of them is asked for."""

from amct_lightning.amct.migrate import convert_amct_state_dict
from amct_lightning.api import (
    create_quant_retrain_config,
    create_quant_retrain_model,
    prepare_qat,
    restore_quant_retrain_model,
)
from amct_lightning.ascend import AscendFSDPStrategy, AscendStrategy, NPUAccelerator
from amct_lightning.callbacks import Distill, QuantMonitor, QuantRetrainCallback, QuantSchedule
from amct_lightning.callbacks.checkpoints.loading import load_qat_checkpoint
from amct_lightning.config import QuantChoices, RetrainConfig
from amct_lightning.conversion.report import conversion_report
from amct_lightning.export import ExportReport, export_onnx, save_quant_retrain_model, verify_export
from amct_lightning.modules import quantized_layers
from amct_lightning.modules.calibration import calibrate
from amct_lightning.modules.convert import float_parameters
from amct_lightning.record import QuantRecord
from amct_lightning.serving import load_serving, save_serving, verify_serving

__all__ = [
    "AscendFSDPStrategy",
    "AscendStrategy",
    "Distill",
    "ExportReport",
    "NPUAccelerator",
    "QuantChoices",
    "QuantMonitor",
    "QuantRecord",
    "QuantRetrainCallback",
    "QuantSchedule",
    "RetrainConfig",
    "calibrate",
    "conversion_report",
    "convert_amct_state_dict",
    "create_quant_retrain_config",
    "create_quant_retrain_model",
    "export_onnx",
    "float_parameters",
    "load_qat_checkpoint",
    "load_serving",
    "prepare_qat",
    "quantized_layers",
    "restore_quant_retrain_model",
    "save_quant_retrain_model",
    "save_serving",
    "verify_export",
    "verify_serving",
]
