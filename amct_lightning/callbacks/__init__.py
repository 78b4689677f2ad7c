"""The Lightning side: the callback that converts, calibrates, records and resumes."""

from amct_lightning.callbacks.checkpoints.float_modules import name_the_way_to_load
from amct_lightning.callbacks.checkpoints.io import AtomicCheckpointIO
from amct_lightning.callbacks.distill.settings import Distill
from amct_lightning.callbacks.monitor.monitor import QuantMonitor
from amct_lightning.callbacks.quant_retrain import QuantRetrainCallback
from amct_lightning.callbacks.schedule.schedule import QuantSchedule

__all__ = ["AtomicCheckpointIO", "Distill", "QuantMonitor", "QuantRetrainCallback", "QuantSchedule"]

name_the_way_to_load()
