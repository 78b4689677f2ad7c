"""A complete configuration in few words: as AMCT's simple configuration (``.cfg``) or as YAML choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml
from google.protobuf import text_format
from torch import nn

from amct_lightning.config import LayerConfig, QuantChoices, RetrainConfig
from amct_lightning.config.json_format import DATA_KEYS, WEIGHT_KEYS
from amct_lightning.config.simple_schema import SIMPLE_SCHEMA
from amct_lightning.layer_types import LAYER_TYPES

_PARTS = {"activations": DATA_KEYS, "weights": WEIGHT_KEYS}
_USUAL = (("activations", "algo", "ulq_quantize"), ("activations", "symmetric", False))
_ATTRIBUTES = {"activations": "retrain_data_config", "weights": "retrain_weight_config"}
_Plain = dict[str, Any]


def in_few_words(config: RetrainConfig, layers: Mapping[str, nn.Module]) -> QuantChoices:
    """Say what a complete configuration says with as few entries as possible.

    Args:
        config: The settings of all layers that can be quantized.
        layers: These layers by name.

    Returns:
        Choices that mean the same for these layers: the commonest settings for all, and what differs by name.

    Example:
        >>> layers = {"0": nn.Conv2d(4, 4, 3), "1": nn.Linear(4, 4)}
        >>> choices = in_few_words(QuantChoices(skip_layers=("1",)).resolve(layers), layers)
        >>> dict(choices.layers), choices.skip_layers
        ({}, ('1',))
    """
    enabled = {name: _open(layer, layers[name]) for name, layer in config.items() if layer.retrain_enable}
    defaults = Counter(enabled.values()).most_common(1)[0][0]
    by_default = {name for name in enabled if LAYER_TYPES[type(layers[name])].by_default}
    return QuantChoices(
        batch_num=config.batch_num,
        fakequant_precision_mode=config.fakequant_precision_mode,
        defaults=defaults,
        layers={name: layer for name, layer in enabled.items() if layer != defaults or name not in by_default},
        skip_layers=tuple(name for name in config if name not in enabled),
    )


def to_yaml(choices: QuantChoices) -> str:
    """Write choices as YAML.

    Args:
        choices: The choices.

    Example:
        >>> print(to_yaml(QuantChoices(skip_layers=("head",))))
        batch_num: 1
        activations: {dst_type: INT8}
        weights: {algo: arq_retrain, dst_type: INT8}
        skip_layers: [head]
        <BLANKLINE>
    """
    top = _plain(choices.defaults)
    content: _Plain = {"batch_num": choices.batch_num}
    if choices.fakequant_precision_mode != "DEFAULT":
        content["fakequant_precision_mode"] = choices.fakequant_precision_mode
    content |= top
    if choices.layers:
        content["layers"] = {name: _difference(top, _plain(layer)) for name, layer in choices.layers.items()}
    if choices.skip_layers:
        content["skip_layers"] = list(choices.skip_layers)
    return str(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110))


def to_simple(choices: QuantChoices) -> str:
    """Write choices as a simple configuration.

    Args:
        choices: The choices.

    Example:
        >>> print(to_simple(QuantChoices(batch_num=2, skip_layers=("head",))))
        batch_num: 2
        retrain_data_quant_config {
          ulq_quantize {
            dst_type: INT8
          }
        }
        retrain_weight_quant_config {
          arq_retrain {
            dst_type: INT8
          }
        }
        skip_layers: "head"
        <BLANKLINE>
    """
    mode = choices.fakequant_precision_mode
    message = SIMPLE_SCHEMA.message_class("AMCTRetrainConfig")(
        batch_num=choices.batch_num,
        **_message(choices.defaults),
        skip_layers=list(choices.skip_layers),
        override_layer_configs=[{"layer_name": name, **_message(layer)} for name, layer in choices.layers.items()],
        **({} if mode == "DEFAULT" else {"fakequant_precision_mode": mode}),
    )
    return text_format.MessageToString(message, as_utf8=True)


def _open(layer: LayerConfig, module: nn.Module) -> LayerConfig:
    """Leave ``channel_wise`` out where it is what the type of the layer has anyway."""
    weight = layer.retrain_weight_config
    if weight.channel_wise != LAYER_TYPES[type(module)].channel_wise:
        return layer
    return replace(layer, retrain_weight_config=replace(weight, channel_wise=None))


def _plain(layer: LayerConfig) -> dict[str, _Plain]:
    parts = {part: vars(getattr(layer, _ATTRIBUTES[part])) for part in _PARTS}
    return {
        part: {
            key: parts[part][key]
            for key in keys
            if parts[part][key] is not None and (part, key, parts[part][key]) not in _USUAL
        }
        for part, keys in _PARTS.items()
    }


def _difference(top: dict[str, _Plain], entry: dict[str, _Plain]) -> dict[str, _Plain]:
    """Return what an entry has to say against the settings at the top; null for what only they have."""
    changed = {
        part: {key: entry[part].get(key) for key in _PARTS[part] if top[part].get(key) != entry[part].get(key)}
        for part in _PARTS
    }
    return {part: values for part, values in changed.items() if values}


def _message(layer: LayerConfig) -> _Plain:
    plain = _plain(layer)
    data, weight = plain["activations"], plain["weights"]
    clips = {key: data.pop(key) for key in ("clip_max", "clip_min") if key in data}
    return {
        "retrain_data_quant_config": {"ulq_quantize": data | ({"clip_max_min": clips} if clips else {})},
        "retrain_weight_quant_config": {weight.pop("algo"): weight},
    }
