"""Find an input that shows the data flow of a model: the example input, or the first batch of a dataloader."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from amct_lightning.graph.trace import InputData

BatchToInput = Callable[[Any], InputData]

_REMEDY = (
    "Give QuantRetrainCallback(input_data=...), set `example_input_array` on the LightningModule, or give "
    "QuantRetrainCallback(batch_to_input=...) that turns a batch into the arguments of forward."
)


def find_input(
    trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module, batch_to_input: BatchToInput | None
) -> tuple[nn.Module, InputData]:
    """Return what is to be run to see the data flow of a model, and arguments for the LightningModule's forward.

    Args:
        trainer: The trainer, in its setup phase.
        pl_module: The LightningModule.
        model: The part of it to be seen, which is run itself if the LightningModule has no forward of its own.
        batch_to_input: Turns a batch into the arguments; by default a batch ``(x, ...)`` gives ``x``, a mapping
            the entries that forward takes.

    Returns:
        The module, and a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ValueError: If there is no example input and no batch can be drawn or understood.
    """
    run = model if type(pl_module).forward is pl.LightningModule.forward else pl_module
    if pl_module.example_input_array is not None:
        return run, pl_module.example_input_array
    batch = _first_batch(trainer, pl_module)
    return run, batch_to_input(batch) if batch_to_input else _usual_input(pl_module, batch)


def _usual_input(module: nn.Module, batch: Any) -> InputData:
    """Understand the usual batches: a tensor, ``(x, ...)``, or a mapping with the names of forward's parameters."""
    parameters = inspect.signature(module.forward).parameters
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch
    named = {key: batch[key] for key in batch if key in parameters} if isinstance(batch, Mapping) else {}
    if named:
        return named
    raise ValueError(
        f"The first batch is a {type(batch).__name__} from which the arguments of forward({', '.join(parameters)}) "
        f"cannot be told. {_REMEDY}"
    )


def _first_batch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    try:
        with isolate_rng():
            loaders = _data_source(trainer).dataloader()
            with _preserved_generators(loaders):
                combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
                batch, _, _ = next(iter(combined))
                return _before_forward(trainer, pl_module, batch)
    except Exception as error:
        raise ValueError(
            f"No batch could be drawn from the dataloader to observe the data flow of {type(pl_module).__name__}: "
            f"{type(error).__name__}: {error}. {_REMEDY}"
        ) from error


def _data_source(trainer: pl.Trainer) -> Any:
    """Return where the dataloaders of the current stage come from.

    Private in Lightning (seen in 2.5 and 2.6): dataloaders given to ``fit(model, loader)`` are nowhere public until
    the loops set them up, which is after the model must have its final structure.
    """
    loops = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    loop = loops[TrainerFn(trainer.state.fn)] if trainer.state.fn else trainer.fit_loop
    return cast(Any, loop)._data_source


def _before_forward(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """Apply the batch hooks that Lightning applies before a step, from the datamodule where it has them."""
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        datamodule = getattr(trainer, "datamodule", None)
        use_datamodule = datamodule is not None and is_overridden(hook, datamodule)
        batch = getattr(datamodule if use_datamodule else pl_module, hook)(batch, 0)
    return batch


@contextmanager
def _preserved_generators(loaders: Any) -> Iterator[None]:
    """Put back the random generators that drawing a batch advances, so that training sees the same order."""
    generators = {}
    for loader in torch.utils._pytree.tree_leaves(getattr(loaders, "iterables", loaders)):
        sampler = getattr(loader, "sampler", None)
        for owner in (loader, sampler, getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generators[id(generator)] = (generator, generator.get_state())
    try:
        yield
    finally:
        for generator, state in generators.values():
            generator.set_state(state)
