"""Running a LightningModule outside of its loops: in the precision of the training, and without a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn


@contextmanager
def unlogged(trainer: pl.Trainer, run: nn.Module) -> Iterator[None]:
    """Let whatever a module logs in a block go nowhere.

    Args:
        trainer: The Trainer, which is attached to the module during the block.
        run: The module that runs, or a copy of it.
    """
    modules = [module for module in run.modules() if isinstance(module, pl.LightningModule)]
    # Private in Lightning (2.5, 2.6): the public property raises an error for a copy, which has no Trainer.
    trainers = [module._trainer for module in modules]
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    for module in modules:
        module._trainer = trainer
        module.__dict__.update(log=log_nothing, log_dict=log_nothing)
    try:
        yield
    finally:
        trainer.loggers = loggers
        for module, before in zip(modules, trainers, strict=True):
            module._trainer = before
            for name in ("log", "log_dict"):
                module.__dict__.pop(name, None)


def log_nothing(*_args: Any, **_kwargs: Any) -> None:
    """Log nothing."""


@contextmanager
def in_precision_of(trainer: pl.Trainer, run: nn.Module) -> Iterator[None]:
    """Run a block as the precision plugin of the Trainer runs a step.

    The module is still on the host, where autocast of another device has no effect.

    Args:
        trainer: The Trainer.
        run: The module that runs.
    """
    plugin = trainer.precision_plugin
    precision = str(getattr(plugin, "precision", "32-true"))
    device = next((parameter.device.type for parameter in run.parameters()), "cpu")
    with ExitStack() as contexts:
        contexts.enter_context(plugin.forward_context())
        if precision.endswith("-mixed") and device != "meta":
            dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
            contexts.enter_context(torch.autocast(device, dtype=dtype))
        yield


def in_any_process(names: set[str]) -> set[str]:
    """Return the names that any process gives; a collective where there are several.

    Args:
        names: The names of this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return names
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    return set().union(*gathered)
