"""The Lightning side: the callback that converts, calibrates, records and resumes."""

from amct_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from amct_lightning.callbacks.quant_retrain import QuantRetrainCallback

__all__ = ["AtomicCheckpointIO", "QuantRetrainCallback"]
