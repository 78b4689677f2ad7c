"""What is checked of a schedule when a training begins: that it does not contradict itself, and fits the model."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

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
