"""Keep parameters bit-identical whatever their optimizer does, without touching ``requires_grad`` or the graph."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Holder:
    """Holds parameters at their values.

    Their gradients are dropped before an optimizer steps, so that neither its state nor a clipping of norms notices
    them. As some optimizers move parameters without a gradient (LBFGS, or one with a momentum of its own), they are
    also put back after each step.

    Example:
        >>> held, free = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([held, free], lr=0.5, weight_decay=0.1)
        >>> holder = Holder()
        >>> holder.watch([optimizer])
        >>> holder.hold([held])
        >>> (held + free).sum().backward()
        >>> optimizer.step()
        >>> held.item(), round(free.item(), 2)
        (1.0, 0.45)
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._has_unwatched = False

    def watch(self, optimizers: Iterable[Any]) -> None:
        """Put held parameters back after each step of these optimizers.

        Args:
            optimizers: The optimizers of the training.
        """
        self.close()
        for optimizer in optimizers:
            if isinstance(optimizer, Optimizer):
                self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore()))
            else:
                self._has_unwatched = True

    def hold(self, parameters: Iterable[nn.Parameter], also: bool = False) -> None:
        """Hold these parameters; those held already keep the value that they had then.

        Args:
            parameters: The parameters.
            also: Whether to go on holding the others.
        """
        now = {id(p): self._held[id(p)] if id(p) in self._held else (p, _local(p.detach()).clone()) for p in parameters}
        self._held = self._held | now if also else now

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

    def end_batch(self) -> None:
        """Put parameters back for optimizers that cannot be watched."""
        if self._has_unwatched:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the held parameters back to their values."""
        if self._held:
            parameters, values = zip(*self._held.values(), strict=True)
            torch._foreach_copy_([_local(parameter) for parameter in parameters], list(values))

    def close(self) -> None:
        """Hold nothing and watch nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._held, self._handles, self._has_unwatched = {}, [], False


def _local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor that may be sharded; operators on lists take no mixture."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
