"""One way in for every form of a configuration: dicts and files, told apart by what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amct_lightning.config.checks import found
from amct_lightning.config.choices import QuantChoices
from amct_lightning.config.friendly import parse_choices, read_yaml_config
from amct_lightning.config.json_format import REMEDY, read_json
from amct_lightning.config.simple_format import read_simple_config
from amct_lightning.config.text_file import read_text


def read_config(config: object) -> QuantChoices | Mapping[str, Any]:
    """Read what is no ``RetrainConfig`` yet.

    Args:
        config: A :class:`QuantChoices`, which is returned; the content of a JSON file as a dict (it has the key
            ``version``) or choices as a dict; or the path of a file. A ``.json`` file is JSON, ``.cfg`` AMCT's simple
            configuration, ``.yaml`` or ``.yml`` choices; any other is JSON if it begins with ``{`` and a simple
            configuration if not. ``None`` chooses AMCT's defaults for every layer.

    Returns:
        The choices, or the plain content of a JSON file, not yet checked.
    """
    if config is None:
        return QuantChoices()
    if isinstance(config, QuantChoices):
        return config
    if isinstance(config, Mapping):
        return config if "version" in config else parse_choices(config)
    if isinstance(config, (str, Path)):
        return _read_file(Path(config))
    raise TypeError(
        "A configuration must be a RetrainConfig, QuantChoices, a dict, the path of a .json, .cfg or .yaml file, or "
        f"None, found {found(config)}."
    )


def config_source(config: object) -> str:
    """Say what a configuration is called in messages.

    Example:
        >>> config_source("qat/config.json")
        'qat/config.json'
    """
    return str(config) if isinstance(config, (str, Path)) else "config"


def _read_file(path: Path) -> QuantChoices | Any:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return read_yaml_config(path)
    if suffix == ".json" or (suffix != ".cfg" and read_text(path, REMEDY).lstrip().startswith("{")):
        return read_json(path)
    return read_simple_config(path)
