"""The weight scales of the deployed layer: those of the weight, times what folding a BatchNorm will multiply it by."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from amct_lightning.quantizers import WeightQuantizer
from amct_lightning.quantizers.functional import usable_scale


@torch.no_grad()
def deployed_scale(quantizer: WeightQuantizer, weight: Tensor, batch_norm: nn.Module | None) -> Tensor:
    """Return ``|s * gamma / sqrt(running_var + eps)|``, or ``s`` without a BatchNorm; below ``EPS`` it is 1.

    Args:
        quantizer: The quantizer of the weight.
        weight: The weight as it is now.
        batch_norm: The BatchNorm that is folded into the layer, if any.

    Returns:
        Scales, 1-d float32: with a BatchNorm always one per output channel.

    Example:
        >>> from amct_lightning.quantizers import ChannelLayout
        >>> weight = torch.tensor([[1.27], [2.54]])
        >>> quantizer = WeightQuantizer(8, channel_wise=True, layout=ChannelLayout(), weight=weight)
        >>> deployed_scale(quantizer, weight, None)
        tensor([0.0100, 0.0200])
    """
    scale = quantizer.compute_scale(weight)
    if batch_norm is not None:
        factor = fold_factor(batch_norm)
        scale = scale.to(factor.device).abs() * factor.abs()
    return usable_scale(scale)


@torch.no_grad()
def fold_factor(batch_norm: nn.Module) -> Tensor:
    """Return ``gamma / sqrt(running_var + eps)``, by which a folded BatchNorm multiplies each output channel.

    Args:
        batch_norm: A BatchNorm with running statistics.

    Returns:
        Factors, 1-d float32.

    Example:
        >>> norm = nn.BatchNorm1d(2, eps=0.0)
        >>> _ = norm.running_var.fill_(4.0)
        >>> fold_factor(norm)
        tensor([0.5000, 0.5000])
    """
    factor = torch.rsqrt(cast(Tensor, batch_norm.running_var).float() + cast(float, batch_norm.eps))
    return factor if batch_norm.weight is None else current_weight(batch_norm).float() * factor


def fold_sources(batch_norm: nn.Module) -> tuple[Tensor | None, ...]:
    """Return all tensors that folding a BatchNorm reads.

    Args:
        batch_norm: A BatchNorm with running statistics.

    Example:
        >>> len(fold_sources(nn.BatchNorm1d(2)))
        4
    """
    learned = (None if getattr(batch_norm, n) is None else current_weight(batch_norm, n) for n in ("weight", "bias"))
    return cast(Tensor, batch_norm.running_mean), cast(Tensor, batch_norm.running_var), *learned


def only_normalizes(module: nn.Module) -> bool:
    """Tell whether a BatchNorm multiplies and adds what its parameters and statistics say, and nothing else.

    Args:
        module: A module.

    Example:
        >>> only_normalizes(nn.BatchNorm1d(2)), only_normalizes(nn.BatchNorm1d(2, track_running_stats=False))
        (True, False)
    """
    own = type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward) and "forward" not in vars(module)
    return own and getattr(module, "running_var", None) is not None


@torch.no_grad()
def current_weight(layer: nn.Module, name: str = "weight") -> Tensor:
    """Return a weight as it is now, also of a layer that ``torch.nn.utils.prune`` has pruned.

    Such a layer has the parameter ``weight_orig`` and the buffer ``weight_mask``; its ``weight`` is their product at
    the beginning of the last forward, before the optimizer's last step.

    Of a weight that is sharded the whole is gathered, so that all ranks have to call this.

    Args:
        layer: The layer.
        name: Name of the weight.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(2, 1), "weight", amount=1)
        >>> _ = nn.init.constant_(layer.weight_orig, 5.0)
        >>> sorted(current_weight(layer).flatten().tolist())
        [0.0, 5.0]
    """
    original = layer._parameters.get(f"{name}_orig")
    mask = layer._buffers.get(f"{name}_mask")
    if original is None or mask is None:
        return whole_tensor(cast(Tensor, getattr(layer, name)))
    return whole_tensor(original) * mask.to(original.dtype)


@torch.no_grad()
def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, or gathered from all ranks if it is sharded; then all ranks have to call this.

    Args:
        tensor: The tensor.

    Example:
        >>> whole_tensor(torch.ones(1))
        tensor([1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Tell whether ranks hold parts of the parameters of a model, so that reading a weight is a collective.

    Args:
        model: The model.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    parameters, modules = model.parameters(), model.modules()
    return any(isinstance(p, DTensor) for p in parameters) or any(isinstance(m, FSDPModule) for m in modules)
