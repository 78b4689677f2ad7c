"""The teacher: a copy of the float model, outside of the module, its checkpoints, optimizers and buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from amct_lightning.callbacks.checkpoints.float_weights import load_float_weights
from amct_lightning.callbacks.checks import find_submodule
from amct_lightning.callbacks.converting.observed import log_nothing
from amct_lightning.conversion.convert import revert_layers
from amct_lightning.graph.forward import copy_of
from amct_lightning.modules import QATLayer
from amct_lightning.modules.folding import is_sharded


class Teacher:
    """A float network that answers without gradients, in evaluation mode.

    Args:
        module: The network, which nothing else uses.
        name: Its dotted name in the LightningModule that it is a copy of, empty for a copy of all of it.
        offload: Whether its weights stay on the host between its forwards.
        dtype: What it computes in; ``None`` as the student.

    Attributes:
        digest: Tells its weights from others; the same whatever ``dtype`` is.
    """

    def __init__(self, module: nn.Module, name: str, offload: bool, dtype: torch.dtype | None) -> None:
        self._module = module.requires_grad_(False).eval()
        self._name = name
        self._offload = offload
        self._dtype = dtype
        self._inputs_as: torch.dtype | None = None
        self._device = torch.device("cpu")
        self.digest = ""

    def part(self, name: str) -> nn.Module:
        """Return what stands for a part of the LightningModule.

        Args:
            name: Dotted name of the part there.
        """
        return self._module.get_submodule(name[len(self._name) :].removeprefix("."))

    def narrow(self, name: str) -> None:
        """Let go of all but one part, if it is inside.

        Args:
            name: Dotted name of the part in the LightningModule.
        """
        self._module, self._name = self.part(name), name

    def place(self, trainer: pl.Trainer, pl_module: nn.Module) -> None:
        """Get ready to answer: on the device, in the dtype that is wanted, with the weights of rank 0.

        Args:
            trainer: The Trainer.
            pl_module: The student, where and in the dtype in which it is trained.
        """
        device: torch.device = trainer.strategy.root_device
        student = find_submodule(pl_module, self._name or None)
        if not self.digest:
            self.digest = trainer.strategy.broadcast(_digest_of(self._module))
        for inner in self._module.modules():
            if isinstance(inner, pl.LightningModule):  # its forward may ask for the Trainer, or log
                inner.trainer = trainer
                inner.__dict__.update(log=log_nothing, log_dict=log_nothing)
        if self._dtype is not None:
            self._module.to(self._dtype)
        else:
            _take_dtypes_of(student, self._module)
        self._inputs_as = self._dtype
        if self._dtype is None and is_sharded(student):  # which casts its inputs itself
            floats = (tensor.dtype for tensor in _tensors_of(self._module) if tensor.is_floating_point())
            self._inputs_as = next(floats, None)
        self._module.to(device)
        if dist.is_available() and dist.is_initialized():
            for tensor in _tensors_of(self._module):
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)
        self._device = device
        if self._offload:
            nn.Module.to(self._module, "cpu")  # a LightningModule goes on to name the device as its own
            if device.type != "cpu":
                with suppress(RuntimeError):  # where there is none, a copy is waited for
                    for tensor in _tensors_of(self._module):
                        tensor.data = tensor.data.pin_memory()

    def rest(self) -> None:
        """Leave the device."""
        self._module.to("cpu")
        for inner in self._module.modules():
            if isinstance(inner, pl.LightningModule):
                inner.trainer = None

    @torch.no_grad()
    def answer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a part gives. The arguments are copied, as either of the two networks might write to them.

        Args:
            name: Dotted name of the part in the LightningModule.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        args, kwargs = tree_map_only(Tensor, self._own, (args, kwargs))
        part = self.part(name)
        with self._precision():
            if not self._offload:
                return part(*args, **kwargs)
            named = [*part.named_parameters(), *part.named_buffers()]
            here = {name: tensor.to(self._device, non_blocking=True) for name, tensor in named}
            return functional_call(part, here, args, kwargs)

    def _own(self, tensor: Tensor) -> Tensor:
        dtype = self._inputs_as if tensor.is_floating_point() else None
        return tensor.detach().to(dtype or tensor.dtype, copy=True)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute in a dtype of its own as Lightning does in "bf16-true": no autocast, and new tensors in it."""
        if self._dtype is None:
            yield
            return
        before = torch.get_default_dtype()
        with ExitStack() as contexts:
            for kind in {"cpu", self._device.type}:
                contexts.enter_context(torch.autocast(kind, enabled=False))
            torch.set_default_dtype(self._dtype)
            contexts.callback(torch.set_default_dtype, before)
            yield


def make_teacher(
    pl_module: pl.LightningModule,
    name: str,
    source: str | Path | None,
    submodule: str | None,
    offload: bool,
    dtype: torch.dtype | None,
) -> Teacher:
    """Copy a model that teaches its quantized self.

    Args:
        pl_module: The LightningModule; still in float, or ``source`` has its float weights.
        name: Dotted name of the part to copy, empty for all of it.
        source: A file with float weights to teach with, ``None`` for those that the module has.
        submodule: Dotted name of the part that the file may belong to if several parts have its names.
        offload: See :class:`Teacher`.
        dtype: See :class:`Teacher`.

    Raises:
        ValueError: If there are no float weights to copy.
    """
    student = find_submodule(pl_module, name or None)
    _check_copyable(pl_module if source else student, source)
    try:
        copied = copy_of(pl_module if source else student)
    except Exception as error:  # there is no list of what cannot be copied
        raise ValueError(
            f"Distillation: {type(pl_module if source else student).__name__} cannot be copied to make the teacher "
            f"({type(error).__name__}: {error}). Name a part of it that can, with Distill(module=...)."
        ) from error
    # What Lightning puts on a module that is compiled as a whole would run the original.
    for attribute in ("forward", "training_step", "validation_step", "test_step", "predict_step", "_compiler_ctx"):
        copied.__dict__.pop(attribute, None)
    if source:
        revert_layers(copied)
        load_float_weights(copied, source, submodule)
        copied = copied.get_submodule(name)
    return Teacher(copied, name, offload, dtype)


def _check_copyable(module: nn.Module, source: str | Path | None) -> None:
    kind = type(module).__name__
    if any(isinstance(inner, QATLayer) for inner in module.modules()) and not source:
        raise ValueError(
            f"Distillation: {kind} is quantized already, so the float weights that it was converted with are gone. "
            "Give a file with them: Distill(teacher='float.ckpt'); or begin with the float model."
        )
    unmade = [name for name, p in module.named_parameters() if is_lazy(p) or p.is_meta]
    if is_sharded(module) or unmade:
        raise ValueError(
            f"Distillation: {kind} has no weights to make the teacher of when it is converted: "
            f"{'they are sharded already' if not unmade else f'{unmade[0]!r} is not made yet'}. Make the layers with "
            "their weights in __init__, and leave the sharding to the strategy or to configure_model."
        )


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _take_dtypes_of(student: nn.Module, teacher: nn.Module) -> None:
    own = dict([*student.named_parameters(), *student.named_buffers()])
    for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
        if name in own and tensor.is_floating_point():
            tensor.data = tensor.data.to(own[name].dtype)


def _digest_of(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
