"""The JSON form of a configuration: from text to plain objects to checked settings, and back to text.

What a setting may hold is checked by the objects; here a broken rule gets its file, layer and key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

from amct_lightning.config.checks import PRECISION_MODES, Fault, found, key_faults, raise_first, type_fault
from amct_lightning.config.layer import DataConfig, LayerConfig, WeightConfig, make_layer
from amct_lightning.config.resolve import NOTHING_ENABLED
from amct_lightning.config.text_file import read_text
from amct_lightning.wording import closest

RUN_KEYS = ("version", "fakequant_precision_mode", "batch_num")
LAYER_KEYS = ("retrain_enable", "retrain_data_config", "retrain_weight_config")
DATA_KEYS = ("algo", "clip_max", "clip_min", "fixed_min", "dst_type")
WEIGHT_KEYS = ("algo", "channel_wise", "dst_type")
PRUNE_KEYS = ("regular_prune_enable", "regular_prune_config")
SECTIONS = ("retrain_data_config", "retrain_weight_config")

REMEDY = "make one with create_quant_retrain_config(config_file, model, input_data)"


class ConfigParts(TypedDict):
    """The checked content of a configuration file, as keyword arguments of ``RetrainConfig``."""

    version: int
    batch_num: int
    fakequant_precision_mode: str
    layers: dict[str, LayerConfig]


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
    return parse_text(read_text(path, REMEDY), str(path))


def parse_text(text: str, source: str) -> object:
    """Parse JSON text as ``read_json`` does; ``source`` names it in messages."""
    repeated: list[str] = []
    try:
        raw: object = json.loads(text, object_pairs_hook=_dict_noting_repeats(repeated))
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{source}: not valid JSON: {error.msg}", error.doc, error.pos) from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: nested too deeply to be a quantization config.") from error
    if repeated:
        raise ValueError(f"{source}: repeated keys {repeated}. Please delete all but one of each.")
    return raw


def parse_config(raw: object, source: str) -> ConfigParts:
    """Check the plain content of a configuration file and turn its layers into ``LayerConfig`` objects.

    Args:
        raw: The root value of the file.
        source: The name of the file, for messages.

    Returns:
        The keyword arguments of ``RetrainConfig``.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a key is missing, unknown or holds a value that is not allowed, or no layer is enabled.

    Example:
        >>> parse_config({"version": 1, "batch_num": 2, "fc": {"retrain_enable": True}}, "demo")["batch_num"]
        2
    """
    if not isinstance(raw, Mapping):
        raise TypeError(f"{source}: the content must be an object {{...}}, found {found(raw)}.")
    for key in ("version", "batch_num"):
        if key not in raw:
            raise ValueError(f"{source}: must have the key '{key}'; add e.g. \"{key}\":1.")
    layers = {
        _layer_name(name, source): _parse_layer(name, value, source)
        for name, value in raw.items()
        if name not in RUN_KEYS
    }
    if not any(raw[name].get("retrain_enable") for name in layers):
        raise ValueError(f"{source}: {NOTHING_ENABLED}")
    return ConfigParts(
        version=raw["version"],
        batch_num=raw["batch_num"],
        fakequant_precision_mode=raw.get("fakequant_precision_mode", PRECISION_MODES[0]),
        layers=layers,
    )


def layer_to_dict(layer: LayerConfig) -> dict[str, object]:
    """Give the plain form of a layer's settings in the key order of the file, without what was left open.

    Example:
        >>> layer_to_dict(LayerConfig())["retrain_weight_config"]
        {'algo': 'arq_retrain', 'dst_type': 'INT8'}
    """
    data, weight = layer.retrain_data_config, layer.retrain_weight_config
    weight_keys = WEIGHT_KEYS if weight.algo == "arq_retrain" else ("algo", "dst_type", "channel_wise")
    return {
        "retrain_enable": layer.retrain_enable,
        "retrain_data_config": _given(data, DATA_KEYS),
        "retrain_weight_config": _given(weight, weight_keys),
    }


def dump_text(raw: Mapping[str, object]) -> str:
    """Lay out plain content exactly as AMCT does.

    Example:
        >>> print(dump_text({"version": 1}))
        {
            "version":1
        }
    """
    return json.dumps(raw, indent=4, separators=(",", ":"))


def _dict_noting_repeats(repeated: list[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result and key not in repeated:
                repeated.append(key)
            result[key] = value
        return result

    return build


def _layer_name(name: object, source: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source}: a layer name must be a string, found {found(name)}.")
    return name


def _parse_layer(name: str, raw: object, source: str) -> LayerConfig:
    where = f"{source}: layer '{name}'"
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"{source}: '{name}' is not a valid key; its value should be an object {{...}} if it is a layer, "
            f"found {found(raw)}.{closest(name, RUN_KEYS)}"
        )
    raise_first(_layer_faults(raw), lambda key: f"{where}, key '{key}'")
    data, weight = (raw.get(section, {}) for section in SECTIONS)
    return make_layer(data, weight, SECTIONS, lambda key: f"{where}, key '{key}'", raw.get("retrain_enable", True))


def _layer_faults(raw: Mapping[Any, Any]) -> Iterator[Fault]:
    for key in PRUNE_KEYS:
        if key in raw:
            yield Fault(ValueError, key, "is not expected: this package quantizes and does not prune; delete the key")
    yield from key_faults(raw, LAYER_KEYS)
    for section, keys in zip(SECTIONS, (DATA_KEYS, WEIGHT_KEYS), strict=True):
        yield from _section_faults(raw.get(section, {}), section, keys)


def _section_faults(raw: object, section: str, keys: tuple[str, ...]) -> Iterator[Fault]:
    if not isinstance(raw, Mapping):
        yield type_fault(section, "an object {...}", raw)
        return
    for fault in chain(key_faults(raw, keys), _null_faults(raw)):
        yield fault._replace(key=f"{section}.{fault.key}")


def _null_faults(raw: Mapping[Any, Any]) -> Iterator[Fault]:
    for key, value in raw.items():
        if value is None:
            yield Fault(TypeError, str(key), "must not be null; leave the key out to get its default")


def _given(settings: DataConfig | WeightConfig, keys: tuple[str, ...]) -> dict[str, object]:
    values = vars(settings)
    return {key: values[key] for key in keys if values[key] is not None}
