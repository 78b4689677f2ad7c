"""Scores of other callbacks that start anew where quantization begins: those of the float network are better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from amct_lightning.callbacks.schedule.schedule import Position, QuantSchedule


def begins_to_quantize(schedule: QuantSchedule, layers: Iterable[str], at: Position) -> bool:
    """Tell whether layers are quantized from a position on, and were not in the epoch before.

    Args:
        schedule: The schedule.
        layers: Names of the quantized layers.
        at: The position.

    Example:
        >>> schedule = QuantSchedule(start=1, layers={"head": {"start": 3}})
        >>> [begins_to_quantize(schedule, ["body", "head"], Position(epoch)) for epoch in range(5)]
        [False, True, False, True, False]
    """
    if at.epoch == 0 or at.batch > 0:
        return False
    before = replace(at, epoch=at.epoch - 1)
    return any(schedule.should_quantize(name, at) and not schedule.should_quantize(name, before) for name in layers)


def restart_scores(trainer: pl.Trainer) -> None:
    """Let ModelCheckpoint and EarlyStopping forget what they have seen; files stay where they are.

    Args:
        trainer: The Trainer; the same happens on all of its processes.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path, callback.best_model_path = "", ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = _worst(callback.mode)
            rank_zero_info(f"ModelCheckpoint: the best '{callback.monitor}' is looked for anew, quantized from now on.")
    for stopping in trainer.early_stopping_callbacks:
        if isinstance(stopping, EarlyStopping):
            stopping.wait_count = 0
            stopping.best_score = _worst(stopping.mode)
            rank_zero_info(f"EarlyStopping: the best '{stopping.monitor}' is looked for anew, quantized from now on.")


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
