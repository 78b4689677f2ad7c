"""What a user chooses when not every layer is spelled out: the common content of ``.cfg``, YAML and dict.

The readers are ``simple_format.py`` and ``friendly.py``; what the choices mean for a model is in ``resolve.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from amct_lightning.config.checks import Fault, raise_first, run_faults, type_fault
from amct_lightning.config.layer import LayerConfig


@dataclass(frozen=True)
class QuantChoices:
    """Settings for all layers, exceptions by layer type and by layer name, and what to leave out.

    The settings of a layer are the first of these: its entry in ``layers``, the entry of its type in ``types``,
    ``defaults``; an entry replaces ``defaults`` completely. Whether a layer is quantized: names beat types, and
    skipping beats settings. So ``skip_layers`` always skips, and ``skip_types`` skips what has no entry in ``layers``.

    Args:
        batch_num: The number of training batches that calibrate the clip values, at least 1.
        fakequant_precision_mode: ``"DEFAULT"`` or ``"FORCE_FP16_QUANT"``.
        defaults: The settings of every layer that has no others. ``channel_wise=True`` applies to the layers that
            can be channel-wise.
        types: The settings of the layers of a class, by its name, for example ``"Conv2d"``.
        layers: The settings of the layers whose name matches a pattern such as ``"blocks.*.fc1"``, in which ``*``
            stands for anything, also with dots. If several patterns match a layer, the last one counts.
        skip_layers: Patterns of the names of layers that are not quantized.
        skip_types: Class names of layers that are not quantized.
        amct_rules: Whether the choices mean what they do in AMCT's ``.cfg`` files: names are no patterns, and an
            entry in ``layers`` or ``types`` quantizes its layers whatever is to be skipped.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.

    Example:
        >>> from torch import nn
        >>> from amct_lightning.config import resolve_config
        >>> choices = QuantChoices(batch_num=2, skip_layers=("head*",))
        >>> config = resolve_config(choices, {"body": nn.Linear(4, 4), "head.0": nn.Linear(4, 2)})
        >>> [(name, layer.retrain_enable) for name, layer in config.items()]
        [('body', True), ('head.0', False)]
    """

    batch_num: int = 1
    fakequant_precision_mode: str = "DEFAULT"
    defaults: LayerConfig = field(default_factory=LayerConfig)
    types: Mapping[str, LayerConfig] = field(default_factory=dict)
    layers: Mapping[str, LayerConfig] = field(default_factory=dict)
    skip_layers: tuple[str, ...] = ()
    skip_types: tuple[str, ...] = ()
    amct_rules: bool = False

    def __post_init__(self) -> None:
        raise_first(self._faults(), lambda key: f"QuantChoices.{key}")
        for key in ("types", "layers"):  # a later change to what was given must not get past the checks
            object.__setattr__(self, key, dict(getattr(self, key)))

    def _faults(self) -> Iterator[Fault]:
        yield from run_faults(vars(self))
        if not isinstance(self.amct_rules, bool):
            yield type_fault("amct_rules", "true or false", self.amct_rules)
        yield from _settings_faults("defaults", self.defaults)
        for key in ("types", "layers"):
            yield from _mapping_faults(key, getattr(self, key))
        for key in ("skip_layers", "skip_types"):
            names = getattr(self, key)
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                yield type_fault(key, "a tuple of names", names)


def _mapping_faults(key: str, settings: object) -> Iterator[Fault]:
    if not isinstance(settings, Mapping):
        yield type_fault(key, "a mapping from names to LayerConfig", settings)
        return
    for name, layer in settings.items():
        if not isinstance(name, str):
            yield type_fault(key, "a mapping from names to LayerConfig, each name a string", name)
        yield from _settings_faults(f"{key}[{name!r}]", layer)


def _settings_faults(key: str, layer: object) -> Iterator[Fault]:
    if not isinstance(layer, LayerConfig):
        yield type_fault(key, "a LayerConfig", layer)
    elif not layer.retrain_enable:
        yield Fault(ValueError, key, "has retrain_enable=False; name in skip_layers or skip_types what to leave out")
