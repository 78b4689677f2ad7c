"""Making the plan: which layers of a float model are quantized and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace

import torch
from torch import nn

from amct_lightning.config import DataConfig, LayerConfig, QuantChoices, RetrainConfig
from amct_lightning.config.fit import settings_as_written, without_computed_weights
from amct_lightning.config.layer import FixedMin, with_fixed_min
from amct_lightning.conversion.on_target import TargetRules, fall_back
from amct_lightning.conversion.plan import LayerPlan, QuantPlan, RefusedLayer, disabled
from amct_lightning.graph.eligibility import NOT_TRAINED, Candidate, find_candidates
from amct_lightning.graph.forward import Forward, InputData
from amct_lightning.graph.trace import Call, Trace
from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.modules.folding import only_normalizes
from amct_lightning.wording import cut_off


def make_plan(
    model: nn.Module,
    config: RetrainConfig | QuantChoices | None,
    input_data: InputData | Forward,
    source: str = "config",
    allow_reuse: bool = False,
    search_n: bool = False,
    target: TargetRules | None = None,
    deploy_grid: bool = False,
) -> QuantPlan:
    """Decide which layers are quantized and how, from an observed forward and the user's choices.

    Args:
        model: The float model.
        config: The user's choices; ``None`` quantizes every eligible layer with AMCT's defaults and rules.
        input_data: Input for which the model works, or how it is run if there is more to say. Layers that it does not
            reach, such as the experts that it is not routed to, stay in float: the range of their inputs could only be
            guessed.
        source: Where the config comes from, for messages.
        allow_reuse: Whether layers that are called several times in one forward are quantized, with one set of
            factors for all calls.
        search_n: Whether the shifts of the int32 accumulators are searched.
        target: What the network is meant for, and what to do about layers that it does not run.
        deploy_grid: Whether the layers compute with what the device computes with.

    Returns:
        The plan.

    Raises:
        ValueError: If the config does not fit the model or the target or names a layer that cannot be quantized, or
            nothing is left to quantize.
        RuntimeError: If the model is not a plain float model or fails on the input.

    Example:
        >>> plan = make_plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), None, torch.ones(1, 2))
        >>> [(layer.name, layer.fixed_min) for layer in plan.layers]
        [('0', False), ('2', True)]
    """
    candidates, trace = find_candidates(model, input_data, allow_reuse)
    config = without_computed_weights(QuantChoices(amct_rules=True) if config is None else config, model, source)
    named = frozenset(config.layers)
    # A configuration is made from the model in evaluation, so it may rightly list what no training ever runs.
    untrained = frozenset(name for name, c in candidates.items() if c.reason == NOT_TRAINED)
    _refuse_named(named - untrained, candidates, model, source)
    refused = _refused_layers(candidates, named)
    eligible = {name: c.layer for name, c in candidates.items() if name not in refused or name in untrained}
    if not eligible.keys() - untrained:
        raise ValueError(_nothing_eligible(model, candidates))
    propagates = isinstance(config, QuantChoices) and config.propagates
    by_channel = target is not None and target.linear_by_channel
    resolved = disabled(untrained, _with_rules(config.resolve(eligible, source, by_channel), propagates))
    _check_grid(resolved, deploy_grid, by_channel, source)
    # Choices that are no complete configuration are written down as one first, in AMCT with INT4 already raised.
    written = resolved.layers
    if isinstance(config, RetrainConfig):
        as_written = settings_as_written(config.layers, eligible, by_channel and not config.amct_rules)
        written = _with_rules(replace(config, layers=as_written), False).layers
    if target is not None:
        avoided = target.check(resolved.layers, eligible, source)
        resolved = replace(resolved, layers=fall_back(resolved.layers, avoided))
        written = fall_back(written, avoided)
        refused |= {
            o.layer: RefusedLayer(o.layer, o.kind, f"target {target.target.name}: {o.fact.why}")
            for o in avoided
            if o.way == "float"
        }
    layers = _layer_plans(resolved, written, candidates, trace, dict(model.named_modules()))
    ends = (trace.calls[0].name, trace.calls[-1].name)
    aim, parts = None if target is None else target.target.name, _float_parts(trace, layers)
    planned = [eligible[layer.name] for layer in layers]
    serving = None if target is None else target.serving_dtype(planned, source)
    return QuantPlan(resolved, layers, search_n, tuple(refused.values()), ends, parts, aim, deploy_grid, serving)


def _with_rules(config: RetrainConfig, propagates: bool) -> RetrainConfig:
    """Return a configuration whose ``fixed_min`` is true, false, ``"propagate"`` or, for AMCT's rule, ``None``."""
    rules: dict[FixedMin, FixedMin] = {"after_relu": None, None: "propagate" if propagates else None}
    layers = {}
    for name, layer in config.items():
        given = layer.retrain_data_config.fixed_min
        layers[name] = with_fixed_min(layer, rules[given]) if given in rules else layer
    return replace(config, layers=layers)


def _check_grid(config: RetrainConfig, deploy_grid: bool, serving: bool, source: str) -> None:
    if deploy_grid and serving:
        raise ValueError(
            f"{source}: deploy_grid=True computes as a network that ATC compiled, and target serving as a server does. "
            "Use one of the two."
        )
    enabled = {name: layer for name, layer in config.items() if layer.retrain_enable}
    grouped = [repr(name) for name, layer in enabled.items() if layer.retrain_weight_config.group_size]
    if deploy_grid and grouped:
        raise ValueError(
            f"{source} gives weights in groups (group_size) to {cut_off(grouped)}, and with deploy_grid=True the sums "
            "of a layer are those of integers, which have one scale per output channel at most. Use one of the two."
        )
    ranges = [repr(name) for name, layer in enabled.items() if not layer.retrain_data_config.has_clips]
    if deploy_grid and ranges:
        raise ValueError(
            f"{source} gives the activations of {cut_off(ranges)} no range (algo: per_token or none), and with "
            "deploy_grid=True the sums of a layer are those of integers, which have one scale for all inputs. Use one "
            "of the two."
        )
    if (deploy_grid or serving) and config.fakequant_precision_mode == "FORCE_FP16_QUANT":
        raise ValueError(
            f"{source} has fakequant_precision_mode 'FORCE_FP16_QUANT', which rounds the activation scales only when "
            f"they are recorded, so {'target serving' if serving else 'deploy_grid=True'} could not train with what is "
            "deployed. Use one of the two."
        )


def _refuse_named(named: frozenset[str], candidates: Mapping[str, Candidate], model: nn.Module, source: str) -> None:
    """Refuse a config that names layers which exist but cannot be quantized, with the reasons."""
    reasons = {name: c.reason for name, c in candidates.items() if name in named and c.reason}
    first_names = {id(c.layer): c.name for c in candidates.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in named and first_names.get(id(module), name) != name:
            reasons[name] = f"it is another name of '{first_names[id(module)]}'; use that one"
    if reasons:
        listed = "; ".join(f"'{name}': {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"unsupported layer {{{', '.join(map(repr, reasons))}}} in {source}: {listed}. Change the model as said, "
            "or take the layer out of the config; it then stays in float."
        )


def _refused_layers(candidates: Mapping[str, Candidate], named: frozenset[str]) -> dict[str, RefusedLayer]:
    refused = {}
    for name, candidate in candidates.items():
        kind, reason = type(candidate.layer), candidate.reason
        if reason is None and name not in named and not LAYER_TYPES[kind].by_default:
            reason = f"AMCT does not know {kind.__name__}, so it is quantized only if the config names it"
        if reason is not None:
            refused[name] = RefusedLayer(name, supported_class(candidate.layer).__name__, reason)
    return refused


def _layer_plans(
    config: RetrainConfig,
    written: Mapping[str, LayerConfig],
    candidates: dict[str, Candidate],
    trace: Trace,
    modules: dict[str, nn.Module],
) -> tuple[LayerPlan, ...]:
    enabled = {name: c for name, c in candidates.items() if name in config and config[name].retrain_enable}
    data = {name: config[name].retrain_data_config for name in enabled}
    in_amct = _owners({name: c for name, c in enabled.items() if data[name].has_clips}, written)
    # A quantizer has one number of bits, so raising INT4 in some of its layers divides it.
    owners = _owners(enabled, {name: (in_amct.get(name, name), data[name]) for name in enabled})
    in_amct = owners | in_amct  # without clips there is nothing to share, and AMCT knows no such layer
    fixed_min = _for_all(owners, {name: _fixed_min(data[name], c) for name, c in enabled.items()})
    never_negative = _for_all(owners, {name: c.input_never_negative for name, c in enabled.items()})
    first = _first_readers([*(trace.in_training or []), *trace.calls], owners)
    planned: dict[str, LayerPlan] = {}
    for call in trace.calls:
        if call.name not in enabled or call.name in planned:
            continue
        candidate, owner = enabled[call.name], owners[call.name]
        planned[call.name] = LayerPlan(
            name=call.name,
            fixed_min=fixed_min[owner],
            batch_norm=_folded_batch_norm(candidate, trace, modules),
            shares_input_of=owner,
            calibrates_input=first[owner] == call.name,
            fixed_min_hidden=_fixed_min_hidden(data[call.name], candidate),
            calls=len(candidate.calls),
            type=supported_class(candidate.layer).__name__,
            shares_in_amct=None if in_amct[call.name] == owner else in_amct[call.name],
            never_negative=never_negative[owner],
        )
    return tuple(planned.values())


def _first_readers(calls: list[Call], owners: Mapping[str, str]) -> dict[str, str]:
    """Return which of the layers that share a quantizer runs first in training and so calibrates it, by owner."""
    first: dict[str, str] = {}
    for call in calls:
        if call.name in owners:
            first.setdefault(owners[call.name], call.name)
    return first


def _owners(enabled: dict[str, Candidate], settings: Mapping[str, Hashable]) -> dict[str, str]:
    """Group layers that read one value with equal settings; the first in the model owns the quantizer."""
    first: dict[tuple[int, Hashable, torch.device], str] = {}
    owners = {}
    for name, candidate in enabled.items():
        value, device = candidate.calls[0].input, next(candidate.layer.parameters()).device
        alone = len(candidate.calls) > 1 or len(value.readers) <= LAYER_TYPES[type(candidate.layer)].min_readers
        owners[name] = name if alone else first.setdefault((id(value), settings[name], device), name)
    return owners


def _fixed_min(data: DataConfig, candidate: Candidate) -> bool:
    given = data.fixed_min if data.may_begin_with_zero else False
    if isinstance(given, bool):
        return given
    return candidate.input_never_negative if given == "propagate" else candidate.input_after_relu


def _fixed_min_hidden(data: DataConfig, candidate: Candidate) -> bool:
    given = data.fixed_min if data.may_begin_with_zero else False
    # What a recurrent layer makes of its hidden state may be negative whatever the initial one was: AMCT's rule only.
    return given if isinstance(given, bool) else candidate.hidden_after_relu


def _for_all(owners: Mapping[str, str], flags: Mapping[str, bool]) -> dict[str, bool]:
    """Return by owner of a quantizer whether a flag is up for all layers that use it."""
    found: dict[str, bool] = {}
    for name, owner in owners.items():
        found[owner] = found.get(owner, True) and flags[name]
    return found


def _folded_batch_norm(candidate: Candidate, trace: Trace, modules: dict[str, nn.Module]) -> str | None:
    output = candidate.calls[0].output if len(candidate.calls) == 1 else None
    if output is None or len(output.readers) != 1 or not LAYER_TYPES[type(candidate.layer)].folds_batch_norm:
        return None
    (reader,) = output.readers
    if not isinstance(reader, str) or trace.batch_norm_calls.get(reader) != 1:
        return None
    return reader if only_normalizes(modules[reader]) else None


def _float_parts(trace: Trace, layers: tuple[LayerPlan, ...]) -> tuple[tuple[str, int], ...]:
    folded = {layer.batch_norm for layer in layers}
    modules = [kind for name, kind in trace.float_modules.items() if name not in folded]
    return tuple(Counter([*trace.float_operators, *modules]).most_common())


def _nothing_eligible(model: nn.Module, candidates: dict[str, Candidate]) -> str:
    kinds = ", ".join(kind.__name__ for kind in LAYER_TYPES)
    reasons = "; ".join(f"'{c.name}': {c.reason}" for c in list(candidates.values())[:5])
    found = f"Candidates that were refused: {reasons}." if reasons else f"It has no layer of type {kinds}."
    return f"No supported layers to quantize in {type(model).__name__}. {found}"
