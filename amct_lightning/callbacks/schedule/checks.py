"""What is checked of a schedule when a training begins: that it does not contradict itself, and fits the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from amct_lightning.callbacks.schedule.fields import to_epoch
from amct_lightning.callbacks.schedule.schedule import QuantSchedule
from amct_lightning.wording import abbreviated, closest


def check_contradictions(schedule: QuantSchedule, max_epochs: int | None) -> None:
    """Refuse a schedule that quantizes or freezes what it calibrates later.

    Args:
        schedule: The schedule.
        max_epochs: Number of epochs of the training.

    Raises:
        ValueError: If two fields contradict each other.
    """
    for pattern in (None, *schedule.layers):
        own = schedule.with_exception(pattern)
        where = "QuantSchedule" if pattern is None else f"QuantSchedule.layers[{pattern!r}]"
        epochs, start = own.calibration_epochs(max_epochs), own.first_epoch(max_epochs)
        if start < epochs[0]:
            raise ValueError(
                f"{where}: start={own.start} is epoch {start}, but calibrate={own.calibrate} is epoch {epochs[0]}, and "
                "without a calibration nothing can be quantized. Calibrate at or before the start."
            )
        frozen = own.freeze_epoch("data", max_epochs)
        if frozen is not None and frozen < epochs[-1]:
            raise ValueError(
                f"{where}: freeze_data={own.freeze_data} is epoch {frozen}, but calibrate={own.calibrate} calibrates "
                f"in epoch {epochs[-1]}. Freeze the ranges after the last calibration."
            )


def warn_beyond_end(schedule: QuantSchedule, max_epochs: int | None, epochs: int | None) -> None:
    """Warn of what a schedule wants after the last epoch: it never happens, and no table shows it.

    Args:
        schedule: The schedule.
        max_epochs: Number of epochs that its shares are counted by.
        epochs: Number of epochs until the training ends, ``None`` if that cannot be told.
    """
    if epochs is None:
        return
    found = [*_beyond_end(schedule, max_epochs, epochs)]
    if found:
        rank_zero_warn(
            f"{' and '.join(found)} never {'happens' if len(found) == 1 else 'happen'}: the last epoch of this "
            f"training is {epochs - 1}, counted from 0. Give an earlier epoch, train longer, or leave it out."
        )


def _beyond_end(schedule: QuantSchedule, max_epochs: int | None, epochs: int) -> Iterator[str]:
    for pattern in (None, *schedule.layers):
        own = schedule.with_exception(pattern)
        where = "QuantSchedule" if pattern is None else f"QuantSchedule.layers[{pattern!r}]"
        given = vars(schedule) if pattern is None else schedule.layers[pattern]
        for name in ("start", "calibrate", "freeze_data", "freeze_weights", "freeze_bn"):
            value = getattr(own, name) if name in given else None
            for moment in value if isinstance(value, list) else [value]:
                # The share 1.0 is how "never" can be written.
                if moment is None or (isinstance(moment, float) and moment == 1):
                    continue
                epoch = to_epoch(moment, max_epochs, name)
                if epoch >= epochs:
                    yield f"{where}: {name}={value}{'' if epoch == value else f' (epoch {epoch})'}"


def number_of_epochs(trainer: pl.Trainer, max_epochs: int | None) -> int | None:
    """Return how many epochs a training has at most, ``None`` if that cannot be told.

    Args:
        trainer: The Trainer, its dataloaders set up.
        max_epochs: Number of epochs that the user wants.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # says nothing of the training that it stands for
        return None
    batches: int | float = trainer.num_training_batches
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    changes = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    is_plain = trainer.lightning_module.automatic_optimization and not changes and len(trainer.optimizers) == 1
    if trainer.max_steps < 0 or not is_plain or batches in (0, math.inf):
        return max_epochs
    steps = math.ceil(batches / trainer.accumulate_grad_batches)
    by_steps = math.ceil(trainer.max_steps / steps)
    return by_steps if max_epochs is None else min(max_epochs, by_steps)


def check_patterns(schedule: QuantSchedule, names: Iterable[str]) -> None:
    """Refuse exceptions for layers that there are not.

    Args:
        schedule: The schedule.
        names: Names of the quantized layers and of the batch normalizations.

    Raises:
        ValueError: If a pattern fits none of them.
    """
    names = list(names)
    for pattern in schedule.layers:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"QuantSchedule.layers: the pattern '{pattern}' fits no quantized layer and no batch normalization. "
                f"There are {abbreviated(names)}.{closest(pattern, names)}"
            )
