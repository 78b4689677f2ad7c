"""When factors are calibrated, learned and frozen: a pure function of the place in the training."""

from __future__ import annotations

import copy
import glob
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Any, Literal

from typing_extensions import Self

from amct_lightning.callbacks.schedule.fields import (
    check_exceptions,
    check_fields,
    check_names,
    import_subclass,
    plain,
    to_epoch,
)

Part = Literal["data", "weights", "bn"]
"""What can be frozen: activation ranges, weight scales, batch normalization."""


@dataclass(frozen=True)
class Position:
    """A place in the training.

    Attributes:
        epoch: Epoch, counted from 0.
        batch: Number of the batch in the epoch, counted from 0.
        step: Number of optimizer steps done before, the Trainer's ``global_step``.
        max_epochs: Number of epochs of the training; ``None`` if it is not limited by epochs.
    """

    epoch: int
    batch: int = 0
    step: int = 0
    max_epochs: int | None = None


class Phase(IntEnum):
    """How far the quantization of a layer has come; the numbers are those of the metric ``quant_phase``."""

    FLOAT = 0
    CALIBRATING = 1
    LEARNING = 2
    FROZEN = 3


@dataclass(frozen=True)
class LayerPhase:
    """What a schedule wants of a layer at a :class:`Position`.

    Attributes:
        quantized: Fake quantization is on.
        calibrates: A quantizer without a range observes batches.
        recalibrates: With this batch a quantizer that has a range begins to calibrate anew.
        updates: Factors that are not frozen may change in the coming optimizer step.
        data_frozen: The activation ranges do not change.
        weights_frozen: The weight scales do not change.
        bn_frozen: The batch normalization uses its running statistics; these and its parameters do not change.
        held_between_updates: Weight scales follow the weight at updates only, not in every forward.
    """

    quantized: bool
    calibrates: bool
    recalibrates: bool
    updates: bool
    data_frozen: bool
    weights_frozen: bool
    bn_frozen: bool
    held_between_updates: bool


@dataclass
class QuantSchedule:
    """When a :class:`QuantRetrainCallback` starts, calibrates, updates and freezes; a pure function of the position.

    Epochs are counted from 0: an int is an epoch, a float between 0 and 1 that share of ``max_epochs``, rounded up
    (``1`` is the second epoch, ``1.0`` the end of the training). ``None`` means never, or the default that is given.

    A frozen factor is bit-identical from then on: the optimizer's momentum and weight decay do not reach it, and its
    gradient counts for no clipping of norms.

    Args:
        start: From this epoch on layers are fake-quantized; before it they run in float. ``None`` begins with the
            first calibration.
        calibrate: The epoch whose first batches calibrate the activation ranges, or several of them: the later ones
            calibrate all ranges anew, apart from frozen ones and those that the configuration gives. An epoch
            before ``start`` calibrates on the float activations. ``None`` is ``start``, or 0.
        calibrate_batches: Number of batches of every calibration; ``None`` is ``batch_num`` of the configuration.
        freeze_data: From this epoch on the activation ranges are frozen, but not before their first calibration.
        freeze_weights: From this epoch on the weight scales are frozen: learned ones (``ulq_retrain``), and the
            max-abs ones of that moment (``arq_retrain``), which otherwise follow the weight in every step.
        freeze_bn: From this epoch on statistics and parameters of the batch normalization layers are frozen.
        update_every_n_steps: Factors change in every n-th optimizer step only.
        update_every_n_epochs: Factors change in every n-th epoch only, counted from ``start``.
        restart_scores: Whether ModelCheckpoint and EarlyStopping forget the scores that they have seen when layers
            begin to be quantized. Without it the best checkpoint is easily one of the float phase.
        layers: Exceptions: pattern of layer names -> some of the fields above, apart from ``calibrate_batches`` and
            ``restart_scores``. The last pattern that fits a layer counts. A batch normalization without a pattern of
            its own follows the layer that it is folded into. Layers that read the same tensor share their activation
            range: that follows the first of them to run, as the conversion table shows.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a wrong value, or two contradict each other.

    Example:
        >>> schedule = QuantSchedule(freeze_data=0.5, freeze_bn=3, layers={"head.*": {"freeze_data": None}})
        >>> schedule.phase("body.0", Position(epoch=5, max_epochs=10)).data_frozen
        True
        >>> schedule.phase("head.fc", Position(epoch=5, max_epochs=10)).data_frozen
        False
    """

    start: int | float | None = None
    calibrate: int | float | list[int | float] | None = None
    calibrate_batches: int | None = None
    freeze_data: int | float | None = None
    freeze_weights: int | float | None = None
    freeze_bn: int | float | None = None
    update_every_n_steps: int = 1
    update_every_n_epochs: int = 1
    restart_scores: bool = False
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calibrate, self.layers = plain(self.calibrate), plain(self.layers)
        check_fields(vars(self))
        check_exceptions(self.layers)

    def phase(self, layer: str, at: Position) -> LayerPhase:
        """Return what this schedule wants of a layer at a position.

        Args:
            layer: Dotted name of the layer, as in the configuration and the record.
            at: The position.

        Raises:
            ValueError: If an epoch is a share of ``max_epochs`` and the training has none.
        """
        return LayerPhase(
            quantized=self.should_quantize(layer, at),
            calibrates=self.should_calibrate(layer, at),
            recalibrates=self.should_recalibrate(layer, at),
            updates=self.should_update(layer, at),
            data_frozen=self.should_freeze("data", layer, at),
            weights_frozen=self.should_freeze("weights", layer, at),
            bn_frozen=self.should_freeze("bn", layer, at),
            held_between_updates=self.for_layer(layer).update_every_n_steps > 1,
        )

    def should_quantize(self, layer: str, at: Position) -> bool:
        """Tell whether a layer is fake-quantized; override it for a rule of your own."""
        own = self.for_layer(layer)
        return at.epoch >= own.first_epoch(at.max_epochs)

    def should_calibrate(self, layer: str, at: Position) -> bool:
        """Tell whether a layer without a range observes this batch; override it for a rule of your own."""
        own = self.for_layer(layer)
        return at.epoch >= own.calibration_epochs(at.max_epochs)[0]

    def should_recalibrate(self, layer: str, at: Position) -> bool:
        """Tell whether a layer begins to calibrate anew with this batch; override it for a rule of your own."""
        own = self.for_layer(layer)
        return at.batch == 0 and at.epoch in own.calibration_epochs(at.max_epochs)[1:]

    def should_freeze(self, part: Part, layer: str, at: Position) -> bool:
        """Tell whether a part of a layer is frozen; override it for a rule of your own.

        Args:
            part: ``"data"`` for the activation ranges, ``"weights"`` for the weight scales, ``"bn"`` for a batch
                normalization, whose name ``layer`` then is, or that of the layer it is folded into.
            layer: Dotted name.
            at: The position.
        """
        moment = self.for_layer(layer).freeze_epoch(part, at.max_epochs)
        return moment is not None and at.epoch >= moment

    def should_update(self, layer: str, at: Position) -> bool:
        """Tell whether factors that are not frozen may change in this step; override it for a rule of your own."""
        own = self.for_layer(layer)
        epochs = at.epoch - own.first_epoch(at.max_epochs)
        return at.step % own.update_every_n_steps == 0 and epochs % own.update_every_n_epochs == 0

    def for_layer(self, layer: str) -> QuantSchedule:
        """Return the fields that count for a layer, without exceptions."""
        return self.with_exception(self.pattern_of(layer))

    def with_exception(self, pattern: str | None) -> QuantSchedule:
        """Return the fields that count for a pattern of ``layers``, ``None`` for those of all others."""
        return self if pattern is None else replace(self, **{"layers": {}, **self.layers[pattern]})

    def pattern_of(self, layer: str) -> str | None:
        """Return the last pattern of ``layers`` that fits a name, or ``None``."""
        fitting = (pattern for pattern in reversed(self.layers) if layer == pattern or fnmatchcase(layer, pattern))
        return next(fitting, None)

    def with_names(self, names: Collection[str]) -> Self:
        """Return this schedule for a model: what is a name there fits nothing else, whatever it says as a pattern.

        Args:
            names: All names that patterns are for.

        Example:
            >>> schedule = QuantSchedule(layers={"block[1]": {"start": 3}}).with_names(["block[1]", "block1"])
            >>> schedule.pattern_of("block[1]"), schedule.pattern_of("block1")
            ('block[[]1]', None)
        """
        layers = {glob.escape(key) if key in names else key: value for key, value in self.layers.items()}
        if layers == self.layers:
            return self
        twin = copy.copy(self)
        twin.layers = layers
        return twin

    def calibration_epochs(self, max_epochs: int | None) -> list[int]:
        """Return the epochs with a calibration, rising.

        Args:
            max_epochs: Number of epochs of the training.
        """
        if self.calibrate is None:
            return [0 if self.start is None else to_epoch(self.start, max_epochs, "start")]
        given = self.calibrate if isinstance(self.calibrate, list) else [self.calibrate]
        return sorted({to_epoch(epoch, max_epochs, "calibrate") for epoch in given})

    def first_epoch(self, max_epochs: int | None) -> int:
        """Return the first epoch with fake quantization.

        Args:
            max_epochs: Number of epochs of the training.
        """
        if self.start is None:
            return self.calibration_epochs(max_epochs)[0]
        return to_epoch(self.start, max_epochs, "start")

    def freeze_epoch(self, part: Part, max_epochs: int | None) -> int | None:
        """Return the epoch from which a part is frozen, or ``None``.

        Args:
            part: See :meth:`should_freeze`.
            max_epochs: Number of epochs of the training.
        """
        moment = getattr(self, f"freeze_{part}")
        return None if moment is None else to_epoch(moment, max_epochs, f"freeze_{part}")

    @classmethod
    def of(cls, schedule: QuantSchedule | Mapping[str, Any] | None) -> QuantSchedule:
        """Return a schedule from what a user gives.

        Args:
            schedule: A schedule; its fields as a mapping; a mapping of ``class_path`` and ``init_args``, as YAML files
                have it, for a subclass with rules of its own; ``None`` for the default.

        Example:
            >>> QuantSchedule.of({"freeze_bn": 2}).freeze_bn
            2
        """
        if isinstance(schedule, QuantSchedule):
            return schedule
        if schedule is None:
            return cls()
        if not isinstance(schedule, Mapping):
            raise TypeError(f"schedule must be a QuantSchedule, a mapping of its fields or None, got {schedule!r}.")
        if "class_path" in schedule:
            check_names(schedule, ["class_path", "init_args"], "schedule")
            kind = import_subclass(schedule["class_path"], QuantSchedule)
            return kind.of(schedule.get("init_args") or {})
        check_names(schedule, [f.name for f in fields(cls)], "schedule")
        return cls(**schedule)
