"""One way in for every form of a configuration: objects, dicts and files, told apart by what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from amct_lightning.config.checks import found
from amct_lightning.config.choices import QuantChoices
from amct_lightning.config.friendly import parse_choices, read_yaml_config
from amct_lightning.config.json_format import REMEDY
from amct_lightning.config.retrain import RetrainConfig
from amct_lightning.config.simple_format import read_simple_config
from amct_lightning.config.text_file import read_text

if TYPE_CHECKING:
    from torch import nn

    from amct_lightning.graph.trace import InputData

ConfigLike: TypeAlias = RetrainConfig | QuantChoices | Mapping[str, Any] | str | Path | None
"""What a user may give as a configuration."""


def load_config(config: ConfigLike) -> RetrainConfig | QuantChoices:
    """Read a configuration of any form.

    Args:
        config: A :class:`RetrainConfig` or :class:`QuantChoices`, which is returned; the content of a JSON file as
            a dict (it has the key ``version``) or choices as a dict; or the path of a file. A ``.json`` file is
            JSON, ``.cfg`` AMCT's simple configuration, ``.yaml`` or ``.yml`` choices; any other is JSON if it
            begins with ``{`` and a simple configuration if not. ``None`` chooses AMCT's defaults for every layer.

    Returns:
        An object whose ``resolve(eligible, source)`` gives the settings of every layer of a model.

    Raises:
        OSError: If a file is missing (``FileNotFoundError``) or cannot be read.
        TypeError: If ``config`` is none of these, or a value in it has the wrong type.
        ValueError: If the content cannot be parsed or breaks a rule; the message names file, layer and key.

    Example:
        >>> load_config({"skip_layers": ["head"]}).skip_layers
        ('head',)
    """
    if config is None:
        return QuantChoices()
    if isinstance(config, (RetrainConfig, QuantChoices)):
        return config
    if isinstance(config, Mapping):
        return RetrainConfig.from_dict(config) if "version" in config else parse_choices(config)
    if isinstance(config, (str, Path)):
        return _read_file(Path(config))
    raise TypeError(
        "A configuration must be a RetrainConfig, QuantChoices, a dict, the path of a .json, .cfg or .yaml file, or "
        f"None, found {found(config)}."
    )


def config_source(config: ConfigLike) -> str:
    """Say what a configuration is called in messages.

    Example:
        >>> config_source("qat/config.json")
        'qat/config.json'
    """
    return str(config) if isinstance(config, (str, Path)) else "config"


def fit_to_model(
    config: RetrainConfig | QuantChoices, model: nn.Module, input_data: InputData, source: str
) -> RetrainConfig:
    """Work out the settings of every layer of a model that can be quantized.

    Args:
        config: What :func:`load_config` gives.
        model: The float model.
        input_data: Input for which the model works.
        source: What the configuration is called in messages.

    Returns:
        The settings of exactly the layers that can be quantized, in the order of ``model.named_modules()``.

    Raises:
        ValueError: If no layer can be quantized, or the configuration does not fit the model.
        RuntimeError: If the model is quantized already or fails on the input.
    """
    from amct_lightning.graph.eligibility import eligible_layers  # noqa: PLC0415  (graph imports config)

    eligible = eligible_layers(model, input_data)
    if not eligible:
        raise ValueError(
            f"No supported layers in {type(model).__name__}. It needs a Conv1d/2d/3d, ConvTranspose1d/2d, Linear, "
            "LSTM or GRU that runs exactly once on input_data and shares its weight with no other layer; check that "
            "input_data reaches such a layer."
        )
    return config.resolve(eligible, source)


def _read_file(path: Path) -> RetrainConfig | QuantChoices:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return read_yaml_config(path)
    if suffix == ".json" or (suffix != ".cfg" and read_text(path, REMEDY).lstrip().startswith("{")):
        return RetrainConfig.from_json(path)
    return read_simple_config(path)
