"""Gradients, clipping and optimizer steps of a model of which some parameters are sharded and others are whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_Tensor = TypeVar("_Tensor", bound=Tensor)


def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average the gradients of parameters that are whole on every rank, with one collective per dtype.

    A parameter that some ranks have no gradient for takes the average of all, as if theirs were zero; one that
    no rank has a gradient for stays without.

    Args:
        parameters: The parameters, the same ones on every rank.
        group: The ranks.
    """
    if dist.get_world_size(group) == 1:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for alike in by_dtype.values():
        _average(alike, group)


@torch.no_grad()
def _average(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    size = dist.get_world_size(group)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # How many ranks have each gradient travels along. It is read only where one is missing: reading stops the device.
    present = torch.tensor([float(p.grad is not None) for p in parameters], dtype=gradients[0].dtype)
    table = torch.cat([*(g.reshape(-1) for g in gradients), present.to(gradients[0].device, non_blocking=True)])
    table = table.div_(size)
    dist.all_reduce(table, group=group)
    *averages, present = table.split([*(g.numel() for g in gradients), len(parameters)])
    missing = [index for index, p in enumerate(parameters) if p.grad is None]
    anywhere = present.tolist() if missing else []
    for index in missing:
        if anywhere[index]:
            parameters[index].grad = averages[index].view_as(parameters[index]).clone()
    known = [(p.grad, a.view_as(p)) for p, a in zip(parameters, averages, strict=True) if p.grad is not None]
    if known:
        targets, values = zip(*known, strict=True)
        torch._foreach_copy_(list(targets), list(values))


def clip_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients so that the norm of all of them, each counted once, is no more than a limit.

    Args:
        parameters: The parameters; torch's own function takes either sharded or whole ones.
        limit: The largest norm.

    Returns:
        The norm before, the same number on every rank.
    """
    kinds = [part for part in by_kind(parameters) if any(p.grad is not None for p in part)]
    norms = []
    for part in kinds:
        norm = torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).float())
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    factor = torch.clamp(limit / (total + 1e-6), max=1.0)
    for part in kinds:
        torch._foreach_mul_([local(p.grad) for p in part if p.grad is not None], factor)
    return total


def clip_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clip every number in the gradients.

    Args:
        parameters: The parameters, sharded or whole.
        limit: The largest magnitude.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor.

    Args:
        tensor: A sharded or an ordinary tensor.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain(tensors: Iterable[_Tensor]) -> list[_Tensor]:
    """Return the tensors that are whole on every rank.

    Args:
        tensors: Sharded and ordinary tensors.
    """
    return [tensor for tensor in tensors if not isinstance(tensor, DTensor)]


def by_kind(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters into lists of those that torch's operators on lists of tensors take together.

    Args:
        parameters: The parameters.

    Returns:
        The whole ones, and for each device mesh those that are sharded over it.

    Example:
        >>> len(by_kind(nn.Linear(2, 2).parameters()))
        1
    """
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(kinds.values())


@contextmanager
def groups_by_kind(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimizer have sharded and whole parameters in groups of their own for the time of a step.

    By default, and always with ``foreach`` or ``fused``, an optimizer updates all parameters of a group with one
    operator, which refuses a mixture. The groups that schedulers, checkpoints and users see stay as they are.

    Args:
        optimizer: The optimizer.

    Yields:
        Nothing.
    """
    before = optimizer.param_groups
    params = [group["params"] for group in before]
    divided: list[dict[str, Any]] = []
    for group in before:
        first, *others = by_kind(group["params"]) or [[]]
        for other in others:
            divided.append({**group, "params": other})
        group["params"] = first
    optimizer.param_groups = [*before, *divided]
    try:
        yield
    finally:
        for group, own in zip(before, params, strict=True):
            group["params"] = own
        optimizer.param_groups = [*before, *optimizer.param_groups[len(before) + len(divided) :]]


class MixedGradScaler(torch.amp.GradScaler):
    """A scaler of the loss that unscales sharded and whole gradients one kind after the other.

    ``_unscale_grads_`` is private in torch (2.7 to 2.13), but what torch's own scaler for sharded models overrides.

    Example:
        >>> MixedGradScaler("cpu", enabled=False).is_enabled()
        False
    """

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler) -> MixedGradScaler:
        """Make one with the settings of another scaler.

        Args:
            scaler: The other one, which has not been used yet.

        Returns:
            The new one; ``scaler`` itself if it is of this class.
        """
        if isinstance(scaler, cls):
            return scaler
        return cls(
            "npu",
            init_scale=scaler.get_scale() if scaler.is_enabled() else 2.0**16,
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
            enabled=scaler.is_enabled(),
        )

    def _unscale_grads_(self, optimizer: Any, *args: Any) -> dict[torch.device, Tensor]:
        found: dict[torch.device, Tensor] = {}
        every = (p for group in optimizer.param_groups for p in group["params"])
        for kind in by_kind(every):
            view: Any = SimpleNamespace(param_groups=[{"params": kind}])
            for device, flag in super()._unscale_grads_(view, *args).items():
                found[device] = torch.maximum(found[device], flag) if device in found else flag
        return found
