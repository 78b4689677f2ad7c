"""Which forwards belong to a training step, so that they may calibrate and move ranges."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Self


class TrainingGate:
    """Tells the quantizers of a model whether a forward is one of a training step.

    The mode of a module does not tell: a validation may leave modules in training mode, and a training step may run
    parts of the model in evaluation mode, or all of it for a look at its predictions. So whoever runs the training
    opens the gate for each batch. Within it, the mode of the whole model counts for the layers of that model, and for
    copies of them, such as the teacher of a student, their own.

    A copy of a quantizer is given the gate of the original as a guest. After the training the gate has no say any more.

    Args:
        model: The whole model.

    Attributes:
        is_open: Whether a training batch is in progress.
        is_over: Whether the training has ended, so that each quantizer goes by its own mode again.
        batch: Number of training batches begun.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> gate = TrainingGate(model)
        >>> gate.admits(training=True)
        False
        >>> gate.open()
        >>> gate.admits(training=False), gate.admits(training=False, guest=True)
        (True, False)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self.is_open = False
        self.is_over = False
        self.batch = 0
        self._begins_in_training = True

    def open(self) -> None:
        """Begin a training batch."""
        self.is_open = True
        self.batch += 1
        # A model that somebody has left in evaluation mode as a whole is trained in that mode.
        self._begins_in_training = self._model is not None and self._model.training

    def close(self) -> None:
        """End a training batch."""
        self.is_open = False

    def end(self) -> None:
        """End the training: quantizers go by their own mode again."""
        self.is_open, self.is_over, self._model = False, True, None

    def admits(self, training: bool, guest: bool = False) -> bool:
        """Tell whether a forward may calibrate and move ranges.

        Args:
            training: Whether the quantizer is in training mode.
            guest: Whether it is a copy of a quantizer of the model.
        """
        if self._model is None:
            return training
        return self.is_open and (training if guest else self._model.training or not self._begins_in_training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the model goes by the same gate, as a guest."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A model that is saved as a whole goes by its own mode when it is loaded."""
        return _ended, ()


def _ended() -> TrainingGate:
    gate = TrainingGate(nn.Identity())
    gate.end()
    return gate
