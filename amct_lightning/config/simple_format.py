"""The ``.cfg`` simple configuration: from AMCT's protobuf text to choices.

The messages are in ``simple_schema.py``; what the choices mean for a model is in ``choices.py``.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message

from amct_lightning.config.checks import found_in
from amct_lightning.config.choices import QuantChoices
from amct_lightning.config.layer import LayerConfig, make_layer
from amct_lightning.config.simple_schema import SIMPLE_SCHEMA
from amct_lightning.config.text_file import read_text
from amct_lightning.wording import closest

_PRUNING = ("prune_config", "regular_prune_skip_layers", "regular_prune_skip_types")
_TYPES, _LAYERS = "override_layer_types", "override_layer_configs"
_TYPE_NAMES = {number: name for name, number in SIMPLE_SCHEMA.enums["DataType"].items()}
_UNKNOWN_FIELD = re.compile(r'Message type "(\w+)" has no field named "([^"]{0,80})')
_UNKNOWN_WORD = re.compile(r'Enum type "([\w.]+)" has no value named (\w+)')

_CHOICES_ONLY = ("symmetric", "per_token", "none")
_SHOWN = 300


class ParseError(text_format.ParseError, ValueError):
    """A ``.cfg`` file is not the text of a simple configuration; it can be caught as AMCT's error, too."""


def read_simple_config(path: str | Path) -> QuantChoices:
    """Read a ``.cfg`` file.

    Args:
        path: The file.

    Returns:
        The choices; ``resolve`` works out what they mean for a model.

    Raises:
        OSError: If the file is missing (``FileNotFoundError``) or cannot be read.
        TypeError: If ``path`` is no path.
        ValueError: If the file cannot be parsed (``ParseError``) or breaks a rule; the message names the file and
            the line or key.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "simple.cfg"
        >>> _ = file.write_text('batch_num: 2  skip_layers: "head"')
        >>> read_simple_config(file).skip_layers
        ('head',)
    """
    remedy = "check the path, or leave config_defination out to quantize every layer with INT8"
    return parse_simple_config(read_text(path, remedy), str(path))


def parse_simple_config(text: str, source: str = "config") -> QuantChoices:
    """Turn the text of a ``.cfg`` file into choices.

    Args:
        text: The text; an empty one stands for AMCT's defaults.
        source: What it is called in messages, for example the file name.

    Returns:
        The choices.

    Raises:
        ValueError: If the text cannot be parsed (``ParseError``) or breaks a rule.

    Example:
        >>> text = "retrain_weight_quant_config: { arq_retrain: { dst_type: INT4 } }"
        >>> parse_simple_config(text).defaults.retrain_weight_config.dst_type
        'INT4'
    """
    root: Any = _parse(text, source)
    _refuse_pruning(root, source)
    defaults = _layer(root, source)
    types, empty_types = _overrides(root.override_layer_types, "layer_type", f"{source}: {_TYPES}")
    layers, empty_layers = _overrides(root.override_layer_configs, "layer_name", f"{source}: {_LAYERS}")
    with found_in(f"{source}: key '"):
        return QuantChoices(
            batch_num=root.batch_num,
            fakequant_precision_mode="FORCE_FP16_QUANT" if root.HasField("fakequant_precision_mode") else "DEFAULT",
            defaults=defaults,
            types=types,
            layers=layers,
            skip_layers=(*root.skip_layers, *root.quant_skip_layers),
            skip_types=(*root.skip_layer_types, *root.quant_skip_types),
            amct_rules=True,
            without_settings=(*empty_types, *empty_layers),
        )


def _parse(text: str, source: str) -> Message:
    try:
        # Merge and not Parse: as in AMCT, a later value replaces an earlier one, also of a oneof.
        return text_format.Merge(text, SIMPLE_SCHEMA.message_class("AMCTRetrainConfig")())
    except text_format.ParseError as error:
        line = f"line {error.GetLine()}: " if error.GetLine() is not None else ""
        raise ParseError(f"{source}: {line}not a simple configuration: {_problem(str(error))}") from error
    except UnicodeError as error:
        raise ParseError(f"{source}: not a simple configuration: {error}.") from error


def _problem(found: str) -> str:
    """Say what protobuf found, and what would have been right in its place."""
    field, word = _UNKNOWN_FIELD.search(found), _UNKNOWN_WORD.search(found)
    if field:
        allowed = [line.name for line in SIMPLE_SCHEMA.messages[field[1]]]
        if field[2] in _CHOICES_ONLY:
            hint = f" Only choices as YAML or as a dict have '{field[2]}'; delete it, or give such choices."
        else:
            hint = closest(field[2], allowed)
        return f"{field[1]} has no field '{field[2]}'; its fields are {', '.join(allowed)}.{hint}"
    if word:
        allowed = list(SIMPLE_SCHEMA.enums[word[1]])
        return f"'{word[2]}' must be {' or '.join(allowed)}; leave the field out to get its default."
    # protobuf begins its own message with "line:column : " and goes on with the whole line of the file.
    problem = found.partition(" : ")[2] or found
    return problem if len(problem) <= _SHOWN else f"{problem[: _SHOWN // 2]} ... {problem[-_SHOWN // 2 :]}"


def _refuse_pruning(message: Message, where: str) -> None:
    for descriptor, value in message.ListFields():
        empty = isinstance(value, Message) and not value.ListFields()  # AMCT's own samples have `prune_config {}`
        if descriptor.name in _PRUNING and not empty:
            raise ValueError(
                f"{where}: '{descriptor.name}' is not expected: this package quantizes and does not prune; delete it."
            )


def _overrides(messages: Iterable[Any], name_field: str, where: str) -> tuple[dict[str, LayerConfig], tuple[str, ...]]:
    """Return the settings by name, and the names of the blocks without any."""
    entries = list(messages)
    names = Counter(getattr(entry, name_field) for entry in entries)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise ValueError(f"{where}: repeated for {repeated}. Please delete all but one of each.")
    for entry in entries:
        if name_field == "layer_name":
            _refuse_pruning(entry, f"{where} for '{entry.layer_name}'")
        elif entry.prune_config.ListFields():  # AMCT passes over it there
            warnings.warn(
                f"{where} for '{entry.layer_type}': prune_config has no effect; this package quantizes and does not "
                "prune. Delete it.",
                stacklevel=2,
            )
    empty = tuple(getattr(entry, name_field) for entry in entries if not _has_settings(entry))
    for name in empty:
        warnings.warn(
            f"{where} for '{name}' holds no settings: as in AMCT, what it names is quantized with the defaults, also "
            "where it is to be skipped. Write the settings, or delete the block.",
            stacklevel=2,
        )
    settings = {
        getattr(entry, name_field): _layer(entry, f"{where} for '{getattr(entry, name_field)}'") for entry in entries
    }
    return settings, empty


def _has_settings(message: Any) -> bool:
    return any(message.HasField(f"retrain_{part}_quant_config") for part in ("data", "weight"))


def _layer(message: Any, where: str) -> LayerConfig:
    data = _given(message.retrain_data_quant_config.ulq_quantize)
    if "clip_max_min" in data:
        clips = _given(data.pop("clip_max_min"))
        if len(clips) < 2:
            raise ValueError(
                f"{where}: retrain_data_quant_config.ulq_quantize.clip_max_min: clip_max and clip_min are both "
                f"required, found {' and '.join(clips) or 'none'}. Delete clip_max_min to have both calibrated."
            )
        data |= clips
    algo = message.retrain_weight_quant_config.WhichOneof("algo") or "arq_retrain"
    weight = {"algo": algo} | _given(getattr(message.retrain_weight_quant_config, algo))
    sections = ("retrain_data_quant_config.ulq_quantize", f"retrain_weight_quant_config.{algo}")
    return make_layer(data, weight, sections, f"{where}: key '")


def _given(message: Message) -> dict[str, Any]:
    """Give the fields that are set; the others have the defaults of ``DataConfig`` and ``WeightConfig``."""
    fields = {descriptor.name: value for descriptor, value in message.ListFields()}
    return fields | ({"dst_type": _TYPE_NAMES[fields["dst_type"]]} if "dst_type" in fields else {})
