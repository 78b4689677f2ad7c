"""The entry points without Lightning: AMCT's functions under their own names, and ``prepare_qat``."""

from amct_lightning.api.prepare import prepare_qat
from amct_lightning.api.scripts import (
    create_quant_retrain_config,
    create_quant_retrain_model,
    restore_quant_retrain_model,
)

__all__ = ["create_quant_retrain_config", "create_quant_retrain_model", "prepare_qat", "restore_quant_retrain_model"]
