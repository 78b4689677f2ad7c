"""WHAT is quantized: the settings of every layer, their rules, and their files."""

from amct_lightning.config.layer import DataConfig, LayerConfig, WeightConfig
from amct_lightning.config.retrain import RetrainConfig

__all__ = ["DataConfig", "LayerConfig", "RetrainConfig", "WeightConfig"]
