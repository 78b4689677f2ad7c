"""What ``amct-lightning config`` does: the model is made, observed, and its configuration written as a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from jsonargparse import Namespace
from torch import nn

from amct_lightning.commands.base import UserError
from amct_lightning.commands.choices_text import in_few_words, to_simple, to_yaml
from amct_lightning.commands.model_input import find_part, make_input, make_model
from amct_lightning.config import QuantChoices, RetrainConfig, config_source, load_config
from amct_lightning.config.layer import FixedMin, with_fixed_min
from amct_lightning.conversion.convert import convert_layers
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.on_target import TargetRules
from amct_lightning.conversion.plan import QuantPlan
from amct_lightning.conversion.report import conversion_report
from amct_lightning.graph.forward import Forward
from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.targets import find_target
from amct_lightning.wording import cut_off


def make_config(options: Namespace) -> tuple[str, str | None]:
    """Make a configuration as the options of the command say.

    Args:
        options: The options.

    Returns:
        The text of the configuration, and the table that explains it if there is to be one.
    """
    part, plan = _plan(options)
    text = _text(part, plan, options)
    return text, _explanation(part, plan) if options.explain else None


def _plan(options: Namespace) -> tuple[nn.Module, QuantPlan]:
    choices = load_config(options.choices)
    if isinstance(choices, QuantChoices) and options.format != "yaml":
        choices = choices.with_amct_rules_where_open()
    model = make_model(options.model, options.init_arg or [], options.ckpt)
    part = find_part(model, options.submodule)
    # The shapes are for the part; the example input of the model is for all of it, and the part runs inside.
    run = part if options.input_shape else model
    input_data = make_input(options.input_shape or [], model)
    source = config_source(options.choices) if options.choices else "config"
    target = TargetRules.of(options.target, options.on_unsupported, "config")
    return part, make_plan(part, choices, Forward(run, input_data), source, target=target)


def _text(part: nn.Module, plan: QuantPlan, options: Namespace) -> str:
    layers = {name: part.get_submodule(name) for name in plan.config}
    if options.format != "yaml" and not (options.target and find_target(options.target).serves):
        _check_amct_can_say(plan, layers, options.format)
    config = _for_choices(plan) if options.format == "yaml" else _for_amct(plan, part)
    if options.format == "json":
        return config.to_text()
    choices = in_few_words(config, layers)
    listed = "\n".join(f"#   {name}  {type(layer).__name__}" for name, layer in layers.items())
    head = f"# What is quantized in {type(part).__name__}. Its layers that can be:\n{listed}\n"
    return head + (to_yaml(choices) if options.format == "yaml" else to_simple(choices))


def _for_choices(plan: QuantPlan) -> RetrainConfig:
    """Name AMCT's rule for ``fixed_min``, if that which choices have by default comes to something else here."""
    matters = any(plan.wastes_integers(layer) for layer in plan.layers)
    words: dict[FixedMin, FixedMin] = {"propagate": None, None: "after_relu" if matters else None}
    return _reworded(plan.config, lambda name, given: words.get(given, given))


def _for_amct(plan: QuantPlan, part: nn.Module) -> RetrainConfig:
    """Say true where the data flow shows that an input is never negative, for which AMCT's formats have no word."""
    found = {layer.name: layer for layer in plan.layers}

    def outcome(name: str, given: FixedMin) -> FixedMin:
        if given != "propagate" or name not in found:
            return given if isinstance(given, bool) else None
        # There is one setting for the input and the hidden state of a recurrent layer.
        holds_for_all = not isinstance(part.get_submodule(name), nn.RNNBase) or found[name].fixed_min_hidden
        return True if found[name].fixed_min and holds_for_all else None

    return _reworded(plan.config, outcome)


def _reworded(config: RetrainConfig, word: Callable[[str, FixedMin], FixedMin]) -> RetrainConfig:
    given = {name: layer.retrain_data_config.fixed_min for name, layer in config.items()}
    return replace(config, layers={name: with_fixed_min(config[name], word(name, given[name])) for name in config})


def _check_amct_can_say(plan: QuantPlan, layers: Mapping[str, nn.Module], form: str) -> None:
    linear = [
        repr(name)
        for name, layer in layers.items()
        if plan.config[name].retrain_weight_config.channel_wise and not LAYER_TYPES[type(layer)].channel_wise
    ]
    if linear:
        raise UserError(
            f"--format {form}: AMCT's formats have no weight scale per output channel (channel_wise) for a Linear: "
            f"{cut_off(linear)}. Give --format yaml, or choices with channel_wise: false for Linear."
        )
    beyond = [repr(n) for n, c in plan.config.items() if c.retrain_data_config.in_amct != c.retrain_data_config]
    if beyond:
        raise UserError(
            f"--format {form}: AMCT's formats have no activations that are symmetric, per token or in float: "
            f"{cut_off(beyond)}. Give --format yaml, or choices with symmetric: false and algo: ulq_quantize there."
        )


def _explanation(part: nn.Module, plan: QuantPlan) -> str:
    """Convert the model, which nobody needs after this, and return the table."""
    convert_layers(part, plan)
    return str(conversion_report(part))
