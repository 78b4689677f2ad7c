"""From choices to settings: which of them each layer of a model gets.

Defaults of layer types and what a type forbids come after that, in ``resolve.py``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from amct_lightning.config.layer import LayerConfig
from amct_lightning.config.layer_types import int4_obstacle, without_int4
from amct_lightning.config.retrain import RetrainConfig
from amct_lightning.modules.registry import LAYER_TYPES
from amct_lightning.wording import abbreviated, closest

if TYPE_CHECKING:
    from torch import nn

    from amct_lightning.config.choices import QuantChoices


def expand(choices: QuantChoices, eligible: Mapping[str, nn.Module], source: str) -> RetrainConfig:
    """Do the work of ``QuantChoices.resolve``.

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
    config = RetrainConfig(
        batch_num=int(choices.batch_num), fakequant_precision_mode=choices.fakequant_precision_mode, layers=layers
    )
    return config.resolve(eligible, source)


def _left_out(settings: LayerConfig, module: nn.Module) -> LayerConfig:
    """Give the settings that a skipped layer shows: those that it would get if it were not skipped."""
    return replace(without_int4(settings) if int4_obstacle(module) else settings, retrain_enable=False)


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
