"""What a user says of a distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from amct_lightning.callbacks.schedule.fields import check_moment, check_names, plain

OutputLoss = Literal["kl", "mse"]
"""How the outputs of student and teacher are compared."""
TeacherDtype = Literal["float32", "bfloat16", "float16"]
"""What a teacher may compute in."""


@dataclass
class Distill:
    """How the float model teaches the quantized one in a training with :class:`QuantRetrainCallback`.

    The teacher is the float model as it was when the callback converted it, in evaluation mode. Whenever the student
    is called in ``training_step``, with gradients, the teacher answers to the same arguments. To the loss that
    ``training_step`` returns is added ``weight * (output loss + layer_weight * mean squared error of the layers)``,
    summed over the calls of the step, and logged as ``distill_loss``.

    Args:
        temperature: The output loss ``"kl"`` is ``temperature**2`` times the KL divergence of
            ``softmax(student / temperature)`` from ``softmax(teacher / temperature)``, a mean over all positions.
        weight: Weight of the term. Where it is 0 the teacher does not run.
        final_weight: The weight goes linearly from ``weight`` at ``start`` to this one at ``end``, and stays there.
            ``None`` keeps ``weight``.
        start: The term counts from here on: an epoch as an int, or a share of ``max_epochs`` as a float in [0, 1].
            ``None`` is the first batch, calibration included.
        end: Where ``final_weight`` is reached, as ``start``; ``None`` is the end of the training.
        layers: Patterns of names, as in the configuration and the record, of layers whose outputs are to be those of
            the teacher. A pattern is for quantized layers; one that fits none of them is for other modules, such as
            whole blocks, and an exact name always for the module of that name.
        layer_weight: Weight of the mean squared error of the layers, a mean over values and layers, in the term.
        output_loss: ``"kl"`` for class scores, ``"mse"`` for other outputs such as embeddings, ``None`` for ``layers``
            only.
        output: Key or attribute of the output if it is no tensor; ``None`` takes ``logits``, or the only tensor in it.
        module: Dotted name in the LightningModule of the module whose calls are taught, ``""`` for itself. ``None``
            takes the outermost that holds all quantized layers, in each call.
        task_weight: Weight of the loss that ``training_step`` returns, in steps with a teacher; 0 learns from the
            teacher only.
        factors_only: Whether only quantization factors are trained: no other parameter gets a gradient, and batch
            normalization is frozen, unless the schedule says when.
        teacher: A file with the float weights of the teacher, as ``float_checkpoint`` takes them. ``None`` takes those
            that the model has when it is converted.
        dtype: What the teacher computes in; ``None`` as the student.
        offload: Whether the teacher's weights stay on the host, and are on the device during its forward only.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a wrong value, or two contradict each other.

    Example:
        >>> distill = Distill(weight=1.0, final_weight=0.0, start=0.5)
        >>> [distill.weight_at(epoch, max_epochs=8) for epoch in (0, 4, 6, 8)]
        [0.0, 1.0, 0.5, 0.0]
    """

    temperature: float = 2.0
    weight: float = 1.0
    final_weight: float | None = None
    start: int | float | None = None
    end: int | float | None = None
    layers: list[str] = field(default_factory=list)
    layer_weight: float = 1.0
    output_loss: OutputLoss | None = "kl"
    output: str | None = None
    module: str | None = None
    task_weight: float = 1.0
    factors_only: bool = False
    teacher: str | Path | None = None
    dtype: TeacherDtype | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        self.layers = plain(self.layers)
        _check_types(self)
        _check_numbers(self)
        for name in ("start", "end"):
            if getattr(self, name) is not None:
                check_moment(getattr(self, name), _where(self, name))
        if self.output_loss is None and not self.layers:
            raise ValueError(
                "Distill(output_loss=None, layers=[]): there is nothing to learn from the teacher. Give layers, or "
                "output_loss='kl' or 'mse'."
            )
        if self.end is not None and self.final_weight is None:
            raise ValueError(
                f"{_where(self, 'end')}: is where final_weight is reached; give that, too, or leave it out."
            )

    def weight_at(self, epoch: float, max_epochs: int | None = None) -> float:
        """Return the weight of the term at a moment of the training.

        Args:
            epoch: The moment in epochs, fractions of them included.
            max_epochs: Number of epochs of the training, ``None`` if it is not limited by epochs.

        Raises:
            ValueError: If a moment is a share of ``max_epochs`` and the training has none, or ``end`` is not after
                ``start``.
        """
        start = 0.0 if self.start is None else _epochs(self.start, max_epochs, "start")
        if self.final_weight is None:
            return self.weight if epoch >= start else 0.0
        end = _epochs(1.0 if self.end is None else self.end, max_epochs, "end")
        if end <= start:
            raise ValueError(
                f"Distill(start={self.start}, end={self.end}): the end is epoch {end:g} and must be after the start, "
                f"epoch {start:g}."
            )
        share = min(1.0, (epoch - start) / (end - start))
        return 0.0 if epoch < start else self.weight + share * (self.final_weight - self.weight)

    @classmethod
    def of(cls, distill: Distill | Mapping[str, Any] | None) -> Distill | None:
        """Return the settings from what a user gives.

        Args:
            distill: The settings, their fields as a mapping, or ``None`` for no distillation.

        Example:
            >>> Distill.of({"temperature": 4.0}).temperature
            4.0
        """
        if distill is None or isinstance(distill, Distill):
            return distill
        if not isinstance(distill, Mapping):
            raise TypeError(
                f"QuantRetrainCallback(distill={distill!r}): must be a Distill, a mapping of its fields or None."
            )
        check_names(distill, [f.name for f in fields(cls)], "distill")
        return cls(**distill)


def _check_types(settings: Distill) -> None:
    if not isinstance(settings.layers, list) or not all(isinstance(p, str) and p for p in settings.layers):
        raise TypeError(f"{_where(settings, 'layers')}: must be a list of patterns of layer names, ['encoder.*'].")
    for name in ("factors_only", "offload"):
        if not isinstance(getattr(settings, name), bool):
            raise TypeError(f"{_where(settings, name)}: must be True or False.")
    for name in ("output", "module"):
        if not isinstance(getattr(settings, name), str | None):
            raise TypeError(f"{_where(settings, name)}: must be a text or None.")
    if settings.teacher is not None and (not isinstance(settings.teacher, (str, Path)) or not str(settings.teacher)):
        raise TypeError(f"{_where(settings, 'teacher')}: must be the path of a file with float weights, or None.")
    for name, kind in (("output_loss", OutputLoss), ("dtype", TeacherDtype)):
        if getattr(settings, name) not in (None, *get_args(kind)):
            allowed = ", ".join(map(repr, get_args(kind)))
            raise ValueError(f"{_where(settings, name)}: must be one of {allowed}, or None.")


def _check_numbers(settings: Distill) -> None:
    for name in ("temperature", "weight", "final_weight", "layer_weight", "task_weight"):
        value = getattr(settings, name)
        if value is None and name == "final_weight":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{_where(settings, name)}: must be a number.")
        is_too_small = value <= 0 if name == "temperature" else value < 0
        if is_too_small or not value < float("inf"):
            raise ValueError(
                f"{_where(settings, name)}: must be finite and {'>' if name == 'temperature' else '>='} 0."
            )
    if settings.weight == 0 and not settings.final_weight:
        raise ValueError(
            f"{_where(settings, 'weight')}: the term never counts. Give a weight > 0, a final_weight, or no distill."
        )


def _where(settings: Distill, name: str) -> str:
    return f"Distill({name}={getattr(settings, name)!r})"


def _epochs(moment: int | float, max_epochs: int | None, name: str) -> float:
    """Return a moment in epochs; a share is not rounded, as the weight changes within epochs."""
    if isinstance(moment, int):
        return moment
    if max_epochs is None:
        raise ValueError(
            f"Distill({name}={moment}): a share of the training needs max_epochs, and the Trainer has none. Set "
            "max_epochs, or give start and end as epochs, as integers."
        )
    return moment * max_epochs
