"""Inputs to export with and batches to verify with, from the dataloaders of a training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

from amct_lightning.callbacks.converting.inputs import BatchToInput, batch_inputs, before_forward, find_forwards
from amct_lightning.graph.forward import Forward, InputData
from amct_lightning.graph.preserve import preserved


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, as the conversion did it.

    Attributes:
        input_data: The user's choice: arguments for the converted module.
        batch_to_input: Turns a batch into the arguments of the LightningModule's forward.
    """

    input_data: Any
    batch_to_input: BatchToInput | None

    def call(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> Forward:
        """Return a call that works, on the module or on the converted part of it.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            model: The converted part of it.

        Raises:
            RuntimeError: If the module has no forward that could be exported.
        """
        forwards = find_forwards(trainer, pl_module, model, self.input_data, self.batch_to_input)
        first: Exception | None = None
        for call in forwards.calls:
            if call.method != "__call__":
                raise RuntimeError(
                    f"{type(pl_module).__name__} has no forward of its own, and a file can hold nothing else. Define "
                    "one, or convert the part of it that is to be deployed (QuantRetrainCallback(submodule=...))."
                )
            try:
                _run(call.run, call.input_data)
            except Exception as error:  # the model's own, of whatever kind: the next call may fit
                first = first or error
                continue
            return call
        raise RuntimeError(f"{type(pl_module).__name__} does not run on its example input or batch.") from first

    def batches(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, call: Forward, number: int
    ) -> list[InputData]:
        """Return inputs from the batches that the training is evaluated on, or else from those that it trains on.

        Where the converted part of the module has an input of its own, that is the only one.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            call: The call of the model.
            number: How many.
        """
        if self.input_data is not None or call.run is not pl_module:
            return [call.input_data][:number]
        return [
            next(given for given in self._inputs_of(call.run, batch) if _runs(call.run, given))
            for batch in islice(_drawn(trainer, pl_module), number)
        ]

    def _inputs_of(self, run: nn.Module, batch: Any) -> list[InputData]:
        return [self.batch_to_input(batch)] if self.batch_to_input is not None else batch_inputs(run, batch)


def _drawn(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
    loaders = trainer.val_dataloaders or trainer.train_dataloader
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    for drawn, _, _ in iter(combined):
        yield before_forward(trainer, pl_module, drawn)


def _runs(model: nn.Module, input_data: InputData) -> bool:
    try:
        _run(model, input_data)
    except Exception:  # as above
        return False
    return True


def _run(model: nn.Module, input_data: InputData) -> None:
    with preserved(model), torch.no_grad():
        if isinstance(input_data, dict):
            model(**input_data)
        else:
            model(*(input_data if isinstance(input_data, tuple) else (input_data,)))
