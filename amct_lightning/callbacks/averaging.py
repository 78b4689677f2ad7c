"""Averages of weights beside quantization: they begin with calibrated factors, and hold frozen ones as they are."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim.swa_utils import AveragedModel

from amct_lightning.callbacks.schedule.phases import BATCH_NORMS, PhaseRunner
from amct_lightning.conversion.copies import averaged_copies
from amct_lightning.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer

_BOOKS = ("calibrated_batches", "initialized", "scale_frozen")
# Buffers that say what a quantizer's tensors mean. Their average means nothing: 0.9 * 3 + 0.1 * 3 is not quite 3, and
# as an integer it is 2.


class Averages:
    """What other callbacks average of a converted module, kept in line with its quantizers.

    Args:
        trainer: The Trainer, whose callbacks may average weights.
        model: The converted module.
    """

    def __init__(self, trainer: pl.Trainer, model: nn.Module) -> None:
        self._twins: dict[nn.Module, list[nn.Module]] = {}
        self._beginning: set[nn.Module] = set()
        averages = averaged_modules(trainer)
        for copied, original in averaged_copies(trainer.lightning_module):
            for name, module in original.named_modules():
                if isinstance(module, (Quantizer, *BATCH_NORMS)):
                    self._twins.setdefault(module, []).append(copied.get_submodule(name))
        if not averages:
            return
        prefix = next(name for name, module in trainer.lightning_module.named_modules() if module is model)
        for name, module in model.named_modules():
            if isinstance(module, (Quantizer, *BATCH_NORMS)):
                path = ".".join(filter(None, (prefix, name)))
                self._twins.setdefault(module, []).extend(average.get_submodule(path) for average in averages)

    def start_batch(self) -> None:
        """Note the quantizers whose factors are still placeholders."""
        self._beginning.update(module for module in self._twins if _is_beginning(module))

    def end_batch(self) -> None:
        """Let the averages go on with the factors that quantizers have got in the meantime."""
        for module in [module for module in self._beginning if not _is_beginning(module)]:
            self._beginning.remove(module)
            for twin in self._twins[module]:
                twin.load_state_dict(module.state_dict())

    def settle(self, phases: PhaseRunner) -> None:
        """Give the averages what cannot be averaged, and what is frozen; needed whenever they are about to be used.

        Args:
            phases: The phases of the layers.
        """
        frozen = phases.frozen_modules() if self._twins else ()
        for module, twins in self._twins.items():
            state = module.state_dict()
            if module not in frozen:
                state = {name: value for name, value in state.items() if name in _BOOKS}
            for twin in twins if state else ():
                twin.load_state_dict({**twin.state_dict(), **state})


def averaged_modules(trainer: Any) -> list[nn.Module]:
    """Return the LightningModules that callbacks average into.

    Lightning (2.5, 2.6) has no public way to them: WeightAveraging and its subclasses keep an ``AveragedModel``, and
    StochasticWeightAveraging a copy of the module, in ``_average_model``.
    """
    models = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [m.module if isinstance(m, AveragedModel) else m for m in models if isinstance(m, nn.Module)]


def _is_beginning(module: nn.Module) -> bool:
    """Tell whether the factors of a quantizer are placeholders, or not agreed on among the processes."""
    if isinstance(module, ActivationQuantizer):
        return module.calibrating or module.fresh
    return isinstance(module, WeightQuantizer) and module.starting
