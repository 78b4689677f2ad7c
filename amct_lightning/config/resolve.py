"""What a configuration means for a model: which settings each of its layers gets, and what its layer types allow."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from amct_lightning.config.choices import QuantChoices
from amct_lightning.config.layer import LayerConfig
from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.wording import abbreviated, closest

NOTHING_ENABLED = (
    'No layer retrain enabled. Set "retrain_enable":true, spelled out, in at least one layer to be quantized.'
)


def resolve_layers(
    layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str
) -> dict[str, LayerConfig]:
    """Fit the settings of layers to a model: fill in the defaults of its layer types, check what they allow.

    Args:
        layers: The settings by layer name; layers that are missing are disabled.
        eligible: The layers of the model that can be quantized, by name.
        source: What the settings are called in messages.

    Returns:
        The settings of exactly the eligible layers, in their order, with every default filled in.

    Raises:
        ValueError: If a layer is unknown or cannot be ``channel_wise``, or if no layer is enabled.
    """
    _refuse_unknown_layers(layers, eligible, source)
    _refuse_channel_wise(layers, eligible, source)
    if not any(layer.retrain_enable for layer in layers.values()):
        raise ValueError(f"{source}: {NOTHING_ENABLED}")
    disabled = LayerConfig(retrain_enable=False)
    resolved = {
        name: _with_channel_wise_default(layers.get(name, disabled), module) for name, module in eligible.items()
    }
    return _packable(resolved, eligible, source)


def _refuse_unknown_layers(layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> None:
    unknown = [name for name in layers if name not in eligible]
    if unknown:
        raise ValueError(
            f"unsupported layer {abbreviated(unknown)} in {source}: the model has no such layer, or it "
            f"cannot be quantized.{closest(unknown[0], eligible)} "
            f"Layers that can be quantized: {abbreviated(list(eligible)) or 'none'}."
        )


def _refuse_channel_wise(layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> None:
    for name, layer in layers.items():
        if layer.retrain_weight_config.channel_wise and not LAYER_TYPES[type(eligible[name])].channel_wise:
            raise ValueError(
                f"{source}: layer '{name}', key 'retrain_weight_config.channel_wise' must be false: "
                f"a {type(eligible[name]).__name__} layer can not be channel-wise."
            )


def _packable(layers: dict[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> dict[str, LayerConfig]:
    obstacles = {
        name: reason
        for name, layer in layers.items()
        if layer.retrain_enable
        and layer.retrain_weight_config.dst_type == "INT4"
        and (reason := LAYER_TYPES[type(eligible[name])].int4_obstacle(eligible[name]))
    }
    if obstacles:
        listed = ", ".join(f"'{name}' ({reason})" for name, reason in obstacles.items())
        warnings.warn(
            f"{source}: INT8 is used instead of INT4 for {listed}: INT4 weights are packed in pairs along "
            "the input-channel axis, which needs an even length and no groups. "
            "Set the dst_type of these layers to INT8 to silence this.",
            stacklevel=4,
        )
    return {name: without_int4(layer) if name in obstacles else layer for name, layer in layers.items()}


def expand(choices: QuantChoices, eligible: Mapping[str, nn.Module], source: str) -> dict[str, LayerConfig]:
    """Work out which of the choices each layer of a model gets.

    Args:
        choices: What the user wants.
        eligible: The layers of the model that can be quantized, by name.
        source: What the choices are called in messages.

    Returns:
        The settings of exactly the eligible layers, in their order, with every default filled in.

    Raises:
        ValueError: If a name or type fits no layer, a layer cannot be ``channel_wise`` as its entry demands, or no
            layer is left to be quantized.
    """
    _check_types(choices, eligible, source)
    skipped = _skipped_by_name(choices, eligible, source)
    by_name = _overrides_by_name(choices, eligible, source)
    defaults = _for_any_type(choices.defaults)
    layers = {}
    for name, module in eligible.items():
        kind = type(module).__name__
        settings = by_name.get(name) or choices.types.get(kind) or defaults
        is_skipped = name in skipped or (kind in choices.skip_types and name not in by_name)
        if choices.amct_rules and settings is not defaults:
            is_skipped = False  # there, an entry quantizes its layers whatever the skip lists say
        layers[name] = _left_out(settings, module) if is_skipped else settings
    _check_enabled(layers, source)
    _warn_quantized_anyway([name for name in skipped if layers[name].retrain_enable and name not in by_name], source)
    return resolve_layers(layers, eligible, source)


def _left_out(settings: LayerConfig, module: nn.Module) -> LayerConfig:
    """Give the settings that a skipped layer shows: those that it would get if it were not skipped."""
    shown = without_int4(settings) if LAYER_TYPES[type(module)].int4_obstacle(module) else settings
    return replace(shown, retrain_enable=False)


def _overrides_by_name(choices: QuantChoices, eligible: Mapping[str, nn.Module], source: str) -> dict[str, LayerConfig]:
    chosen: dict[str, LayerConfig] = {}
    for pattern, settings in choices.layers.items():
        matches = _matches(pattern, eligible, choices.amct_rules)
        if not matches:
            raise ValueError(_no_match(pattern, eligible, f"{source}: settings are given for", choices.amct_rules))
        chosen |= dict.fromkeys(matches, settings)
    return chosen


def _skipped_by_name(choices: QuantChoices, eligible: Mapping[str, nn.Module], source: str) -> list[str]:
    _warn_repeated(choices.skip_layers, source)
    skipped: dict[str, None] = {}
    for pattern in choices.skip_layers:
        matches = _matches(pattern, eligible, choices.amct_rules)
        if not matches:
            raise ValueError(_no_match(pattern, eligible, f"{source}: cannot skip", choices.amct_rules))
        skipped |= dict.fromkeys(matches)
    return list(skipped)


def _matches(pattern: str, eligible: Iterable[str], exact: bool) -> list[str]:
    return [name for name in eligible if name == pattern or (not exact and fnmatchcase(name, pattern))]


def _no_match(pattern: str, eligible: Mapping[str, nn.Module], problem: str, exact: bool) -> str:
    reason = (
        "the model has no such layer, or it cannot be quantized" if exact else "it fits no layer that can be quantized"
    )
    return (
        f"{problem} layer '{pattern}', but {reason}.{closest(pattern, eligible)} "
        f"Layers that can be quantized: {abbreviated(list(eligible)) or 'none'}."
    )


def _check_types(choices: QuantChoices, eligible: Mapping[str, nn.Module], source: str) -> None:
    _warn_repeated(choices.skip_types, source)
    present = [type(module).__name__ for module in eligible.values()]
    known = [kind.__name__ for kind, entry in LAYER_TYPES.items() if entry.by_default or not choices.amct_rules]
    allowed = list(dict.fromkeys([*known, *present]))
    for problem, names in (("cannot skip", choices.skip_types), ("settings are given for", choices.types)):
        for name in names:
            if name not in allowed:
                raise ValueError(
                    f"{source}: {problem} layer type '{name}', but layers of this type cannot be quantized."
                    f"{closest(name, allowed)} Types that can be quantized: {', '.join(allowed)}."
                )


def _for_any_type(defaults: LayerConfig) -> LayerConfig:
    """Leave ``channel_wise=True`` open: the default of a layer type is true wherever it can be."""
    weight = defaults.retrain_weight_config
    if not weight.channel_wise:
        return defaults
    return replace(defaults, retrain_weight_config=replace(weight, channel_wise=None))


def _check_enabled(layers: Mapping[str, LayerConfig], source: str) -> None:
    if not any(layer.retrain_enable for layer in layers.values()):
        raise ValueError(
            f"{source}: No layer retrain enabled: every layer that can be quantized ({abbreviated(list(layers))}) is "
            "to be skipped. Skip fewer layers or types, or give settings for a layer to have it quantized anyway."
        )


def _warn_repeated(names: Iterable[str], source: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        warnings.warn(f"{source}: named more than once to be skipped: {abbreviated(repeated)}.", stacklevel=2)


def _warn_quantized_anyway(names: list[str], source: str) -> None:
    """Settings for a type beat the skipping of a name, as in AMCT; who writes both rarely expects that."""
    if names:
        warnings.warn(
            f"{source}: {abbreviated(names)} is to be skipped but is quantized, because settings are given for its "
            "type. To skip it, give these settings by layer name and not by type.",
            stacklevel=2,
        )


def _with_channel_wise_default(layer: LayerConfig, module: nn.Module) -> LayerConfig:
    """Fill in ``channel_wise`` where it was left open."""
    weight = layer.retrain_weight_config
    if weight.channel_wise is not None:
        return layer
    return replace(layer, retrain_weight_config=replace(weight, channel_wise=LAYER_TYPES[type(module)].channel_wise))


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
