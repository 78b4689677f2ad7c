"""Averages of weights beside quantization: factors from before a calibration are not to be part of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from amct_lightning.quantizers import ActivationQuantizer


@torch.no_grad()
def start_averages_anew(trainer: pl.Trainer, model: nn.Module, fresh: Collection[ActivationQuantizer]) -> None:
    """Let averaged models go on with the ranges that a calibration has just found.

    Args:
        trainer: The Trainer, whose callbacks may average weights.
        model: The converted module.
        fresh: The quantizers that were calibrated.
    """
    averages = averaged_modules(trainer)
    if not averages:
        return
    prefix = next(name for name, module in trainer.lightning_module.named_modules() if module is model)
    live = {name: module for name, module in model.named_modules() if module in fresh}
    for average in averages:
        for name, quantizer in live.items():
            average.get_submodule(".".join(filter(None, (prefix, name)))).load_state_dict(quantizer.state_dict())


def averaged_modules(trainer: Any) -> list[nn.Module]:
    """Return the LightningModules that callbacks average into.

    Lightning (2.5, 2.6) has no public way to them: WeightAveraging and its subclasses keep an ``AveragedModel``, and
    StochasticWeightAveraging a copy of the module, in ``_average_model``.
    """
    models = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [m.module if isinstance(m, AveragedModel) else m for m in models if isinstance(m, nn.Module)]
