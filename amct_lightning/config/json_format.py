"""The JSON form of a configuration: from text to plain objects to checked settings, and back to text.

Here is the form of the file; what a setting may hold is checked by the objects that are made of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from amct_lightning.config.checks import (
    ACTIVATION_ALGORITHMS,
    LEARNED_CLIPS,
    RuleError,
    check_choice,
    check_flag,
    check_keys,
    found,
    found_in,
    wrong_type,
)
from amct_lightning.config.fit import NOTHING_ENABLED
from amct_lightning.config.layer import DataConfig, LayerConfig, WeightConfig, make_layer
from amct_lightning.config.text_file import read_text
from amct_lightning.wording import abbreviated, closest

RUN_KEYS = ("version", "fakequant_precision_mode", "batch_num")
LAYER_KEYS, DATA_KEYS, WEIGHT_KEYS = (
    tuple(field.name for field in fields(settings)) for settings in (LayerConfig, DataConfig, WeightConfig)
)
SECTIONS = ("retrain_data_config", "retrain_weight_config")
_IN_CHOICES = "AMCT's files have no such setting; delete it, or give choices as YAML or as a dict: activations: {{{}}}"
_BEYOND_AMCT = {"symmetric": "symmetric: true", "init": "init: output", "percentile": "init: percentile"}
_AMCT_DATA_KEYS = tuple(key for key in DATA_KEYS if key not in _BEYOND_AMCT)
PRUNE_KEYS = ("regular_prune_enable", "regular_prune_config")

REMEDY = "make one with create_quant_retrain_config(config_file, model, input_data)"


def read_json(path: str | Path) -> object:
    """Read a JSON file, refusing repeated keys at any depth.

    Args:
        path: The file.

    Returns:
        The root value, whatever its type.

    Raises:
        TypeError: If ``path`` is no path.
        FileNotFoundError: If there is no such file.
        OSError: If the file cannot be read.
        ValueError: If the content is no text, no JSON (``json.JSONDecodeError``), nested too deeply or has
            repeated keys.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = file.write_text('{"version":1}')
        >>> read_json(file)
        {'version': 1}
    """
    text = read_text(path, REMEDY)
    repeated: dict[str, None] = {}
    try:
        raw: object = json.loads(text, object_pairs_hook=_dict_noting_repeats(repeated))
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{path}: not valid JSON: {error.msg}", error.doc, error.pos) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply to be a quantization config.") from error
    if repeated:
        raise ValueError(f"{path}: repeated keys [{abbreviated(repeated)}]. Please delete all but one of each.")
    return raw


def parse_layers(raw: Mapping[Any, Any], source: str) -> dict[str, LayerConfig]:
    """Turn the layers of a configuration file into ``LayerConfig`` objects.

    Args:
        raw: The root value of the file.
        source: The name of the file, for messages.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a key is unknown or holds a value that is not allowed, or no layer is enabled.

    Example:
        >>> parse_layers({"fc": {"retrain_enable": True}}, "demo")["fc"].retrain_data_config.dst_type
        'INT8'
    """
    layers: dict[str, LayerConfig] = {}
    alike: dict[str, LayerConfig] = {}  # most layers of a network have the settings of another one
    for name, value in raw.items():
        if name in RUN_KEYS:
            continue
        if not isinstance(name, str):
            raise TypeError(f"{source}: a layer name must be a string, found {found(name)}.")
        content = repr(value)
        layers[name] = alike[content] if content in alike else _parse_layer(name, value, source)
        alike[content] = layers[name]
    if not any(raw[name].get("retrain_enable") for name in layers):
        raise ValueError(f"{source}: {NOTHING_ENABLED}")
    return layers


def layer_to_dict(layer: LayerConfig) -> dict[str, object]:
    """Give the plain form of a layer's settings in the key order of the file, without what was left open.

    Example:
        >>> layer_to_dict(LayerConfig())["retrain_weight_config"]
        {'algo': 'arq_retrain', 'dst_type': 'INT8'}
    """
    data, weight = layer.retrain_data_config, layer.retrain_weight_config
    learned = ("algo", "dst_type", "channel_wise", "group_size", "init")
    weight_keys = WEIGHT_KEYS if weight.algo == "arq_retrain" else learned
    return {
        "retrain_enable": layer.retrain_enable,
        "retrain_data_config": _given(data, [key for key in _AMCT_DATA_KEYS if getattr(data, key) != "after_relu"]),
        "retrain_weight_config": _given(weight, weight_keys),
    }


def layers_to_dict(layers: Mapping[str, LayerConfig]) -> dict[str, object]:
    """Give the plain form of the settings of all layers.

    Raises:
        ValueError: If AMCT's format has no word for a setting: ``fixed_min="propagate"``, or activations that are
            symmetric, per token or in float, or with another ``init`` than AMCT's.

    Example:
        >>> list(layers_to_dict({"fc": LayerConfig()}))
        ['fc']
    """
    propagating = [name for name, layer in layers.items() if layer.retrain_data_config.fixed_min == "propagate"]
    if propagating:
        raise ValueError(
            f"fixed_min is 'propagate' for {abbreviated(propagating)}, for which a JSON configuration has no word. Set "
            "it to true or false there, or make the configuration with RetrainConfig.from_choices, which finds out "
            "for a model which it is."
        )
    beyond = [name for name, layer in layers.items() if layer.retrain_data_config.beyond_amct]
    if beyond:
        raise ValueError(
            f"The activations of {abbreviated(beyond)} are symmetric, or their algo is not '{LEARNED_CLIPS}' or their "
            "init not 'mse': a JSON configuration has no word for that. Keep these choices as YAML or as a dict."
        )
    return {name: layer_to_dict(layer) for name, layer in layers.items()}


def dump_text(raw: Mapping[str, object]) -> str:
    """Lay out plain content exactly as AMCT does.

    Example:
        >>> print(dump_text({"version": 1}))
        {
            "version":1
        }
    """
    return json.dumps(raw, indent=4, separators=(",", ":"))


def _dict_noting_repeats(repeated: dict[str, None]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.update((key, None) for key, count in counts.items() if count > 1)
        return content

    return build


def _parse_layer(name: str, raw: object, source: str) -> LayerConfig:
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"{source}: '{name}' is not a valid key; its value should be an object {{...}} if it is a layer, "
            f"found {found(raw)}.{closest(name, RUN_KEYS)}"
        )

    before = f"{source}: layer '{name}', key '"
    with found_in(before):
        for key in PRUNE_KEYS:
            if key in raw:
                text = "is not expected: this package quantizes and does not prune; delete the key"
                raise RuleError(ValueError, key, text)
        check_keys(raw, LAYER_KEYS)
    for section, keys in zip(SECTIONS, (_AMCT_DATA_KEYS, WEIGHT_KEYS), strict=True):
        _check_section(raw.get(section, {}), section, keys, before)
    data, weight = (raw.get(section, {}) for section in SECTIONS)
    return make_layer(data, weight, SECTIONS, before, raw.get("retrain_enable", True))


def _check_section(raw: object, section: str, keys: tuple[str, ...], before: str) -> None:
    with found_in(before):
        if not isinstance(raw, Mapping):
            raise wrong_type(section, "an object {...}", raw)
    with found_in(f"{before}{section}."):
        _refuse_choices(raw, section)
        check_keys(raw, keys)
        for key, value in raw.items():
            if value is None:
                raise RuleError(TypeError, key, "must not be null; leave the key out to get its default")
            if key == "algo" and section == SECTIONS[0]:
                check_choice(key, value, (LEARNED_CLIPS,))
            if key == "fixed_min":
                check_flag(key, value)  # AMCT's format has no words for rules


def _refuse_choices(raw: Mapping[Any, Any], section: str) -> None:
    """Refuse settings of activations that only choices can have, and AMCT's files cannot."""
    algo = raw.get("algo")
    for key, choice in _BEYOND_AMCT.items() if section == SECTIONS[0] else ():
        if key in raw:
            raise RuleError(ValueError, key, f"is not expected: {_IN_CHOICES.format(choice)}")
    if section == SECTIONS[0] and algo in ACTIVATION_ALGORITHMS and algo != LEARNED_CLIPS:
        text = f"must be '{LEARNED_CLIPS}', found {found(algo)}: {_IN_CHOICES.format(f'algo: {algo}')}"
        raise RuleError(ValueError, "algo", text)


def _given(settings: DataConfig | WeightConfig, keys: Iterable[str]) -> dict[str, object]:
    values = vars(settings)
    return {key: values[key] for key in keys if values[key] is not None}
