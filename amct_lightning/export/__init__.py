"""Writing trained models for those who run them, and proving that what is written is what was trained."""

from amct_lightning.export.atc import atc_command
from amct_lightning.export.functions import export_onnx, save_quant_retrain_model, verify_export
from amct_lightning.export.report import ExportReport

__all__ = ["ExportReport", "atc_command", "export_onnx", "save_quant_retrain_model", "verify_export"]
