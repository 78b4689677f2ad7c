"""Search-N on a model: a hook per layer that hands its outputs in evaluation to a :class:`ShiftSearch`."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amct_lightning.modules.folding import current_weight, deployed_scale
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ShiftSearch, is_exporting


def install_shift_search(layer: QATLayer, batch_norm: nn.Module | None) -> None:
    """Watch the output of a layer, or that of the BatchNorm that will be folded into it.

    Args:
        layer: A quantized convolution or linear layer.
        batch_norm: The BatchNorm.
    """
    weight = current_weight(layer)
    channels = deployed_scale(layer.weight_quantizer, weight, batch_norm).numel()
    layer.shift_search = ShiftSearch(channels).to(weight.device)
    _watch_output(layer, batch_norm)


def follow_batch_norm(layer: QATLayer, batch_norm: nn.Module) -> None:
    """Watch a BatchNorm that has taken the place of the one watched before, as a SyncBatchNorm does.

    Args:
        layer: The layer that it will be folded into.
        batch_norm: The BatchNorm that is there now.
    """
    if not any(isinstance(hook, _ShiftHook) for hook in batch_norm._forward_hooks.values()):
        _watch_output(layer, batch_norm)


def remove_shift_search(model: nn.Module) -> None:
    """Take back all that :func:`install_shift_search` did in a model."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _ShiftHook)]:
            del module._forward_hooks[key]
        if isinstance(module, QATLayer) and hasattr(module, "shift_search"):
            del module.shift_search


def shift_searches(model: nn.Module) -> list[ShiftSearch]:
    """Return the searches of a model."""
    return [module for module in model.modules() if isinstance(module, ShiftSearch)]


@torch.no_grad()
def synchronize_shift_search(model: nn.Module) -> None:
    """Add up what the processes have found, with one collective for all layers.

    Args:
        model: A converted model; the same on every process.
    """
    searches = shift_searches(model)
    if not (searches and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    table = torch.cat([torch.cat((s.errors.flatten(), s.batches.view(1).to(s.errors.dtype))) for s in searches])
    dist.all_reduce(table)
    for search, part in zip(searches, table.split([s.errors.numel() + 1 for s in searches]), strict=True):
        search.errors.copy_(part[:-1].view_as(search.errors))
        search.batches.copy_(part[-1])


def _watch_output(layer: QATLayer, batch_norm: nn.Module | None) -> None:
    # Before the hooks of others, which may return something else than the sums of the layer.
    (batch_norm or layer).register_forward_hook(_ShiftHook(layer, batch_norm), prepend=True)


class _ShiftHook:
    """Forward hook; a class, so that it survives deepcopy and pickle."""

    def __init__(self, layer: QATLayer, batch_norm: nn.Module | None) -> None:
        self.layer = layer
        self.batch_norm = batch_norm

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        search = cast(ShiftSearch, self.layer.shift_search)
        if self.layer.training:
            search.stale = True
        elif not (self.layer.runs_in_float or is_exporting()):
            weight = current_weight(self.layer)
            scale = deployed_scale(self.layer.weight_quantizer, weight, self.batch_norm)
            if isinstance(self.layer, nn.Linear) and scale.numel() > 1:
                output = output.reshape(-1, output.shape[-1])  # its channels are the last axis, whatever the rank
            search.update(output, scale * self.layer.input_quantizer.scale)
