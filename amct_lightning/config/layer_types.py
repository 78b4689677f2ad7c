"""What the type and shape of a layer imply for its quantization settings."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from amct_lightning.config.layer import LayerConfig
from amct_lightning.modules.registry import LAYER_TYPES


def can_be_channel_wise(module: nn.Module) -> bool:
    """Tell whether a layer may have one weight scale per output channel, which is then also its default.

    Example:
        >>> can_be_channel_wise(nn.Conv2d(3, 8, 3)), can_be_channel_wise(nn.Linear(3, 8))
        (True, False)
    """
    return LAYER_TYPES[type(module)].channel_wise


def int4_obstacle(module: nn.Module) -> str | None:
    """Say why the weights cannot be packed two INT4 values per byte along the input-channel axis.

    Args:
        module: A layer that can be quantized.

    Returns:
        The reason, or ``None`` if nothing is in the way.

    Example:
        >>> int4_obstacle(nn.Linear(3, 8))
        'in_features=3 is odd'
        >>> int4_obstacle(nn.Linear(4, 8)) is None
        True
    """
    groups = getattr(module, "groups", 1)
    if groups > 1:
        return f"groups={groups}"
    lengths = {name: getattr(module, name) for name in LAYER_TYPES[type(module)].packed}
    return " and ".join(f"{name}={length} is odd" for name, length in lengths.items() if length % 2) or None


def with_channel_wise_default(layer: LayerConfig, module: nn.Module) -> LayerConfig:
    """Fill in ``channel_wise`` where it was left open.

    Example:
        >>> with_channel_wise_default(LayerConfig(), nn.Linear(3, 8)).retrain_weight_config.channel_wise
        False
    """
    weight = layer.retrain_weight_config
    if weight.channel_wise is not None:
        return layer
    return replace(layer, retrain_weight_config=replace(weight, channel_wise=can_be_channel_wise(module)))


def without_int4(layer: LayerConfig) -> LayerConfig:
    """Raise INT4 weights to INT8, and INT4 activations with them because they need INT4 weights.

    Example:
        >>> from amct_lightning.config.layer import WeightConfig
        >>> int4 = LayerConfig(retrain_weight_config=WeightConfig(dst_type="INT4"))
        >>> without_int4(int4).retrain_weight_config.dst_type
        'INT8'
    """
    data, weight = layer.retrain_data_config, layer.retrain_weight_config
    return replace(
        layer,
        retrain_data_config=replace(data, dst_type="INT8") if data.dst_type == "INT4" else data,
        retrain_weight_config=replace(weight, dst_type="INT8") if weight.dst_type == "INT4" else weight,
    )
