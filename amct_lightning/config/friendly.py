"""The friendly form of a configuration, a dict or a YAML file: a few choices instead of a list of all layers.

.. code-block:: yaml

    batch_num: 2
    activations: {dst_type: INT8}
    weights: {algo: arq_retrain, channel_wise: true}
    types:
      Linear: {weights: {dst_type: INT4}}
    layers:
      "blocks.*.fc1": {activations: {dst_type: INT16}, weights: {dst_type: INT8}}
    skip_layers: [head]
    skip_types: [ConvTranspose2d]

Everything may be left out. The words inside ``activations`` and ``weights`` are those of the JSON form. An entry of
``types`` or ``layers`` gives only what differs from the ``activations`` and ``weights`` at the top; in a ``.cfg``
file it would replace them completely. ``null`` stands for AMCT's default, also against a value at the top. Which
entry counts, and what is skipped: see :class:`QuantChoices`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from amct_lightning.config.checks import (
    Fault,
    found,
    key_faults,
    located,
    raise_first,
    type_fault,
)
from amct_lightning.config.choices import QuantChoices
from amct_lightning.config.json_format import DATA_KEYS, WEIGHT_KEYS
from amct_lightning.config.layer import LayerConfig, make_layer
from amct_lightning.config.text_file import parse_yaml, read_text

SECTIONS = ("activations", "weights")
KEYS = (
    "batch_num",
    "fakequant_precision_mode",
    *SECTIONS,
    "types",
    "layers",
    "skip_layers",
    "skip_types",
)

_SECTION_KEYS = dict(zip(SECTIONS, (DATA_KEYS, WEIGHT_KEYS), strict=True))
_CLIPS = ("clip_max", "clip_min")
_Settings = dict[str, dict[str, Any]]


def read_yaml_config(path: str | Path) -> QuantChoices:
    """Read a YAML file with choices.

    Args:
        path: The file.

    Returns:
        The choices; ``resolve_config`` works out what they mean for a model.

    Raises:
        OSError: If the file is missing (``FileNotFoundError``) or cannot be read.
        TypeError: If a value in the file has the wrong type.
        ValueError: If the file is not valid YAML or breaks a rule; the message names file, layer and key.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "config.yaml"
        >>> _ = file.write_text("weights: {dst_type: INT4}")
        >>> read_yaml_config(file).defaults.retrain_weight_config.dst_type
        'INT4'
    """
    text = read_text(path, "check the path, or leave the config out to quantize every layer with INT8")
    return parse_choices(parse_yaml(text, str(path)), str(path))


def parse_choices(raw: object, source: str = "config") -> QuantChoices:
    """Check the plain content of the friendly form and turn it into choices.

    Args:
        raw: A mapping with the keys shown at the top of this module.
        source: What the content is called in messages, for example the file name.

    Returns:
        The choices.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a key is unknown or holds a value that is not allowed.

    Example:
        >>> choices = parse_choices({"activations": {"clip_max": 2, "clip_min": -2}, "layers": {"head": {}}})
        >>> choices.layers["head"].retrain_data_config.clip_max
        2.0
    """
    if not isinstance(raw, Mapping):
        raise TypeError(f"{source}: the content must be a mapping with keys such as 'weights', found {found(raw)}.")
    raise_first(_root_faults(raw), _key_in(source))
    given = {key: value for key, value in raw.items() if value is not None}
    defaults = _settings(given, source)
    run = {key: given[key] for key in ("batch_num", "fakequant_precision_mode") if key in given}
    parts: dict[str, Any] = {
        "defaults": _layer(defaults, source),
        "types": _overrides(given, "types", defaults, source),
        "layers": _overrides(given, "layers", defaults, source),
        "skip_layers": tuple(given.get("skip_layers", ())),
        "skip_types": tuple(given.get("skip_types", ())),
    }
    with located(_key_in(source)):
        return QuantChoices(**run, **parts)


def _root_faults(raw: Mapping[Any, Any]) -> Iterator[Fault]:
    for fault in key_faults(raw, KEYS):
        hint = "" if fault.text.endswith("?") else ". The content of a JSON configuration needs the key 'version'"
        yield fault._replace(text=fault.text + hint)
    given = {key: value for key, value in raw.items() if value is not None}
    for key in ("types", "layers"):
        yield from _entry_faults(key, given.get(key, {}))
    for key in ("skip_layers", "skip_types"):
        names = given.get(key, [])
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            yield type_fault(key, 'a list of names such as ["head"], each of them text', names)


def _entry_faults(key: str, entries: object) -> Iterator[Fault]:
    if not isinstance(entries, Mapping):
        yield type_fault(key, "a mapping from names to settings", entries)
        return
    for name in entries:
        if not isinstance(name, str):
            yield type_fault(key, "a mapping from names to settings whose names are text (in quotes)", name)


def _overrides(given: Mapping[str, Any], key: str, defaults: _Settings, source: str) -> dict[str, LayerConfig]:
    overrides = {}
    for name, raw in given.get(key, {}).items():
        where = f"{source}: {key} '{name}'"
        entry = {} if raw is None else raw
        if not isinstance(entry, Mapping):
            raise TypeError(f"{where} must hold {' and '.join(SECTIONS)}, found {found(entry)}.")
        raise_first(key_faults(entry, SECTIONS), _key_in(where))
        overrides[name] = _layer(_merged(defaults, _settings(entry, where)), where)
    return overrides


def _settings(entry: Mapping[str, Any], where: str) -> _Settings:
    """Take the activation and weight settings out of an entry, clip values as floats."""
    settings: _Settings = {}
    for section, keys in _SECTION_KEYS.items():
        raw = entry.get(section)
        raise_first(_section_faults(section, raw, keys), _key_in(where))
        settings[section] = {key: _as_float(value) if key in _CLIPS else value for key, value in (raw or {}).items()}
    return settings


def _section_faults(section: str, raw: object, keys: tuple[str, ...]) -> Iterator[Fault]:
    if raw is not None and not isinstance(raw, Mapping):
        yield type_fault(section, f"a mapping with keys such as '{keys[-1]}'", raw)
    elif raw is not None:
        for fault in key_faults(raw, keys):
            yield fault._replace(key=f"{section}.{fault.key}")


def _merged(defaults: _Settings, entry: _Settings) -> _Settings:
    top = {section: dict(values) for section, values in defaults.items()}
    if top["weights"].get("channel_wise"):
        del top["weights"]["channel_wise"]  # at the top it means: for the layers that can be, which is the default
    return {section: top[section] | entry[section] for section in SECTIONS}


def _layer(settings: _Settings, where: str) -> LayerConfig:
    data, weight = (
        {key: value for key, value in settings[section].items() if value is not None} for section in SECTIONS
    )
    return make_layer(data, weight, SECTIONS, _key_in(where))


def _key_in(where: str) -> Callable[[str], str]:
    return lambda key: f"{where}: key '{key}'"


def _as_float(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if is_number else value  # type: ignore[arg-type]
