"""From a configuration of any form to the settings of every layer of a model.

Which layers exist, their defaults, what their type forbids. How the forms are read is in ``load.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from amct_lightning.config.checks import LEARNED_CLIPS, found
from amct_lightning.config.layer import LayerConfig, with_fixed_min
from amct_lightning.graph.eligibility import Candidate, computed_weights, find_candidates, listed_layers
from amct_lightning.graph.forward import InputData
from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.wording import abbreviated, closest, cut_off

NOTHING_ENABLED = (
    'No layer retrain enabled. Set "retrain_enable":true, spelled out, in at least one layer to be quantized.'
)


class SimpleFile(NamedTuple):
    """A file to be read as a simple configuration (``.cfg``), whatever its suffix."""

    path: str | Path

    def __str__(self) -> str:
        return str(self.path)


@singledispatch
def load_config(config: object) -> Any:
    """Read a configuration of any form; ``load.py`` registers here how each is read.

    Args:
        config: A :class:`RetrainConfig` or :class:`QuantChoices`, which is returned; the content of a JSON file as
            a mapping (it has the key ``version``) or choices as a mapping; the name of a preset as text, in capitals
            or small letters; or the path of a file. A ``.json`` file is JSON, ``.cfg`` AMCT's simple configuration,
            ``.yaml`` or ``.yml`` choices; any other is JSON if it begins with ``{`` and a simple configuration if
            not. A file that is called like a preset is meant by a ``Path`` or by ``./INT8``. ``None`` chooses the
            defaults for every layer.

    Returns:
        A :class:`RetrainConfig` or :class:`QuantChoices`, whose ``resolve(eligible, source)`` gives the settings of
        every layer of a model.

    Raises:
        OSError: If a file is missing (``FileNotFoundError``) or cannot be read.
        TypeError: If ``config`` is none of these, or a value in it has the wrong type.
        ValueError: If the content cannot be parsed or breaks a rule; the message names file, layer and key.

    Example:
        >>> load_config({"skip_layers": ["head"]}).skip_layers
        ('head',)
        >>> load_config("a4w4").defaults.retrain_weight_config.dst_type
        'INT4'
    """
    raise TypeError(
        'A configuration must be a RetrainConfig, QuantChoices, a dict, a preset such as "INT8", the path of a .json, '
        f".cfg or .yaml file, or None, found {found(config)}."
    )


def config_source(config: object) -> str:
    """Say what a configuration is called in messages.

    Example:
        >>> config_source("qat/config.json")
        'qat/config.json'
    """
    return str(config) if isinstance(config, (str, Path, SimpleFile)) else "config"


def fit_to_model(
    config: Any, model: nn.Module, input_data: InputData, source: str, linear_by_channel: bool = False
) -> Any:
    """Give the settings that a configuration of any form means for the layers of a model, and refuse one without any.

    Args:
        config: A :class:`RetrainConfig` or :class:`QuantChoices`.
        model: The float model.
        input_data: Input for which the model works.
        source: What the configuration is called in messages.
        linear_by_channel: Whether it is for servers, see ``RetrainConfig.resolve``.
    """
    candidates, _ = find_candidates(model, input_data)
    eligible = listed_layers(candidates)
    if not eligible:
        raise ValueError(
            f"No supported layers in {type(model).__name__}. It needs a Conv1d/2d/3d, ConvTranspose1d/2d, Linear, "
            "LSTM or GRU that runs exactly once on input_data and shares its weight with no other layer; check that "
            "input_data reaches such a layer."
        )
    resolved = without_computed_weights(config, model, source).resolve(eligible, source, linear_by_channel)
    layers = {name: _in_amct_words(name, layer, candidates[name], source) for name, layer in resolved.items()}
    return replace(resolved, layers=layers)


def _in_amct_words(name: str, layer: LayerConfig, candidate: Candidate, source: str) -> LayerConfig:
    """Say with true what ``fixed_min: propagate`` means for a layer, and leave out what AMCT's own rule says."""
    propagates = layer.retrain_data_config.fixed_min == "propagate"
    if propagates and candidate.input_never_negative and not candidate.input_after_relu:
        if isinstance(candidate.layer, nn.RNNBase) and not candidate.hidden_after_relu:
            warnings.warn(
                f"{source}: the input of layer '{name}' is never negative, but AMCT's format has one fixed_min for "
                "input and hidden state, so the layer is left to AMCT's rule, and its range has integers for values "
                "below 0. To silence this, give it fixed_min: null.",
                stacklevel=4,
            )
            return with_fixed_min(layer, None)
        return with_fixed_min(layer, True)
    return layer if isinstance(layer.retrain_data_config.fixed_min, bool) else with_fixed_min(layer, None)


def without_computed_weights(config: Any, model: nn.Module, source: str, keep: Collection[str] = ()) -> Any:
    """Take the layers out of a configuration whose weight is computed before each call, such as by weight norm.

    A configuration that AMCT wrote lists them. They stay in float, which a warning says of those to be quantized.

    Args:
        config: A :class:`RetrainConfig` or :class:`QuantChoices`.
        model: The float model.
        source: What the configuration is called in messages.
        keep: The layers that are known already, computed or not.

    Returns:
        The configuration without these layers.
    """
    computed = {name: reason for name, reason in computed_weights(model).items() if name not in keep}
    wanted = [name for name in computed if name in config.layers and config.layers[name].retrain_enable]
    if wanted:
        warnings.warn(
            f"{source}: {abbreviated(wanted)} stays in float: {computed[wanted[0]]}. To silence this, set "
            "retrain_enable to false there.",
            stacklevel=3,
        )
    left: dict[str, Any] = {"layers": {name: layer for name, layer in config.layers.items() if name not in computed}}
    if hasattr(config, "skip_layers"):
        left["skip_layers"] = tuple(name for name in config.skip_layers if name not in computed)
    return replace(config, **left)


def resolve_layers(
    layers: Mapping[str, LayerConfig],
    eligible: Mapping[str, nn.Module],
    source: str,
    amct_rules: bool,
    linear_by_channel: bool = False,
) -> dict[str, LayerConfig]:
    """Do the work of ``RetrainConfig.resolve`` for its layers."""
    unknown = [name for name in layers if name not in eligible]
    if unknown:
        raise ValueError(
            f"unsupported layer {abbreviated(unknown)} in {source}: the model has no such layer, or it "
            f"cannot be quantized.{closest(unknown[0], eligible)} "
            f"Layers that can be quantized: {abbreviated(list(eligible)) or 'none'}."
        )
    for name, layer in layers.items() if amct_rules else ():
        can_be = linear_by_channel or LAYER_TYPES[type(eligible[name])].channel_wise
        if layer.retrain_weight_config.channel_wise and not can_be:
            raise ValueError(
                f"{source}: layer '{name}', key 'retrain_weight_config.channel_wise' must be false: "
                f"a {type(eligible[name]).__name__} layer can not be channel-wise, but for target serving."
            )
        if layer.retrain_weight_config.group_size is not None:
            raise ValueError(
                f"{source}: layer '{name}', key 'retrain_weight_config.group_size': AMCT's files have no groups of "
                "weights. Leave it out, or give choices as YAML or as a dict."
            )
        if layer.retrain_weight_config.init is not None:
            raise ValueError(
                f"{source}: layer '{name}', key 'retrain_weight_config.init': AMCT's files have no choice of where "
                "weight scales start. Leave it out, or give choices as YAML or as a dict."
            )
    if not any(layer.retrain_enable for layer in layers.values()):
        raise ValueError(f"{source}: {NOTHING_ENABLED}")
    _check_algorithms(layers, eligible, source)
    _check_groups(layers, eligible, source)
    _check_starts(layers, eligible, source)
    written = settings_as_written(layers, eligible, linear_by_channel and not amct_rules)
    return _packable(written, eligible, source)


def settings_as_written(
    layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], linear_by_channel: bool = False
) -> dict[str, LayerConfig]:
    """Give every layer of a model its settings, INT4 weights that cannot be packed included.

    AMCT keeps them until it saves, and decides by them which layers share a quantizer.

    Args:
        layers: The settings of some layers; the others are disabled.
        eligible: The layers of the model that can be quantized, by name.
        linear_by_channel: Whether a Linear has a weight scale per output channel unless its settings say otherwise.

    Example:
        >>> written = settings_as_written({"0": LayerConfig()}, {"0": nn.Linear(3, 2), "1": nn.Linear(2, 2)})
        >>> written["0"].retrain_weight_config.channel_wise, written["1"].retrain_enable
        (False, False)
    """
    disabled = LayerConfig(retrain_enable=False)
    return {
        name: _with_channel_wise_default(layers.get(name, disabled), module, linear_by_channel)
        for name, module in eligible.items()
    }


def without_int4(layer: LayerConfig) -> LayerConfig:
    """Raise INT4 weights to INT8, and INT4 activations with them because they need INT4 weights.

    Example:
        >>> from amct_lightning.config.layer import WeightConfig
        >>> int4 = LayerConfig(retrain_weight_config=WeightConfig(dst_type="INT4"))
        >>> without_int4(int4).retrain_weight_config.dst_type
        'INT8'
    """
    data, weight = layer.retrain_data_config, layer.retrain_weight_config
    return replace(
        layer,
        retrain_data_config=replace(data, dst_type="INT8") if data.dst_type == "INT4" else data,
        retrain_weight_config=replace(weight, dst_type="INT8", group_size=None)
        if weight.dst_type == "INT4"
        else weight,
    )


def _with_channel_wise_default(layer: LayerConfig, module: nn.Module, linear_by_channel: bool) -> LayerConfig:
    weight, kind = layer.retrain_weight_config, LAYER_TYPES[type(module)]
    if weight.group_size is not None and not kind.has_groups:
        weight = replace(weight, group_size=None)
    channel_wise = weight.channel_wise
    if channel_wise is None:
        channel_wise = kind.channel_wise or linear_by_channel or weight.group_size is not None
    init = None if weight.init == "max_abs" else weight.init  # the same, however it was said
    return replace(layer, retrain_weight_config=replace(weight, channel_wise=channel_wise, init=init))


def _check_algorithms(layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> None:
    wrong: dict[str, list[str]] = {}
    for name, layer in layers.items():
        kind, algo = type(eligible[name]), layer.retrain_data_config.algo
        if layer.retrain_enable and algo not in LAYER_TYPES[kind].activations:
            wrong.setdefault(algo, []).append(f"'{name}' ({kind.__name__})")
    for algo, names in wrong.items():
        able = [kind.__name__ for kind, facts in LAYER_TYPES.items() if algo in facts.activations]
        raise ValueError(
            f"{source}: the algo of activations is '{algo}' for {cut_off(names)}, and only {', '.join(able)} can have "
            f"that. Give these layers '{LEARNED_CLIPS}', by name (layers) or by type (types), or skip them."
        )


def _check_starts(layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> None:
    wrong = [
        f"'{name}' ({type(eligible[name]).__name__})"
        for name, layer in layers.items()
        if layer.retrain_enable and layer.retrain_data_config.init == "output"
        if isinstance(eligible[name], nn.RNNBase)
    ]
    if wrong:
        raise ValueError(
            f"{source}: activations.init is 'output' for {cut_off(wrong)}, and the output of a recurrent layer depends "
            "on all its steps. Give such a layer init: mse or init: percentile, or skip it."
        )


def _check_groups(layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> None:
    wrong = []
    for name, layer in layers.items():
        size, module = layer.retrain_weight_config.group_size, eligible[name]
        if layer.retrain_enable and size and isinstance(module, nn.Linear) and module.in_features % size:
            wrong.append(f"'{name}' (in_features={module.in_features}, group_size={size})")
    if wrong:
        raise ValueError(
            f"{source}: {cut_off(wrong)}: the inputs of a Linear must be whole groups of weights. Give such a layer "
            "another group_size (32, 64 or 128) or none (null), or skip it."
        )


def _packable(layers: dict[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> dict[str, LayerConfig]:
    obstacles = {
        name: reason
        for name, layer in layers.items()
        if layer.retrain_enable
        and layer.retrain_weight_config.dst_type == "INT4"
        and (reason := LAYER_TYPES[type(eligible[name])].int4_obstacle(eligible[name]))
    }
    if obstacles:
        listed = ", ".join(f"'{name}' ({reason})" for name, reason in obstacles.items())
        warnings.warn(
            f"{source}: INT8 is used instead of INT4 for {listed}: INT4 weights are packed in pairs along "
            "the input-channel axis, which needs an even length and no groups. "
            "Set the dst_type of these layers to INT8 to silence this.",
            stacklevel=4,
        )
    return {name: without_int4(layer) if name in obstacles else layer for name, layer in layers.items()}
