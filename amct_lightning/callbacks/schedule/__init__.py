"""When which layer calibrates, trains and freezes: the schedule, its checks, its table, and what applies it."""

from amct_lightning.callbacks.schedule.schedule import LayerPhase, Position, QuantSchedule

__all__ = ["LayerPhase", "Position", "QuantSchedule"]
