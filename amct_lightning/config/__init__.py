"""WHAT is quantized: the settings of every layer, their rules, and their files."""

from amct_lightning.config.choices import QuantChoices
from amct_lightning.config.fit import config_source, load_config
from amct_lightning.config.layer import DataConfig, LayerConfig, WeightConfig
from amct_lightning.config.load import ConfigLike
from amct_lightning.config.retrain import RetrainConfig

__all__ = [
    "ConfigLike",
    "DataConfig",
    "LayerConfig",
    "QuantChoices",
    "RetrainConfig",
    "WeightConfig",
    "config_source",
    "load_config",
]
