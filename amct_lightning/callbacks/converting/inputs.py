"""Find calls that show the data flow of a model: on the example input, or on the first batch of a dataloader."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from amct_lightning.callbacks.converting.observed import in_any_process, in_precision_of, unlogged
from amct_lightning.graph.forward import Forward, InputData

BatchToInput = Callable[[Any], InputData]

_REMEDY = (
    "Give QuantRetrainCallback(input_data=...), set `example_input_array` on the LightningModule, or give "
    "QuantRetrainCallback(batch_to_input=...) that turns a batch into the arguments of forward."
)
_STEPS = {
    TrainerFn.FITTING: ("training_step", "validation_step"),
    TrainerFn.VALIDATING: ("validation_step",),
    TrainerFn.TESTING: ("test_step", "validation_step"),
    TrainerFn.PREDICTING: ("predict_step",),
}


@dataclass(frozen=True)
class Forwards:
    """Calls that may show the data flow of a model.

    Attributes:
        calls: The calls, the most likely one first.
        problem: What is to be said if none of them runs; empty if the model's own error says it all.
    """

    calls: list[Forward]
    problem: str = ""

    def failure(self, error: RuntimeError) -> Exception:
        """Return the error to raise after none of the calls ran.

        Args:
            error: That of the first call.
        """
        if not self.problem:
            return error
        failure = ValueError(f"{self.problem} {_REMEDY}")
        failure.__cause__ = error
        return failure


def find_forwards(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    model: nn.Module,
    input_data: InputData | None,
    batch_to_input: BatchToInput | None,
) -> Forwards:
    """Find calls that may show the data flow of a model.

    Args:
        trainer: The trainer, in its setup phase.
        pl_module: The LightningModule.
        model: The part of it to be seen.
        input_data: The user's choice: arguments for ``model``.
        batch_to_input: Turns a batch into the arguments of the LightningModule's forward; by default these are told
            from the batch and the signature of forward.

    Returns:
        The calls. A LightningModule without a forward of its own is seen in one of its steps, unless a part of it is
        to be seen, which then runs itself.

    Raises:
        ValueError: If there is no example input and no batch can be drawn.
    """
    problem = ""
    has_forward = type(pl_module).forward is not pl.LightningModule.forward
    steps = [] if has_forward or model is not pl_module else _steps(trainer, pl_module)
    if steps:
        batch = _first_batch(trainer, pl_module)
        calls = [Forward(pl_module, (batch, 0), method=step) for step in steps]
    elif input_data is not None:
        calls = [Forward(model, input_data)]
    else:
        run = pl_module if has_forward else model
        inputs: list[InputData]
        if pl_module.example_input_array is not None:
            inputs = [pl_module.example_input_array]
        elif batch_to_input is not None:
            inputs = [batch_to_input(_first_batch(trainer, pl_module))]
        else:
            inputs, problem = _usual_inputs(run, _first_batch(trainer, pl_module))
        calls = [Forward(run, given) for given in inputs]
    sees_training = trainer.state.fn == TrainerFn.FITTING
    calls = [
        replace(call, sees_training=sees_training, prepare=partial(unlogged, trainer), agree=in_any_process)
        for call in calls
    ]
    return Forwards([*calls, *(_in_precision(trainer, call) for call in calls)], problem)


def _steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """Return the steps of the present stage that a module without a forward has; a step that optimizes needs more."""
    names = _STEPS[TrainerFn(trainer.state.fn)] if trainer.state.fn else ()
    return [
        name
        for name in names
        if is_overridden(name, pl_module) and (name != "training_step" or pl_module.automatic_optimization)
    ]


def _in_precision(trainer: pl.Trainer, call: Forward) -> Forward:
    """Return a call as the Trainer makes it: a model whose weights are in low precision may not run otherwise."""
    given = trainer.precision_plugin.convert_input(call.input_data)
    return replace(call, input_data=given, context=partial(in_precision_of, trainer, call.run))


def batch_inputs(module: nn.Module, batch: Any) -> list[InputData]:
    """Return what of a batch may be the arguments of a module's forward, the most likely first.

    Args:
        module: The module.
        batch: A batch of a dataloader.
    """
    return _usual_inputs(module, batch)[0]


def _usual_inputs(module: nn.Module, batch: Any) -> tuple[list[InputData], str]:
    """Understand the usual batches: a tensor, ``(x, ...)``, or a mapping with the names of forward's parameters.

    A sequence can also hold all the arguments, and forward may take the batch as a whole.

    Returns:
        What may be the arguments of forward, and the problem if that is not likely.
    """
    signature = inspect.signature(module.forward)
    inputs = [given for given in _arguments_in(batch, signature) if _fits(signature, given)]
    if inputs:
        return [*inputs, (batch,)], ""
    return [(batch,)], (
        f"The first batch is a {type(batch).__name__} from which the arguments of "
        f"forward({', '.join(signature.parameters)}) cannot be told."
    )


def _arguments_in(batch: Any, signature: inspect.Signature) -> Iterator[InputData]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
        named = {key: batch[key] for key in batch if takes_all or key in signature.parameters}
        if named:
            yield named
    elif isinstance(batch, (tuple, list)) and batch:
        if isinstance(batch[0], (Tensor, Mapping)):
            yield from _arguments_in(batch[0], signature)
        yield tuple(batch)


def _fits(signature: inspect.Signature, given: InputData) -> bool:
    args: tuple[Any, ...] = given if isinstance(given, tuple) else () if isinstance(given, Mapping) else (given,)
    try:
        signature.bind(*args, **(given if isinstance(given, Mapping) else {}))
    except TypeError:
        return False
    return True


def _first_batch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    try:
        with isolate_rng():
            loaders = _data_source(trainer).dataloader()
            with _preserved_generators(loaders):
                # Lightning trains on all loaders at once, and evaluates one after another.
                mode: Any = "max_size_cycle" if trainer.state.fn == TrainerFn.FITTING else "sequential"
                combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, mode)
                batch, _, _ = next(iter(combined))
                return before_forward(trainer, pl_module, batch)
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


def before_forward(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """Apply the batch hooks that Lightning applies before a step, from the datamodule where it has them.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        batch: A batch of a dataloader.
    """
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
