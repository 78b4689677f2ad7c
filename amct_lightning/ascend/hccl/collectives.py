"""Reductions over HCCL for every dtype, and communication hooks for DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 1 << 25  # elements that are sent at once

# The name, the operation of a collective, and the same over a stack of tensors.
_REDUCTIONS: dict[str, tuple[Any, Callable[[Tensor, int], Tensor]]] = {
    "sum": (dist.ReduceOp.SUM, torch.sum),
    "max": (dist.ReduceOp.MAX, torch.amax),
    "min": (dist.ReduceOp.MIN, torch.amin),
    "product": (dist.ReduceOp.PRODUCT, torch.prod),
}

ReduceName = dist.ReduceOp | dist.ReduceOp.RedOpType | str | None


def connected() -> bool:
    """Tell whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def reduce_tensor(tensor: Tensor, group: dist.ProcessGroup | None, reduce_op: ReduceName) -> Tensor:
    """Reduce a tensor over all ranks.

    The mean of integers is a float tensor: an average that HCCL itself takes, or one in place, fails or truncates.
    float64, which HCCL moves but does not add, is gathered and reduced on each device.

    Args:
        tensor: The tensor; unchanged afterwards.
        group: The ranks; all of them if None.
        reduce_op: ``"mean"``, ``"avg"``, ``"sum"``, ``"max"``, ``"min"``, ``"product"`` or a ``ReduceOp``; None is sum.

    Returns:
        The reduced tensor.
    """
    mean = _is_mean(reduce_op)
    operation = dist.ReduceOp.SUM if mean or reduce_op is None else _operation(reduce_op)
    if tensor.dtype == torch.float64:
        total = _reduce_wide(tensor, group, operation)
    else:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=operation, group=group)
    return total / dist.get_world_size(group) if mean else total


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Collect a tensor of all ranks.

    Args:
        tensor: The tensor, of the same shape and dtype on every rank.
        group: The ranks; all of them if None.

    Returns:
        The tensors, stacked along a new first axis in the order of the ranks.
    """
    flat = tensor.detach().reshape(-1)
    everyone = flat.new_empty(dist.get_world_size(group) * flat.numel())
    # the function has a new name since torch 2.13
    into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    into(everyone, flat, group=group)
    return everyone.view(-1, *tensor.shape)


def broadcast_tensors(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Give all ranks the values of rank 0, with few collectives.

    Args:
        tensors: The tensors, on any device, of the same shapes and dtypes on every rank. Those on the meta device,
            which have no values, are left out.
        device: The device of this rank.
    """
    pending: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            continue
        alike = pending.setdefault(tensor.dtype, [])
        alike.append(tensor.detach())
        if sum(each.numel() for each in alike) >= _BUCKET:
            _broadcast(pending.pop(tensor.dtype), device)
    for alike in pending.values():
        _broadcast(alike, device)


def _broadcast(tensors: list[Tensor], device: torch.device) -> None:
    flat = torch.cat([tensor.reshape(-1).to(device) for tensor in tensors])
    dist.broadcast(flat, 0)
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def accepted_hook(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Make a communication hook that DDP accepts on NPUs.

    torch 2.13 refuses the hooks ``bf16_compress_hook`` and ``bf16_compress_wrapper_hook`` by their name unless there
    is NCCL or XCCL. HCCL reduces bfloat16 as well, so the hook is given another name.

    Args:
        hook: The hook.

    Returns:
        The hook, or a function around it.
    """
    if getattr(hook, "__name__", "") not in ("bf16_compress_hook", "bf16_compress_wrapper_hook"):
        return hook

    def bf16_hook(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        return hook(state, bucket)  # type: ignore[no-any-return]

    # DDP compares the annotations with the types themselves, and this file's are texts
    bucket_type = torch._C._distributed_c10d.GradBucket
    bf16_hook.__annotations__ = {"bucket": bucket_type, "return": torch.futures.Future[Tensor]}
    return bf16_hook


def _is_mean(reduce_op: ReduceName) -> bool:
    if isinstance(reduce_op, str):
        return reduce_op.lower() in ("mean", "avg")
    return reduce_op == dist.ReduceOp.AVG


def _operation(reduce_op: ReduceName) -> Any:
    if not isinstance(reduce_op, str):
        return reduce_op
    if reduce_op.lower() not in _REDUCTIONS:
        raise ValueError(f"reduce_op={reduce_op!r} is not known. Allowed are: mean, avg, {', '.join(_REDUCTIONS)}.")
    return _REDUCTIONS[reduce_op.lower()][0]


def _reduce_wide(tensor: Tensor, group: dist.ProcessGroup | None, operation: Any) -> Tensor:
    values = gather(tensor, group)
    for known, reducer in _REDUCTIONS.values():
        if operation == known:
            return reducer(values, 0)
    raise ValueError(f"reduce_op={operation} is not possible for float64 on NPUs. Convert the tensor to float32.")
