"""Verifying exported files: numbers, layers and outputs against the model."""

from amct_lightning.export.verify.report import Departure, FormReport, LayerReport, OutputReport, VerifyReport
from amct_lightning.export.verify.verify import verify_export

__all__ = ["Departure", "FormReport", "LayerReport", "OutputReport", "VerifyReport", "verify_export"]
