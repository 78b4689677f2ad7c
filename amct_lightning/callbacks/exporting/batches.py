"""Inputs to export with and batches to verify with, from the dataloaders of a training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from amct_lightning.callbacks.converting.inputs import BatchToInput, batch_inputs, before_forward, find_forwards
from amct_lightning.graph.forward import Forward, InputData
from amct_lightning.graph.preserve import preserved

_MOST = 32
"""Into how many batches a large one is cut for a network that takes few samples at a time."""


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

        They have as many samples as the input that the network was exported with. Where the converted part of the
        module has an input of its own, the module does not run on batches, or these have fewer samples, that input is
        the only one.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            call: The call of the model.
            number: How many.
        """
        if call.run is not pl_module:
            return [call.input_data][:number]
        found: list[InputData] = []
        for batch in islice(_drawn(trainer, pl_module), number):
            given = (given for given in self._inputs_of(call.run, batch) if _runs(call.run, given))
            found += [part for one in islice(given, 1) for part in _cut(one, call.input_data)]
        return found or [call.input_data][:number]

    def _inputs_of(self, run: nn.Module, batch: Any) -> list[InputData]:
        return [self.batch_to_input(batch)] if self.batch_to_input is not None else batch_inputs(run, batch)


def _drawn(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
    loaders = trainer.val_dataloaders or trainer.train_dataloader
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    for drawn, _, _ in iter(combined):
        yield before_forward(trainer, pl_module, drawn)


def _cut(given: InputData, exported: InputData) -> list[InputData]:
    """Cut a batch into such as a network takes that was exported with another one; what is left over is left out.

    Args:
        given: The batch.
        exported: What the network was exported with.

    Example:
        >>> [len(part) for part in _cut(torch.zeros(5, 3), torch.zeros(2, 3))]
        [2, 2]
    """
    size, count = _samples(exported), _samples(given)
    if size is None or count is None:
        return [given]
    starts = range(0, count - count % size, size)[:_MOST]
    return [tree_map_only(Tensor, lambda x, at=start: x[at : at + size], given) for start in starts]


def _samples(given: InputData) -> int | None:
    """Return how many samples an input has, if its tensors agree."""
    counts = {leaf.shape[0] if leaf.dim() else 0 for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    return counts.pop() or None if len(counts) == 1 else None


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
