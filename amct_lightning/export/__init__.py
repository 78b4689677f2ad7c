"""Writing trained models for those who run them, and proving that what is written is what was trained."""

from amct_lightning.export.functions import export_onnx, save_quant_retrain_model
from amct_lightning.export.report import ExportReport

__all__ = ["ExportReport", "export_onnx", "save_quant_retrain_model"]
