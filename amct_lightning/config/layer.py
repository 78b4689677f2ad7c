"""The settings of one layer: how its activations and its weights are quantized.

The objects are frozen and check themselves when they are made; use ``dataclasses.replace`` to change one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from amct_lightning.config.checks import (
    NUM_BITS,
    Fault,
    data_faults,
    located,
    raise_first,
    type_fault,
    type_pair_faults,
    weight_faults,
)


@dataclass(frozen=True)
class DataConfig:
    """How the input of a layer is quantized.

    Args:
        algo: Always ``"ulq_quantize"``: fake quantization with learnable clip values.
        clip_max: Initial upper clip value, above 0; ``None`` calibrates both on the first batches.
        clip_min: Initial lower clip value, below 0; given together with ``clip_max`` or not at all.
        fixed_min: Whether the lower clip value stays 0; ``None`` means: after a ReLU.
        dst_type: ``"INT4"``, ``"INT8"`` or ``"INT16"``.

    Raises:
        TypeError: If a value has the wrong type; clip values must be floats.
        ValueError: If a value is not allowed, or only one clip value is given.

    Example:
        >>> DataConfig(clip_max=2.0, clip_min=-1.5, dst_type="INT16").num_bits
        16
    """

    algo: str = "ulq_quantize"
    clip_max: float | None = None
    clip_min: float | None = None
    fixed_min: bool | None = None
    dst_type: str = "INT8"

    def __post_init__(self) -> None:
        raise_first(data_faults(vars(self)), lambda key: f"DataConfig.{key}")

    @property
    def num_bits(self) -> int:
        """The number of bits of ``dst_type``."""
        return NUM_BITS[self.dst_type]


@dataclass(frozen=True)
class WeightConfig:
    """How the weights of a layer are quantized.

    Args:
        algo: ``"arq_retrain"`` (scales from the weights in each step) or ``"ulq_retrain"`` (learned scales).
        channel_wise: One scale per output channel; ``None`` means false for Linear and true for other layers.
        dst_type: ``"INT4"`` or ``"INT8"``.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.

    Example:
        >>> WeightConfig(algo="ulq_retrain", dst_type="INT4").num_bits
        4
    """

    algo: str = "arq_retrain"
    channel_wise: bool | None = None
    dst_type: str = "INT8"

    def __post_init__(self) -> None:
        raise_first(weight_faults(vars(self)), lambda key: f"WeightConfig.{key}")

    @property
    def num_bits(self) -> int:
        """The number of bits of ``dst_type``."""
        return NUM_BITS[self.dst_type]


@dataclass(frozen=True)
class LayerConfig:
    """Whether and how one layer is quantized.

    Args:
        retrain_enable: Whether the layer is quantized.
        retrain_data_config: The settings of its activations.
        retrain_weight_config: The settings of its weights.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If the hardware has no kernel for this pair of activation and weight types.

    Example:
        >>> layer = LayerConfig(retrain_weight_config=WeightConfig(dst_type="INT4"))
        >>> layer.retrain_data_config.num_bits, layer.retrain_weight_config.num_bits
        (8, 4)
    """

    retrain_enable: bool = True
    retrain_data_config: DataConfig = field(default_factory=DataConfig)
    retrain_weight_config: WeightConfig = field(default_factory=WeightConfig)

    def __post_init__(self) -> None:
        raise_first(self._faults(), lambda key: f"LayerConfig.{key}")

    def _faults(self) -> Iterator[Fault]:
        for key, expected in _LAYER_TYPES.items():
            if not isinstance(getattr(self, key), expected):
                yield type_fault(
                    key, "true or false" if expected is bool else f"a {expected.__name__}", getattr(self, key)
                )
        yield from type_pair_faults(self.retrain_data_config.dst_type, self.retrain_weight_config.dst_type)


def make_layer(
    data: Mapping[str, Any],
    weight: Mapping[str, Any],
    sections: tuple[str, str],
    subject: Callable[[str], str],
    enable: bool = True,
) -> LayerConfig:
    """Make the settings of a layer from what a file says; an error says where in the file.

    Args:
        data: Arguments of :class:`DataConfig`.
        weight: Arguments of :class:`WeightConfig`.
        sections: What the two are called in the file.
        subject: From a key, ``section.key``, to the beginning of a message.
        enable: Whether the layer is quantized.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """
    with located(lambda key: subject(f"{sections[0]}.{key}")):
        data_config = DataConfig(**data)
    with located(lambda key: subject(f"{sections[1]}.{key}")):
        weight_config = WeightConfig(**weight)
    with located(lambda key: subject(key.replace("retrain_data_config", sections[0]))):
        return LayerConfig(enable, data_config, weight_config)


_LAYER_TYPES: dict[str, type] = {
    "retrain_enable": bool,
    "retrain_data_config": DataConfig,
    "retrain_weight_config": WeightConfig,
}
