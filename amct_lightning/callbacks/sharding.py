"""What the callbacks do differently where every rank of a training holds a part of the weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.modules.folding import is_sharded
from amct_lightning.protocols import ShardingStrategy
from amct_lightning.wording import cut_off


def build_layers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[nn.Module]:
    """Let a LightningModule make the layers that it makes in ``configure_model``; they must exist to be converted.

    Strategies of this package can shard converted layers. If there are layers already, it is then left to Lightning to
    call ``configure_model``, which may shard them. Otherwise it is called here, and may shard what it makes.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.

    Returns:
        The modules that there are, if ``configure_model`` is still to be called; else none.

    Raises:
        ValueError: If a layer was sharded in a way that it cannot be converted any more.
    """
    if not is_overridden("configure_model", pl_module):
        return []
    is_built = next(pl_module.parameters(), None) is not None
    strategy = trainer.strategy
    if is_built and isinstance(strategy, ShardingStrategy) and strategy.shards_in_configure_model:
        return list(pl_module.modules())
    pl_module.configure_model()  # idempotent by Lightning's contract
    if not is_sharded(pl_module):
        return []
    for name, module in pl_module.named_modules():
        if isinstance(module, FSDPModule) and isinstance(module, tuple(LAYER_TYPES)):
            raise ValueError(
                f"configure_model of {type(pl_module).__name__} calls fully_shard on '{name}' itself, a "
                f"{_unsharded_type(module).__name__}, which cannot be quantized after that. Call it on the block that "
                f"contains the layer, or make the layers in __init__ and only shard them in configure_model."
            )
    if not any(parameter.is_meta for parameter in pl_module.parameters()):
        pl_module.to(strategy.root_device)  # what is sharded is there already
    return []


def check_complete(pl_module: nn.Module, converted: Collection[nn.Module]) -> None:
    """Refuse layers that were made after the others were converted.

    Args:
        pl_module: The LightningModule.
        converted: What :func:`build_layers` returned then.

    Raises:
        ValueError: If there are such layers.
    """
    known = set(map(id, converted))
    late = [
        name
        for name, module in pl_module.named_modules()
        if id(module) not in known and _unsharded_type(module) in LAYER_TYPES
    ]
    if late and known:
        raise ValueError(
            f"configure_model of {type(pl_module).__name__} has made layers that are not quantized, after others were: "
            f"{cut_off(late)}. Make all layers in __init__, or all of them in configure_model."
        )


def check_tensor_parallel(layers: Mapping[str, nn.Module]) -> None:
    """Refuse quantized layers whose weight is divided for tensor parallelism: each rank would see its part only.

    Ranges would have to be calibrated, scales computed and gradients of both be added up over the parts.

    Args:
        layers: The quantized layers by name.

    Raises:
        ValueError: If there are such layers.
    """
    divided = [
        name
        for name, layer in layers.items()
        for weight in layer.parameters(recurse=False)
        if isinstance(weight, DTensor) and "tensor_parallel" in (weight.device_mesh.mesh_dim_names or ())
    ]
    if divided:
        names = ", ".join(f"'{name}'" for name in dict.fromkeys(divided))
        raise ValueError(
            f"parallelize_module has divided quantized layers for tensor parallelism: {names}. That is possible for "
            f"layers in float only. Leave them out of the quantization (skip_layers), or use fully_shard for them."
        )


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward without a backward has left gathered.

    Args:
        model: The model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _unsharded_type(module: Any) -> type[nn.Module]:
    """Return the class of a module before ``fully_shard``, which makes a subclass of itself and the class."""
    kind: type[nn.Module] = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
    return kind
