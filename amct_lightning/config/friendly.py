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

Everything may be left out. The words inside ``activations`` and ``weights`` are those of the JSON form; types may be
written in small letters. Mappings and sequences may be of any class, such as those of OmegaConf. An entry of
``types`` or ``layers`` gives only what differs from the ``activations`` and ``weights`` at the top; in a ``.cfg``
file it would replace them completely. ``null`` stands for the default, also against a value at the top. Defaults are
AMCT's, but for ``fixed_min``: see :class:`DataConfig`. Which entry counts, and what is skipped: see
:class:`QuantChoices`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amct_lightning.config.checks import LEARNED_CLIPS, check_keys, found, found_in, wrong_type
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
_OF_CLIPS = (*_CLIPS, "fixed_min", "symmetric")
_Settings = dict[str, dict[str, Any]]


def read_yaml_config(path: str | Path) -> QuantChoices:
    """Read a YAML file with choices.

    Args:
        path: The file.

    Returns:
        The choices; ``resolve`` works out what they mean for a model.

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
    before = f"{source}: key '"
    given = {key: value for key, value in raw.items() if value is not None}
    with found_in(before):
        check_keys(raw, KEYS, ". The content of a JSON configuration needs the key 'version'")
        for key in ("skip_layers", "skip_types"):
            names = given.get(key, [])
            is_list = isinstance(names, Sequence) and not isinstance(names, str)
            if not is_list or not all(isinstance(name, str) for name in names):
                raise wrong_type(key, 'a list of names such as ["head"], each of them text', names)
            given[key] = tuple(names)
    defaults = _settings(given, before)
    for key in ("types", "layers"):
        given[key] = _overrides(given.get(key, {}), key, defaults, source)
    choices = {key: value for key, value in given.items() if key not in SECTIONS}
    choices["defaults"] = _layer(defaults, before)
    with found_in(before):
        return QuantChoices(**choices)


def _overrides(entries: Any, key: str, defaults: _Settings, source: str) -> Any:
    """Complete the entries of ``key``; what is no mapping at all is left for ``QuantChoices`` to refuse."""
    if not isinstance(entries, Mapping):
        return entries
    overrides = {}
    for name, raw in entries.items():
        where = f"{source}: {key} '{name}'"
        entry = {} if raw is None else raw
        if not isinstance(entry, Mapping):
            raise TypeError(f"{where} must hold {' and '.join(SECTIONS)}, found {found(entry)}.")
        before = f"{where}: key '"
        with found_in(before):
            check_keys(entry, SECTIONS)
        overrides[name] = _layer(_merged(defaults, _settings(entry, before)), before)
    return overrides


def _settings(entry: Mapping[str, Any], before: str) -> _Settings:
    """Take the activation and weight settings out of an entry, clip values as floats."""
    settings: _Settings = {}
    for section, keys in _SECTION_KEYS.items():
        raw = {} if entry.get(section) is None else entry[section]
        with found_in(before):
            if not isinstance(raw, Mapping):
                raise wrong_type(section, f"a mapping with keys such as '{keys[-1]}'", raw)
        with found_in(f"{before}{section}."):
            check_keys(raw, keys)
        settings[section] = {key: _spelled(key, value) for key, value in raw.items()}
    return settings


def _merged(defaults: _Settings, entry: _Settings) -> _Settings:
    merged = {section: defaults[section] | entry[section] for section in SECTIONS}
    weights = merged["weights"]
    if weights.get("dst_type") != "INT4" and "group_size" not in entry["weights"]:
        weights.pop("group_size", None)  # at the top it is for what has INT4 weights
    of_clips = merged["activations"]
    if of_clips.get("algo", LEARNED_CLIPS) != LEARNED_CLIPS:  # at the top they are for what has learned clips
        _drop_inherited(of_clips, entry["activations"], _OF_CLIPS)
        if of_clips["algo"] == "none":
            _drop_inherited(of_clips, entry["activations"], ("dst_type",))
    elif entry["activations"].get("symmetric"):
        _drop_inherited(of_clips, entry["activations"], ("fixed_min",))
    return merged


def _drop_inherited(merged: dict[str, Any], entry: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if key not in entry:
            merged.pop(key, None)


def _layer(settings: _Settings, before: str) -> LayerConfig:
    data, weight = (
        {key: value for key, value in settings[section].items() if value is not None} for section in SECTIONS
    )
    return make_layer(data, weight, SECTIONS, before)


def _spelled(key: str, value: object) -> object:
    """Spell a value as the settings want it: clip values as floats, types in capitals."""
    if key == "dst_type" and isinstance(value, str):
        return value.upper()
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if key in _CLIPS and is_number else value  # type: ignore[arg-type]
