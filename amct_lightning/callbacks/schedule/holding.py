"""Keep parameters bit-identical whatever writes them, without touching ``requires_grad`` or the graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from amct_lightning.quantizers import ActivationQuantizer


class Holder:
    """Holds the parameters of modules at their values.

    Their gradients are dropped before an optimizer steps, so that neither its state nor a clipping of norms notices
    them. What is written all the same is put back: by an optimizer that moves parameters without a gradient (LBFGS, or
    one with a momentum of its own), or by a loop that writes them itself, as sharpness-aware minimization does. That
    is done when a batch begins, when it ends if something was written, and before a forward that follows a backward
    pass of the same batch.

    Example:
        >>> held, free = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> holder = Holder()
        >>> holder.hold([held])
        >>> before = held.weight.item()
        >>> for parameter in (held.weight, free.weight):
        ...     _ = parameter.data.add_(1)
        >>> holder.restore()
        >>> held.weight.item() == before
        True
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._owners: dict[nn.Module, RemovableHandle | None] = {}
        self._versions: dict[int, int] = {}
        self._is_sharded = False
        self._in_doubt = False

    def hold(self, modules: Iterable[nn.Module], also: bool = False) -> None:
        """Hold the parameters of these modules; those held already keep the value that they had then.

        Args:
            modules: The modules, each the owner of parameters.
            also: Whether to go on holding the others.
        """
        owners = dict.fromkeys([*self._owners, *modules] if also else modules)
        for gone in [owner for owner in self._owners if owner not in owners]:
            if (handle := self._owners.pop(gone)) is not None:
                handle.remove()
        for owner in owners:
            if owner not in self._owners:
                self._owners[owner] = self._guard(owner)
        parameters = [parameter for owner in owners for parameter in owner.parameters(recurse=False)]
        self._held = {id(p): self._held.get(id(p)) or (p, _local(p).clone()) for p in parameters}
        self._versions = {id(p): self._versions.get(id(p), p._version) for p in parameters}
        self._is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters)

    def drop_gradients(self, optimizer: Optimizer) -> None:
        """Forget the gradients of held parameters that an optimizer is about to use.

        Args:
            optimizer: The optimizer.
        """
        if self._held:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in self._held:
                        parameter.grad = None

    def after_backward(self, zero: bool) -> None:
        """Note that parameters may be written from now on.

        Args:
            zero: Whether to set their gradients to zero, for a loop that steps without any optimizer of Lightning's.
        """
        self._in_doubt = bool(self._held)
        if zero:
            gradients = [_local(parameter.grad) for parameter, _ in self._held.values() if parameter.grad is not None]
            if gradients:
                torch._foreach_zero_(gradients)

    def before_forward(self, owner: nn.Module) -> None:
        """Put the parameters back before a module is used, if they may have been written.

        Args:
            owner: The module.
        """
        if self._in_doubt and owner in self._owners:
            self.restore()

    def end_batch(self) -> None:
        """Put parameters back that were written. Their versions tell without a look at values, except when sharded."""
        if self._is_sharded or any(p._version != self._versions[key] for key, (p, _) in self._held.items()):
            self.restore()

    def restore(self) -> None:
        """Put the held parameters back to their values.

        Past autograd: what a forward has kept for its backward pass has these values already.
        """
        self._in_doubt = False
        if self._held:
            self._versions = {key: parameter._version for key, (parameter, _) in self._held.items()}
            parameters, values = zip(*self._held.values(), strict=True)
            torch._foreach_copy_([_local(parameter) for parameter in parameters], list(values))

    def close(self) -> None:
        """Put the parameters back a last time, and hold nothing any more."""
        self.restore()
        self.hold([])

    def _guard(self, owner: nn.Module) -> RemovableHandle | None:
        # Frozen clips are copied where they are used: see ActivationQuantizer.usable_clips().
        if isinstance(owner, ActivationQuantizer):
            return None
        return owner.register_forward_pre_hook(_PutBack(self))


class _PutBack:
    """A hook for the modules that own held parameters; on a copy of one, or after it was pickled, it does nothing.

    Attributes:
        leaves_inputs: Tells a layer that it may use the module without calling it, if it calls the hook.
    """

    leaves_inputs = True

    def __init__(self, holder: Holder | None = None) -> None:
        self._holder = (lambda: None) if holder is None else weakref.ref(holder)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # a compiled module keeps the values of its first use until the batch ends
            return
        holder = self._holder()
        if holder is not None:
            holder.before_forward(module)

    def __reduce__(self) -> tuple[type[_PutBack], tuple[()]]:
        return _PutBack, ()


def _local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor that may be sharded, past autograd and its count of versions."""
    data = tensor.data
    return data.to_local() if isinstance(data, DTensor) else data


class FrozenNorm:
    """Keeps a batch normalization in eval mode, and its running statistics as they are.

    That holds whatever mode the model is set to in between, as ``eval()`` and ``train()`` in a training step do.

    Args:
        norm: The batch normalization.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> frozen = FrozenNorm(norm)
        >>> frozen.hold()
        >>> norm.training
        False
        >>> frozen.release()
        >>> norm.training
        True
    """

    def __init__(self, norm: nn.Module) -> None:
        self._norm = norm
        self._was_training = norm.training
        self._statistics = {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}

    def hold(self, new_epoch: bool = False) -> None:
        """Put it into eval mode, where it stays whatever mode the modules around it are set to.

        Args:
            new_epoch: Also put the statistics back, which StochasticWeightAveraging resets for its last pass.
        """
        if "train" not in self._norm.__dict__:
            self._norm.eval()
            # The mode of a module is passed on to those inside through this method. A partial, unlike a closure, is
            # copied along with the module, and for the copy.
            self._norm.train = partial(_stay, self._norm)  # type: ignore[method-assign]
        self._norm.training = False
        if new_epoch:
            for name, value in self._statistics.items():
                self._norm.get_buffer(name).copy_(value)

    def release(self) -> None:
        """Give it back the mode that it had before."""
        self._norm.__dict__.pop("train", None)
        self._norm.train(self._was_training)


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    return norm
