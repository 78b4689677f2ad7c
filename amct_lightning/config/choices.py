"""What a user chooses when not every layer is spelled out: the common content of ``.cfg``, YAML and dict.

The readers are ``simple_format.py`` and ``friendly.py``. Which settings each layer of a model gets is worked out here;
defaults of layer types and what a type forbids come after that, in ``fit.py``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from amct_lightning.config.checks import RuleError, check_flag, check_run, found_in, wrong_type
from amct_lightning.config.fit import without_int4
from amct_lightning.config.layer import LayerConfig, with_fixed_min
from amct_lightning.config.retrain import RetrainConfig
from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.wording import abbreviated, closest


@dataclass(frozen=True)
class QuantChoices:
    """Settings for all layers, exceptions by layer type and by layer name, and what to leave out.

    The settings of a layer are the first of these: its entry in ``layers``, the entry of its type in ``types``,
    ``defaults``; an entry replaces ``defaults`` completely. Whether a layer is quantized: names beat types, and
    skipping beats settings. So ``skip_layers`` always skips, and ``skip_types`` skips what has no entry in ``layers``.

    Args:
        batch_num: The number of training batches that calibrate the clip values, at least 1.
        fakequant_precision_mode: ``"DEFAULT"`` or ``"FORCE_FP16_QUANT"``.
        defaults: The settings of every layer that has no others. Under AMCT's rules ``channel_wise=True`` applies to
            the layers that can be channel-wise there, all but Linear.
        types: The settings of the layers of a class, by its name, for example ``"Conv2d"``.
        layers: The settings of the layers whose name matches a pattern such as ``"blocks.*.fc1"``, in which ``*``
            stands for anything, also with dots. If several patterns match a layer, the last one counts.
        skip_layers: Patterns of the names of layers that are not quantized.
        skip_types: Class names of layers that are not quantized.
        amct_rules: Whether the choices mean what they do in AMCT's ``.cfg`` files: names are no patterns, an entry in
            ``layers`` or ``types`` quantizes its layers whatever is to be skipped, and no Linear is ``channel_wise``.
        without_settings: The entries of ``layers`` and ``types`` that a ``.cfg`` file names without settings. AMCT
            takes the defaults for them, and does not ask whether the model has such a layer.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.

    Example:
        >>> from torch import nn
        >>> choices = QuantChoices(batch_num=2, skip_layers=("head*",))
        >>> config = choices.resolve({"body": nn.Linear(4, 4), "head.0": nn.Linear(4, 2)})
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
    without_settings: tuple[str, ...] = ()

    @found_in("QuantChoices.", "")
    def __post_init__(self) -> None:
        check_run("batch_num", self.batch_num)
        check_run("fakequant_precision_mode", self.fakequant_precision_mode)
        check_flag("amct_rules", self.amct_rules)
        _check_settings("defaults", self.defaults)
        for key in ("types", "layers"):
            settings = getattr(self, key)
            if not isinstance(settings, Mapping):
                raise wrong_type(key, "a mapping from names to settings", settings)
            for name, layer in settings.items():
                if not isinstance(name, str):
                    raise wrong_type(key, "a mapping from names to settings whose names are text (in quotes)", name)
                _check_settings(f"{key}[{name!r}]", layer)
            # A later change to what was given must not get past the checks.
            object.__setattr__(self, key, dict(settings))
        for key in ("skip_layers", "skip_types", "without_settings"):
            names = getattr(self, key)
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                raise wrong_type(key, "a tuple of names", names)

    @property
    def propagates(self) -> bool:
        """Whether ``fixed_min`` is ``"propagate"`` where it is not given, and not AMCT's rule."""
        return not self.amct_rules

    def with_amct_rules_where_open(self) -> QuantChoices:
        """Return choices with AMCT's rule wherever ``fixed_min`` is not given, for files of AMCT's formats.

        Example:
            >>> QuantChoices().with_amct_rules_where_open().defaults.retrain_data_config.fixed_min
            'after_relu'
        """

        def closed(layer: LayerConfig) -> LayerConfig:
            is_open = layer.retrain_data_config.fixed_min is None
            return with_fixed_min(layer, "after_relu") if is_open else layer

        types = {name: closed(layer) for name, layer in self.types.items()}
        layers = {name: closed(layer) for name, layer in self.layers.items()}
        return replace(self, defaults=closed(self.defaults), types=types, layers=layers)

    def resolve(
        self, eligible: Mapping[str, nn.Module], source: str = "config", linear_by_channel: bool = False
    ) -> RetrainConfig:
        """Work out the settings of every layer of a model.

        Args:
            eligible: The layers of the model that can be quantized, by name.
            source: What these choices are called in messages, for example the file name.
            linear_by_channel: Whether they are for servers, see ``RetrainConfig.resolve``.

        Returns:
            A configuration that lists exactly the eligible layers, in their order.

        Raises:
            ValueError: If a name or type fits no layer, an entry makes a Linear ``channel_wise`` under AMCT's rules, or
                no layer is left to be quantized.
        """
        _check_types(self, eligible, source)
        _warn_repeated(self.skip_layers, source)
        skipped = _matches(self, self.skip_layers, eligible, f"{source}: cannot skip")
        by_name = _matches(self, self.layers, eligible, f"{source}: settings are given for")
        defaults = _for_any_type(self.defaults) if self.amct_rules and not linear_by_channel else self.defaults
        layers = {}
        for name, module in eligible.items():
            kind = type(module).__name__
            settings = self.layers[by_name[name]] if name in by_name else self.types.get(kind, defaults)
            is_skipped = name in skipped or (kind in self.skip_types and name not in by_name)
            if self.amct_rules and settings is not defaults:
                is_skipped = False  # there, an entry quantizes its layers whatever the skip lists say
            layers[name] = _left_out(settings, module) if is_skipped else settings
        _check_enabled(layers, source)
        anyway = [name for name in skipped if layers[name].retrain_enable and name not in by_name]
        _warn_quantized_anyway(anyway, source)
        config = RetrainConfig(
            batch_num=self.batch_num,
            fakequant_precision_mode=self.fakequant_precision_mode,
            layers=layers,
            amct_rules=self.amct_rules,
        )
        return config.resolve(eligible, source, linear_by_channel)


def _check_settings(key: str, layer: object) -> None:
    if not isinstance(layer, LayerConfig):
        raise wrong_type(key, "a LayerConfig", layer)
    if not layer.retrain_enable:
        raise RuleError(
            ValueError, key, "has retrain_enable=False; name in skip_layers or skip_types what to leave out"
        )


def _left_out(settings: LayerConfig, module: nn.Module) -> LayerConfig:
    """Give the settings that a skipped layer shows: those that it would get in AMCT's files if it were not skipped."""
    kind, weight = LAYER_TYPES[type(module)], settings.retrain_weight_config
    if (weight.channel_wise or weight.group_size) and not kind.channel_wise:
        settings = replace(settings, retrain_weight_config=replace(weight, channel_wise=None, group_size=None))
    settings = replace(settings, retrain_data_config=settings.retrain_data_config.in_amct)
    return replace(without_int4(settings) if kind.int4_obstacle(module) else settings, retrain_enable=False)


def _matches(
    choices: QuantChoices, patterns: Iterable[str], eligible: Mapping[str, nn.Module], problem: str
) -> dict[str, str]:
    """Give the layers that fit a pattern, and the last pattern that each fits."""
    found: dict[str, str] = {}
    for pattern in patterns:
        exact = choices.amct_rules
        fits = [] if exact else [name for name in eligible if fnmatchcase(name, pattern)]
        names = [pattern] if pattern in eligible else fits  # a name may hold brackets, and is no pattern then
        if not names and pattern in choices.without_settings:
            continue
        if not names:
            reason = "the model has no such layer, or it cannot be quantized"
            raise ValueError(
                f"{problem} layer '{pattern}', but {reason if exact else 'it fits no layer that can be quantized'}."
                f"{closest(pattern, eligible)} Layers that can be quantized: {abbreviated(list(eligible)) or 'none'}."
            )
        found |= dict.fromkeys(names, pattern)
    return found


def _check_types(choices: QuantChoices, eligible: Mapping[str, nn.Module], source: str) -> None:
    _warn_repeated(choices.skip_types, source)
    present = [type(module).__name__ for module in eligible.values()]
    known = [kind.__name__ for kind, entry in LAYER_TYPES.items() if entry.by_default or not choices.amct_rules]
    allowed = list(dict.fromkeys([*known, *present]))
    for problem, names in (("cannot skip", choices.skip_types), ("settings are given for", choices.types)):
        for name in names:
            if name not in allowed and name not in choices.without_settings:
                raise ValueError(
                    f"{source}: {problem} layer type '{name}', but layers of this type cannot be quantized."
                    f"{closest(name, allowed)} Types that can be quantized: {', '.join(allowed)}."
                )


def _for_any_type(defaults: LayerConfig) -> LayerConfig:
    """Leave ``channel_wise=True`` open: the default of a layer type is true wherever it can be."""
    weight = defaults.retrain_weight_config
    if not weight.channel_wise:
        return defaults
    return replace(defaults, retrain_weight_config=replace(weight, channel_wise=None))


def _check_enabled(layers: Mapping[str, LayerConfig], source: str) -> None:
    if not any(layer.retrain_enable for layer in layers.values()):
        raise ValueError(
            f"{source}: No layer retrain enabled: every layer that can be quantized ({abbreviated(list(layers))}) is "
            "to be skipped. Skip fewer layers or types, or give settings for a layer to have it quantized anyway."
        )


def _warn_repeated(names: Iterable[str], source: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        warnings.warn(f"{source}: named more than once to be skipped: {abbreviated(repeated)}.", stacklevel=2)


def _warn_quantized_anyway(names: list[str], source: str) -> None:
    """Settings for a type beat the skipping of a name, as in AMCT; who writes both rarely expects that."""
    if names:
        warnings.warn(
            f"{source}: {abbreviated(names)} is to be skipped but is quantized, because settings are given for its "
            "type. To skip it, give these settings by layer name and not by type.",
            stacklevel=2,
        )
