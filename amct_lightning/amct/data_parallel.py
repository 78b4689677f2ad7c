"""Models that are wrapped in DistributedDataParallel when they are given to AMCT's functions."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a DistributedDataParallel, or the model itself.

    Args:
        model: A model, wrapped or not.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def wrap_like(converted: nn.Module, given: nn.Module) -> nn.Module:
    """Wrap a converted model as the given one is wrapped, so that the processes agree on its clips as well.

    Args:
        converted: The converted copy of the model inside ``given``.
        given: The model that the user gave.

    Returns:
        ``converted``, in a DistributedDataParallel of the same settings if ``given`` was in one.
    """
    if not isinstance(given, DistributedDataParallel):
        return converted
    return DistributedDataParallel(
        converted,
        device_ids=given.device_ids,
        output_device=given.output_device,
        dim=given.dim,
        broadcast_buffers=given.broadcast_buffers,
        process_group=given.process_group,
        find_unused_parameters=given.find_unused_parameters,
        gradient_as_bucket_view=given.gradient_as_bucket_view,
        static_graph=given.static_graph,
    )
