"""The settings of one layer: how its activations and its weights are quantized.

The objects are frozen and check themselves when they are made; use ``dataclasses.replace`` to change one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from amct_lightning.config.checks import (
    ACTIVATION_ALGORITHMS,
    LEARNED_CLIPS,
    check_activations,
    check_choice,
    check_clips,
    check_fixed_min,
    check_flag,
    check_group_size,
    check_start,
    check_type_pair,
    found_in,
    wrong_type,
)

FixedMin: TypeAlias = bool | Literal["propagate", "after_relu"] | None

_NUM_BITS = {"INT4": 4, "INT8": 8, "INT16": 16}


@dataclass(frozen=True)
class DataConfig:
    """How the input of a layer is quantized.

    Args:
        algo: ``"ulq_quantize"``: fake quantization with learnable clip values. For Linear there are two more, of which
            AMCT's files do not know: ``"per_token"``, a scale for each token (the last axis) that is computed in every
            forward from its largest magnitude, and ``"none"``, which leaves activations in float.
        clip_max: Initial upper clip value, above 0; ``None`` calibrates both on the first batches.
        clip_min: Initial lower clip value, below 0; given together with ``clip_max`` or not at all.
        fixed_min: Whether the lower clip value stays 0. ``"propagate"`` means: if the data flow of the model shows that
            the input is never negative; ``"after_relu"``: straight behind a ReLU, AMCT's rule. ``None`` is AMCT's rule
            in a :class:`RetrainConfig` and in a ``.cfg`` file, and ``"propagate"`` in other choices.
        dst_type: ``"INT4"``, ``"INT8"`` or ``"INT16"``; not for activations in float.
        symmetric: Whether learned clips keep the range around 0, so that the offset is always 0; not in AMCT's files.
            Such a range cannot begin with 0, whatever ``fixed_min`` would find out.
        init: What range a calibration finds: ``"mse"``, that with the least squared error of the values, as AMCT;
            ``"percentile"``; or ``"output"``, that with the least squared error of what the layer makes of them, not
            for LSTM and GRU. AMCT's files cannot ask for another than AMCT's.
        percentile: Which share of the values is inside of the range, for ``init="percentile"``; ``None`` for 99.99.

    Raises:
        TypeError: If a value has the wrong type; clip values must be floats.
        ValueError: If a value is not allowed, only one clip value is given, or settings contradict each other.

    Example:
        >>> DataConfig(clip_max=2.0, clip_min=-1.5, dst_type="INT16").num_bits
        16
    """

    algo: str = "ulq_quantize"
    clip_max: float | None = None
    clip_min: float | None = None
    fixed_min: FixedMin = None
    dst_type: str = "INT8"
    symmetric: bool = False
    init: str = "mse"
    percentile: float | None = None

    @found_in("DataConfig.", "")
    def __post_init__(self) -> None:
        check_choice("algo", self.algo, ACTIVATION_ALGORITHMS)
        check_clips(self.clip_max, self.clip_min)
        if self.fixed_min is not None:
            check_fixed_min(self.fixed_min)
        check_choice("dst_type", self.dst_type, tuple(_NUM_BITS))
        check_flag("symmetric", self.symmetric)
        check_start(self.init, self.percentile, self.clip_max)
        of_clips: dict[str, tuple[Any, Any]] = {
            "clip_max": (self.clip_max, None),
            "clip_min": (self.clip_min, None),
            "fixed_min": (self.fixed_min, None),
            "symmetric": (self.symmetric, False),
            "init": (self.init, "mse"),
        }
        if not self.is_quantized:
            of_clips["dst_type"] = self.dst_type, "INT8"
        check_activations(self.algo, of_clips, self.fixed_min, self.symmetric)

    @property
    def num_bits(self) -> int:
        """The number of bits of ``dst_type``."""
        return _NUM_BITS[self.dst_type]

    @property
    def has_clips(self) -> bool:
        """Whether there is a range that is calibrated and learned."""
        return self.algo == LEARNED_CLIPS

    @property
    def is_quantized(self) -> bool:
        """Whether activations are quantized at all."""
        return self.algo != "none"

    @property
    def may_begin_with_zero(self) -> bool:
        """Whether there is a lower clip that can be fixed to 0."""
        return self.has_clips and not self.symmetric

    @property
    def in_amct(self) -> DataConfig:
        """What AMCT's files can say of it."""
        if not self.has_clips:
            return DataConfig(dst_type=self.dst_type)
        return replace(self, symmetric=False, init="mse", percentile=None)

    @property
    def beyond_amct(self) -> dict[str, Any]:
        """What they cannot say, by key; empty if that is nothing."""
        said = self.in_amct
        keys = ("algo", "symmetric", "init", "percentile")
        return {key: getattr(self, key) for key in keys if getattr(self, key) != getattr(said, key)}


@dataclass(frozen=True)
class WeightConfig:
    """How the weights of a layer are quantized.

    Args:
        algo: ``"arq_retrain"`` (scales from the weights in each step) or ``"ulq_retrain"`` (learned scales).
        channel_wise: One scale per output channel; ``None`` means false for Linear and true for other layers. AMCT's
            files cannot ask for it in a Linear, and the Ascend compiler (ATC) does not take such a layer; servers
            do (target serving), for which ``None`` means true in a Linear as well.
        dst_type: ``"INT4"`` or ``"INT8"``.
        group_size: In a Linear with INT4 weights, how many inputs of an output channel share a scale: 32, 64 or 128;
            ``None`` for all. Other layers and AMCT's files have no groups.
        init: Where scales start: ``"max_abs"``, which ``None`` means, or ``"mse"``, the scale with the least squared
            error for the weight at the start. Scales of ``"arq_retrain"`` stay that share of the max-abs ones. AMCT's
            files cannot ask for it.

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
    group_size: int | None = None
    init: str | None = None

    @found_in("WeightConfig.", "")
    def __post_init__(self) -> None:
        check_choice("algo", self.algo, ("arq_retrain", "ulq_retrain"))
        if self.channel_wise is not None:
            check_flag("channel_wise", self.channel_wise)
        check_choice("dst_type", self.dst_type, ("INT4", "INT8"))
        if self.group_size is not None:
            check_group_size(self.group_size, self.dst_type, self.channel_wise)
        if self.init is not None:
            check_choice("init", self.init, ("max_abs", "mse"))

    @property
    def num_bits(self) -> int:
        """The number of bits of ``dst_type``."""
        return _NUM_BITS[self.dst_type]


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
        with found_in("LayerConfig.", ""):
            check_flag("retrain_enable", self.retrain_enable)
            for key, expected in (("retrain_data_config", DataConfig), ("retrain_weight_config", WeightConfig)):
                if not isinstance(getattr(self, key), expected):
                    raise wrong_type(key, f"a {expected.__name__}", getattr(self, key))
        if self.retrain_data_config.is_quantized:
            with found_in("LayerConfig.retrain_data_config.", ""):
                check_type_pair(self.retrain_data_config.dst_type, self.retrain_weight_config.dst_type)


def make_layer(
    data: Mapping[str, Any], weight: Mapping[str, Any], sections: tuple[str, str], before: str, enabled: Any = True
) -> LayerConfig:
    """Make the settings of a layer from those in a file.

    Args:
        data: The settings of its activations, by the names of ``DataConfig``.
        weight: The settings of its weights, by the names of ``WeightConfig``.
        sections: What these two sections are called in the file.
        before: What stands before a key of the layer in a message.
        enabled: Whether the layer is quantized.

    Returns:
        The settings.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.

    Example:
        >>> make_layer({}, {"dst_type": "INT2"}, ("activations", "weights"), "my.yaml: key '")
        Traceback (most recent call last):
        ...
        ValueError: my.yaml: key 'weights.dst_type' must be 'INT4' or 'INT8', found 'INT2' (str).
    """
    with found_in(before):
        layer = LayerConfig(enabled)
    with found_in(f"{before}{sections[0]}."):
        data_config = DataConfig(**data)
    with found_in(f"{before}{sections[1]}."):
        weight_config = WeightConfig(**weight)
    with found_in(f"{before}{sections[0]}."):
        return replace(layer, retrain_data_config=data_config, retrain_weight_config=weight_config)


def with_fixed_min(layer: LayerConfig, fixed_min: FixedMin) -> LayerConfig:
    """Return the settings of a layer with another ``fixed_min``; as they are if no lower clip can be fixed to 0.

    Example:
        >>> with_fixed_min(LayerConfig(), True).retrain_data_config.fixed_min
        True
    """
    data = layer.retrain_data_config
    return replace(layer, retrain_data_config=replace(data, fixed_min=fixed_min)) if data.may_begin_with_zero else layer
