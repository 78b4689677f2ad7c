"""A distillation in the runs of a Trainer: the teacher, the hooks, and the term in the loss."""

from __future__ import annotations

import copy
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from amct_lightning.callbacks.checks import find_submodule
from amct_lightning.callbacks.converting.saved_plan import checkpoint_to_load
from amct_lightning.callbacks.distill.listening import Listener
from amct_lightning.callbacks.distill.matching import chosen_module, taught_layers, taught_modules
from amct_lightning.callbacks.distill.settings import Distill
from amct_lightning.callbacks.distill.step import TaughtStep
from amct_lightning.callbacks.distill.teacher import Teacher, make_teacher
from amct_lightning.callbacks.schedule.schedule import QuantSchedule
from amct_lightning.modules import QATLayer
from amct_lightning.modules.convert import float_parameters
from amct_lightning.wording import abbreviated


class Distillation:
    """What :class:`QuantRetrainCallback` does of :class:`Distill`.

    Args:
        settings: What the user wants.
    """

    def __init__(self, settings: Distill) -> None:
        self.settings = settings
        self._teacher: Teacher | None = None
        self._student: nn.Module | None = None
        self._expected: str | None = None
        self._listener: Listener | None = None
        self._step: TaughtStep | None = None
        self._held: list[nn.Parameter] = []

    def prepare(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        submodule: str | None,
        float_checkpoint: str | Path | None,
        is_fitting: bool,
    ) -> None:
        """Copy the teacher, before the model is converted and before a checkpoint is loaded into it.

        Args:
            trainer: The Trainer, in its setup phase.
            pl_module: The LightningModule.
            submodule: Dotted name of the part to convert, ``None`` for all of it.
            float_checkpoint: The float weights that the run begins with, or the run that it resumes did.
            is_fitting: Whether the module is about to be trained.

        Raises:
            ValueError: If it cannot be distilled.
        """
        if is_fitting and not pl_module.automatic_optimization:
            raise ValueError(
                f"QuantRetrainCallback(distill=...): {type(pl_module).__name__} optimizes by hand "
                "(automatic_optimization is False), and training_step returns no loss that a term could be added to. "
                "Use automatic optimization, or add a teacher to training_step yourself, as docs/distillation.md shows."
            )
        settings = self.settings
        part = chosen_module(pl_module, settings.module or "")
        is_converted = any(isinstance(module, QATLayer) for module in part.modules())
        if self._teacher is not None and self._student is pl_module and is_converted:
            return
        # A resumed run has the weights of the checkpoint later; the teacher is the model that the first run began with.
        source = settings.teacher or (float_checkpoint if checkpoint_to_load(trainer) else None)
        if not is_fitting and (is_converted or source):
            return  # a training that may come later can take the file, and nothing else
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        with nullcontext() if is_fitting else suppress(ValueError):
            self._teacher = make_teacher(pl_module, settings.module or "", source, submodule, settings.offload, dtype)
            self._student = pl_module

    def hold_weights(self, pl_module: nn.Module) -> None:
        """Leave everything but quantization factors out of the training, if that is wanted.

        Args:
            pl_module: The LightningModule, before its optimizers are made.
        """
        if self.settings.factors_only:
            self._held = [parameter for parameter in float_parameters(pl_module) if parameter.requires_grad]
            for parameter in self._held:
                parameter.requires_grad_(False)

    def expect(self, digest: str | None) -> None:
        """Take note of the teacher of the run that a checkpoint is from.

        Args:
            digest: Its digest, ``None`` if it had no teacher.
        """
        self._expected = digest

    def begin(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        model: nn.Module,
        max_epochs: int | None,
        schedule: QuantSchedule | None,
    ) -> None:
        """Put the teacher on its device and the term into the loss, once the student is where it is trained.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule.
            model: The converted module.
            max_epochs: Number of epochs of the training.
            schedule: When layers are quantized.

        Raises:
            ValueError: If the settings do not fit the model, or the teacher is another one than before.
        """
        assert self._teacher is not None
        self.settings.weight_at(0.0, max_epochs)  # refuses shares of nothing
        first = 0 if schedule is None else schedule.first_epoch(max_epochs)
        if first and self.settings.teacher is None:
            rank_zero_warn(
                f"The layers run in float until epoch {first}, and the teacher has the weights that the module begins "
                "with. If these are not trained yet, train in float first, and quantize in a run of its own with "
                "float_checkpoint; or name a trained teacher: Distill(teacher='float.ckpt')."
            )
        students = taught_modules(pl_module, model, self.settings.module)
        layers = taught_layers(model, self.settings.layers)
        prefix = next(name for name, module in pl_module.named_modules() if module is model)
        full = {name: f"{prefix}.{name}" if prefix else name for name in layers}
        outside = [name for name in layers if students[0] and not f"{full[name]}.".startswith(f"{students[0]}.")]
        if outside:
            raise ValueError(
                f"Distill(layers=...): {abbreviated(outside)} are outside of '{students[0]}', which the teacher runs. "
                "Leave them out, or name what holds them with Distill(module=...)."
            )
        teacher = self._teacher
        teacher.narrow(students[0])
        teacher.place(trainer, pl_module)
        self._check_same(teacher.digest)
        self._listener = Listener(teacher.answer)
        modules = {name: find_submodule(pl_module, name or None) for name in students}
        self._listener.attach(modules, layers, {name: teacher.part(full[name]) for name in layers})
        self._step = TaughtStep(self.settings, trainer, pl_module, self._listener, modules, layers, max_epochs)
        outputs = [] if self.settings.output_loss is None else ["its output"]
        outputs += [f"layers {abbreviated(layers)}"] if layers else []
        rank_zero_info(
            f"QuantRetrainCallback: distills from the float {type(pl_module).__name__} of "
            f"{self.settings.teacher or 'its conversion'} (digest {teacher.digest[:12]}): "
            f"{' and '.join(outputs)}."
        )

    def end(self) -> None:
        """Take everything off again; the teacher stays for another training of the module."""
        if self._step is not None:
            self._step.remove()
        if self._listener is not None:
            self._listener.detach()
            if self._teacher is not None:
                self._teacher.rest()
        for parameter in self._held:
            parameter.requires_grad_(True)
        self._step, self._listener, self._held, self._expected = None, None, [], None

    def entry(self) -> dict[str, Any]:
        """Return what a checkpoint has to know of the teacher, which is not in it."""
        return {} if self._teacher is None or not self._teacher.digest else {"teacher": self._teacher.digest}

    def _check_same(self, digest: str) -> None:
        if self._expected in (None, digest):
            return
        found = f"with digest {self._expected[:12]}" if self._expected else ""
        if self.settings.teacher is not None:
            rank_zero_warn(
                f"The checkpoint was written with another teacher ({found}) than '{self.settings.teacher}' (digest "
                f"{digest[:12]}): the training goes on with the latter."
            )
            return
        raise ValueError(
            f"The checkpoint was written with another teacher ({found}) than the module has now (digest "
            f"{digest[:12]}). The teacher is not in the checkpoint: it is made of the float weights that the module "
            "has when it is converted, and these are others than when the training began. Give them to the module as "
            "then, or as a file: Distill(teacher='float.ckpt')."
        )


def with_fixed_norms(settings: Distill | None, schedule: QuantSchedule | None) -> QuantSchedule | None:
    """Let a training of factors only freeze the batch normalization from the first epoch, unless a schedule says when.

    Args:
        settings: The settings, ``None`` without a distillation.
        schedule: The schedule.

    Example:
        >>> with_fixed_norms(Distill(factors_only=True), None).freeze_bn
        0
    """
    if settings is None or not settings.factors_only or (schedule is not None and schedule.freeze_bn is not None):
        return schedule
    fixed = QuantSchedule() if schedule is None else copy.copy(schedule)
    fixed.freeze_bn = 0
    return fixed
