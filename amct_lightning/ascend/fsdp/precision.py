"""Precision of the training of a sharded model."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer
from typing_extensions import override

from amct_lightning.ascend.fsdp.gradients import MixedGradScaler, clip_norm, clip_value
from amct_lightning.ascend.precision import NPUPrecision, NPUPrecisionName, npu_precision


class ShardedPrecision(NPUPrecision):
    """:class:`NPUPrecision` for a model of which some parameters are sharded; chosen by ``AscendFSDPStrategy``.

    Args:
        precision: As for :class:`NPUPrecision`.
        scaler: As for :class:`NPUPrecision`.

    Example:
        >>> ShardedPrecision("bf16-mixed").precision
        'bf16-mixed'
    """

    def __init__(self, precision: NPUPrecisionName = "32-true", scaler: torch.amp.GradScaler | None = None) -> None:
        if precision == "16-mixed" and scaler is None:
            scaler = MixedGradScaler("npu")
        super().__init__(precision, None if scaler is None else MixedGradScaler.like(scaler))

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip the unscaled gradients; the norm is that of the whole model."""
        if clip_val <= 0:
            return
        if self.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)  # which explains why it cannot
        parameters = list(self.main_params(optimizer))
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            clip_value(parameters, clip_val)
        else:
            clip_norm(parameters, clip_val)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the scaler's state under the name that other strategies of this package look for."""
        if type(self).__qualname__ in checkpoint:
            checkpoint[NPUPrecision.__qualname__] = checkpoint.pop(type(self).__qualname__)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Find the scaler's state under that name."""
        if NPUPrecision.__qualname__ in checkpoint:
            checkpoint[type(self).__qualname__] = checkpoint[NPUPrecision.__qualname__]


def sharded_precision(plugin: Precision | None) -> Precision:
    """Replace a precision plugin by its twin for sharded models.

    Args:
        plugin: What ``Trainer(precision=...)`` or the user chose.

    Returns:
        The twin; a plugin that is not known as it is.

    Raises:
        MisconfigurationException: If an NPU cannot do it.

    Example:
        >>> type(sharded_precision(None)).__name__
        'ShardedPrecision'
    """
    chosen = npu_precision(plugin)
    if chosen is None or type(chosen) is Precision:
        return ShardedPrecision()
    if type(chosen) in (NPUPrecision, MixedPrecision):
        known = cast(NPUPrecision, chosen)
        return ShardedPrecision(cast(NPUPrecisionName, known.precision), known.scaler)
    return chosen
