"""The forms of a configuration, told apart by what they are, and how each is read."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from amct_lightning.config.choices import QuantChoices
from amct_lightning.config.fit import SimpleFile, load_config
from amct_lightning.config.friendly import parse_choices, read_yaml_config
from amct_lightning.config.json_format import REMEDY
from amct_lightning.config.layer import DataConfig, LayerConfig, WeightConfig
from amct_lightning.config.retrain import RetrainConfig
from amct_lightning.config.simple_format import read_simple_config
from amct_lightning.config.text_file import read_text
from amct_lightning.wording import closest

ConfigLike: TypeAlias = RetrainConfig | QuantChoices | Mapping[str, Any] | str | Path | None
"""What a user may give as a configuration."""


PRESETS = {
    name: QuantChoices(
        defaults=LayerConfig(
            retrain_data_config=DataConfig(dst_type=data), retrain_weight_config=WeightConfig(dst_type=weight)
        )
    )
    for name, data, weight in (
        ("INT8", "INT8", "INT8"),
        ("A8W8", "INT8", "INT8"),
        ("A16W8", "INT16", "INT8"),
        ("A8W4", "INT8", "INT4"),
        ("A4W4", "INT4", "INT4"),
    )
}
"""Names for the pairs of activation and weight types that the hardware runs, for every layer that can be quantized."""


@load_config.register(RetrainConfig)
@load_config.register(QuantChoices)
def _take(config: RetrainConfig | QuantChoices) -> RetrainConfig | QuantChoices:
    return config


@load_config.register(type(None))
def _choose_defaults(_: None) -> QuantChoices:
    return QuantChoices()


@load_config.register(Mapping)
def _parse(config: Mapping[str, Any]) -> RetrainConfig | QuantChoices:
    return RetrainConfig.from_dict(config) if "version" in config else parse_choices(config)


@load_config.register(SimpleFile)
def _read_simple(config: SimpleFile) -> QuantChoices:
    return read_simple_config(config.path)


@load_config.register(str)
def _read_named(config: str) -> RetrainConfig | QuantChoices:
    preset = PRESETS.get(config.upper())
    if preset is not None:
        return preset
    path = Path(config)
    if not path.suffix and not path.exists():
        names = ", ".join(PRESETS)
        problem = f"Neither a preset ({names}) nor a config file.{closest(config.upper(), PRESETS, 1)} Found"
        raise FileNotFoundError(errno.ENOENT, problem, config)
    return _read(path)


@load_config.register(Path)
def _read(path: Path) -> RetrainConfig | QuantChoices:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return read_yaml_config(path)
    if suffix == ".json" or (suffix != ".cfg" and read_text(path, REMEDY).lstrip().startswith("{")):
        return RetrainConfig.from_json(path)
    return read_simple_config(path)
