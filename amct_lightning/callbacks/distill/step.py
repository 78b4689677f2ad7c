"""The term in the loss: what stands in front of a module's ``training_step`` while it is taught."""

from __future__ import annotations

from collections.abc import Mapping
from functools import update_wrapper
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from amct_lightning.callbacks.distill.listening import Call, Listener
from amct_lightning.callbacks.distill.losses import divergence, first_tensor, squared_error, tensor_in
from amct_lightning.callbacks.distill.settings import Distill
from amct_lightning.wording import abbreviated

METRIC = "distill_loss"
"""What the term is logged as."""


class TaughtStep:
    """A ``training_step`` that adds the term of a teacher to the loss.

    No hook of Lightning can replace the loss: ``on_before_backward`` is given it when DDP has looked through its graph.
    So this is set as an attribute of the one module, where Lightning looks ``training_step`` up for every batch, and
    taken off at the end. A copy of the module has its own ``training_step`` again.

    Args:
        settings: How to teach.
        trainer: The Trainer.
        pl_module: The LightningModule.
        listener: Hears the calls of a step.
        students: The modules whose calls are taught, by name.
        layers: The layers that are compared, by name.
        max_epochs: Number of epochs of the training.
    """

    def __init__(
        self,
        settings: Distill,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        listener: Listener,
        students: Mapping[str, nn.Module],
        layers: Mapping[str, nn.Module],
        max_epochs: int | None,
    ) -> None:
        self._settings = settings
        self._trainer = trainer
        self._pl_module = pl_module
        self._listener = listener
        self._students = students
        self._layers = layers
        self._max_epochs = max_epochs
        self._was_called = False
        self._before = pl_module.__dict__.get("training_step")
        self._original = pl_module.training_step
        update_wrapper(self, self._original)  # Lightning looks at its parameters
        pl_module.training_step = self  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the module its ``training_step`` back."""
        if self._pl_module.__dict__.get("training_step") is self:
            del self._pl_module.training_step
            if self._before is not None:
                self._pl_module.training_step = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step; return what it returns, its loss with the term."""
        weight = self._weight()
        if weight == 0:
            return self._original(*args, **kwargs)
        with self._listener.listening() as calls:
            output = self._original(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor) or not self._is_taught(calls):
                return output
            term = weight * self._term(calls)
        self._pl_module.log(METRIC, term.detach(), on_step=True, on_epoch=False, batch_size=1)
        loss = loss + term if self._settings.task_weight == 1 else self._settings.task_weight * loss + term
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_step, (self._pl_module,)

    def _weight(self) -> float:
        loop, batches = self._trainer.fit_loop, float(self._trainer.num_training_batches)
        share = max(loop.batch_idx, 0) / batches if 0 < batches < float("inf") else 0.0
        return self._settings.weight_at(self._trainer.current_epoch + share, self._max_epochs)

    def _is_taught(self, calls: list[Call]) -> bool:
        """Tell whether there was a call; it is an error if the first step has none, and a matter of the step later."""
        if not calls and not self._was_called:
            names = abbreviated(name or type(self._pl_module).__name__ for name in self._students)
            raise RuntimeError(
                f"Distillation: training_step of {type(self._pl_module).__name__} calls none of {names} with "
                "gradients, so there is nothing to compare with the teacher. Name the module that it does call: "
                "Distill(module='net'). A call inside of checkpoint(..., use_reentrant=True) has no gradients: use "
                "use_reentrant=False."
            )
        if calls and not self._was_called:
            self._warn_of_silent(calls)
        self._was_called |= bool(calls)
        return bool(calls)

    def _warn_of_silent(self, calls: list[Call]) -> None:
        heard = {name for call in calls for name in (*call.learned_layers, *call.taught_layers)}
        silent = [name for name in self._layers if name not in heard]
        if silent:
            rank_zero_warn(
                f"Distill(layers=...): {abbreviated(silent)} were not called in the first step, so their outputs "
                "cannot be compared. A parent may use their weights without calling them; name the parent instead."
            )

    def _term(self, calls: list[Call]) -> Tensor:
        """Add up the terms of the calls."""
        terms = [term for call in calls for term in self._terms_of(call)]
        if not terms:
            raise RuntimeError(
                f"Distillation: none of the layers {abbreviated(self._layers)} was called, and output_loss is None, so "
                "there is nothing to compare with the teacher."
            )
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    def _terms_of(self, call: Call) -> list[Tensor]:
        terms = []
        name = repr(call.name) if call.name else type(self._pl_module).__name__
        if self._settings.output_loss is not None:
            key = self._settings.output
            learned, taught = tensor_in(call.learned, key, name), tensor_in(call.taught, key, name)
            _check_pair(learned, taught, name, self._students[call.name])
            is_kl = self._settings.output_loss == "kl"
            terms.append(
                divergence(learned, taught, self._settings.temperature) if is_kl else squared_error(learned, taught)
            )
        errors = [error for layer in self._layers for error in self._errors_of(call, layer)]
        if errors:
            terms.append(self._settings.layer_weight * torch.stack(errors).mean())
        return terms

    def _errors_of(self, call: Call, layer: str) -> list[Tensor]:
        learned, taught = call.learned_layers.get(layer, []), call.taught_layers.get(layer, [])
        if learned and len(learned) != len(taught):
            raise RuntimeError(
                f"Distill(layers=...): '{layer}' was called {len(learned)} times by the student and {len(taught)} "
                "times by the teacher, which runs in evaluation mode. Leave it out, or name a module around it."
            )
        errors = []
        for ours, theirs in zip(map(first_tensor, learned), map(first_tensor, taught), strict=False):
            if ours is None or theirs is None:
                raise RuntimeError(f"Distill(layers=...): the output of '{layer}' has no tensor to compare.")
            _check_pair(ours, theirs, f"'{layer}'", self._layers[layer])
            errors.append(squared_error(ours, theirs))
        return errors


def _own_step(pl_module: pl.LightningModule) -> Any:
    """Return the step that a copy of a module has by its class."""
    return MethodType(type(pl_module).training_step, pl_module)


def _check_pair(learned: Tensor, taught: Tensor, name: str, module: nn.Module) -> None:
    if learned.shape != taught.shape:
        raise RuntimeError(
            f"Distillation: the output of {name} has the shape {tuple(learned.shape)}, that of its teacher, in "
            f"evaluation mode, {tuple(taught.shape)}. Name a part that gives both alike: "
            "Distill(module=..., output=...)."
        )
    if not learned.requires_grad and any(parameter.requires_grad for parameter in module.parameters()):
        raise RuntimeError(
            f"Distillation: the output of {name} has no gradient although it is trained: it is detached, or inside of "
            "checkpoint(..., use_reentrant=True). Use use_reentrant=False, or name a module around it."
        )
