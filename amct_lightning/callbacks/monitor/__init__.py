"""Watching a run: what is measured per layer, and where it is written and logged."""

from amct_lightning.callbacks.monitor.monitor import QuantMonitor

__all__ = ["QuantMonitor"]
