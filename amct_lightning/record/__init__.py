"""The record file: the quantization factors of a network in the form that Ascend tools read."""

from __future__ import annotations

from amct_lightning.record.layer_record import LayerRecord
from amct_lightning.record.quant_record import QuantRecord

__all__ = ["LayerRecord", "QuantRecord"]
