"""Proving exported files equal to the model that they were exported from."""

from amct_lightning.export.verify.report import Departure, FormReport, LayerReport, OutputReport, VerifyReport

__all__ = ["Departure", "FormReport", "LayerReport", "OutputReport", "VerifyReport"]
