"""The QuantPlan: everything the conversion and the record need to know, decided once and kept with the model.

A plan is plain data. It goes into every checkpoint, so that the same structure can be rebuilt without tracing the
model or reading a config file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from amct_lightning.config import LayerConfig, QuantChoices, RetrainConfig
from amct_lightning.config.fit import settings_as_written, without_computed_weights
from amct_lightning.graph.eligibility import NOT_TRAINED, Candidate, find_candidates
from amct_lightning.graph.forward import Forward, InputData
from amct_lightning.graph.nodes import RELU, Value
from amct_lightning.graph.trace import Call, Trace
from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.modules import QATLayer
from amct_lightning.modules.convert import PLAN_ATTRIBUTE


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done with one layer.

    Attributes:
        name: Dotted name of the layer in the model.
        fixed_min: Whether its input is never negative: the config's word, else whether a ReLU made it.
        batch_norm: Name of the BatchNorm that the record folds into its weight scales.
        shares_input_of: Name of the layer that owns its activation quantizer; its own name if that is itself.
        calibrates_input: Whether it is the first of its sharing group to run.
        fixed_min_hidden: The same as ``fixed_min`` for the hidden state of a recurrent layer.
        calls: How often the layer is called in one forward.
        type: Name of its float class, for people.
        shares_in_amct: Name of the layer that owns its activation quantizer in AMCT, where that is another one than
            here: AMCT computes with INT4 also where it cannot be packed, and so lets more layers share.
    """

    name: str
    fixed_min: bool
    batch_norm: str | None
    shares_input_of: str
    calibrates_input: bool
    fixed_min_hidden: bool = False
    calls: int = 1
    type: str = field(default="", compare=False)
    shares_in_amct: str | None = None


@dataclass(frozen=True)
class RefusedLayer:
    """A layer of a supported type, or of a subclass, that cannot be quantized.

    Attributes:
        name: Dotted name of the layer in the model.
        type: Name of the supported class that it is of or derives from.
        reason: Why it stays in float.
    """

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class QuantPlan:
    """The layers to quantize in order of first execution, and the settings they follow.

    Plans are equal if they quantize a model in the same way; what they tell about other layers does not count.

    Attributes:
        config: The complete configuration, every eligible layer listed.
        layers: One plan per enabled layer.
        search_n: Whether the shifts of the int32 accumulators are searched (``shift_bit`` in the record).
        refused: The layers that could not be enabled, in module order.
        ends: Names of the first and the last layer of a supported type to run, quantized or not.
        float_parts: What else of the forward stays in float, see ``graph/float_parts.py``: kinds and how many of each.
    """

    config: RetrainConfig
    layers: tuple[LayerPlan, ...]
    search_n: bool = False
    refused: tuple[RefusedLayer, ...] = field(default=(), compare=False)
    ends: tuple[str, ...] = field(default=(), compare=False)
    float_parts: tuple[tuple[str, int], ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain dicts, lists, strings and numbers, for a checkpoint."""
        return {
            "config": self.config.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
            "search_n": self.search_n,
            "refused": [asdict(layer) for layer in self.refused],
            "ends": list(self.ends),
            "float_parts": dict(self.float_parts),
        }

    def only(self, layers: Sequence[LayerPlan]) -> QuantPlan:
        """Return the plan without the other layers, which are disabled in its configuration.

        Args:
            layers: Some of its layers.
        """
        names = [layer.name for layer in layers]
        first: dict[str, str] = {}  # a quantizer whose owner is gone belongs to the first of those that are left
        for layer in layers:
            first.setdefault(layer.shares_input_of, layer.name)
        owners = {owner: owner if owner in names else name for owner, name in first.items()}
        feeding = {layer.shares_input_of for layer in layers if layer.calibrates_input}
        kept = [
            replace(
                layer,
                shares_input_of=owners[layer.shares_input_of],
                calibrates_input=layer.calibrates_input
                or (layer.shares_input_of not in feeding and first[layer.shares_input_of] == layer.name),
            )
            for layer in layers
        ]
        gone = frozenset(layer.name for layer in self.layers) - set(names)
        return replace(self, config=_without(gone, self.config), layers=tuple(kept))

    def within(self, prefix: str) -> QuantPlan:
        """Return the plan for a part of the module, with names as they are in the part.

        Args:
            prefix: What the names of the part begin with, with a dot at the end; layers of other names are left out.
        """

        def inner(name: str) -> str:
            return name.removeprefix(prefix)

        layers = [layer for layer in self.layers if layer.name.startswith(prefix)]
        part = self.only(layers)
        named = tuple(
            replace(
                layer,
                name=inner(layer.name),
                batch_norm=None if layer.batch_norm is None else inner(layer.batch_norm),
                shares_input_of=inner(layer.shares_input_of),
                shares_in_amct=None if layer.shares_in_amct is None else inner(layer.shares_in_amct),
            )
            for layer in part.layers
        )
        config = {inner(name): layer for name, layer in self.config.items() if name.startswith(prefix)}
        refused = (replace(layer, name=inner(layer.name)) for layer in self.refused if layer.name.startswith(prefix))
        ends = tuple(inner(name) for name in self.ends if name.startswith(prefix))
        return replace(
            self, config=replace(self.config, layers=config), layers=named, refused=tuple(refused), ends=ends
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "checkpoint") -> QuantPlan:
        """Rebuild a plan from :meth:`to_dict`.

        Args:
            data: The plain form.
            source: Where it comes from, for messages.

        Raises:
            ValueError: If it is not the plain form of a plan.
        """
        try:
            return cls(
                RetrainConfig.from_dict(data["config"], source),
                tuple(LayerPlan(**layer) for layer in data["layers"]),
                data["search_n"],
                tuple(RefusedLayer(**layer) for layer in data.get("refused", ())),
                tuple(data.get("ends", ())),
                tuple({**data.get("float_parts", {})}.items()),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The quantization plan in {source} is damaged ({type(error).__name__}: {error}). "
                "Use another checkpoint, or convert again from the float model."
            ) from error


def make_plan(
    model: nn.Module,
    config: RetrainConfig | QuantChoices | None,
    input_data: InputData | Forward,
    source: str = "config",
    allow_reuse: bool = False,
    search_n: bool = False,
) -> QuantPlan:
    """Decide which layers are quantized and how, from an observed forward and the user's choices.

    Args:
        model: The float model.
        config: The user's choices; ``None`` quantizes every eligible layer with the defaults.
        input_data: Input for which the model works, or how it is run if there is more to say. Layers that it does not
            reach, such as the experts that it is not routed to, stay in float: the range of their inputs could only be
            guessed.
        source: Where the config comes from, for messages.
        allow_reuse: Whether layers that are called several times in one forward are quantized, with one set of
            factors for all calls.
        search_n: Whether the shifts of the int32 accumulators are searched.

    Returns:
        The plan.

    Raises:
        ValueError: If the config does not fit the model or names a layer that cannot be quantized, or nothing is
            left to quantize.
        RuntimeError: If the model is not a plain float model or fails on the input.

    Example:
        >>> plan = make_plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), None, torch.ones(1, 2))
        >>> [(layer.name, layer.fixed_min) for layer in plan.layers]
        [('0', False), ('2', True)]
    """
    candidates, trace = find_candidates(model, input_data, allow_reuse)
    config = without_computed_weights(QuantChoices() if config is None else config, model, source)
    named = frozenset(config.layers)
    # A configuration is made from the model in evaluation, so it may rightly list what no training ever runs.
    untrained = frozenset(name for name, c in candidates.items() if c.reason == NOT_TRAINED)
    _refuse_named(named - untrained, candidates, model, source)
    refused = _refused_layers(candidates, named)
    eligible = {name: c.layer for name, c in candidates.items() if name not in refused or name in untrained}
    if not eligible.keys() - untrained:
        raise ValueError(_nothing_eligible(model, candidates))
    resolved = _without(untrained, config.resolve(eligible, source))
    # Choices that are no complete configuration are written down as one first, in AMCT with INT4 already raised.
    written = settings_as_written(config.layers, eligible) if isinstance(config, RetrainConfig) else resolved.layers
    layers = _layer_plans(resolved, written, candidates, trace, dict(model.named_modules()))
    ends = (trace.calls[0].name, trace.calls[-1].name)
    return QuantPlan(resolved, layers, search_n, tuple(refused.values()), ends, _float_parts(trace, layers))


def _without(names: frozenset[str], config: RetrainConfig) -> RetrainConfig:
    """Disable layers in a complete configuration."""
    disabled = {name: replace(config[name], retrain_enable=False) for name in config if name in names}
    return replace(config, layers={**config.layers, **disabled})


def find_plan(model: nn.Module) -> tuple[nn.Module, QuantPlan] | None:
    """Return the converted module inside ``model`` (or itself) and its plan, or ``None`` if there is none.

    Layers that were reverted or replaced since are not in the plan that is returned.

    Args:
        model: A converted model, or a wrapper around one (DDP, a LightningModule, a compiled module).
    """
    found = carried_plan(model)
    if found is None:
        return None
    root, plan = found
    modules = dict(root.named_modules(remove_duplicate=False))
    left = [layer for layer in plan.layers if isinstance(modules.get(layer.name), QATLayer)]
    if len(left) == len(plan.layers):
        return found
    return (root, plan.only(left)) if left else None


def carried_plan(model: nn.Module) -> tuple[nn.Module, QuantPlan] | None:
    """Return the converted module inside ``model`` and the plan by which it was converted, whatever became of it."""
    for module in model.modules():
        plan = module.__dict__.get(PLAN_ATTRIBUTE)
        if plan is not None:
            return module, plan
    return None


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
    in_amct = _owners(enabled, written)
    # A quantizer has one number of bits, so raising INT4 in some of its layers divides it.
    owners = _owners(enabled, {name: (owner, config[name].retrain_data_config) for name, owner in in_amct.items()})
    first = _first_readers(trace.calls if trace.in_training is None else trace.in_training, owners)
    planned: dict[str, LayerPlan] = {}
    for call in trace.calls:
        if call.name not in enabled or call.name in planned:
            continue
        candidate, settings, owner = enabled[call.name], config[call.name], owners[call.name]
        planned[call.name] = LayerPlan(
            name=call.name,
            fixed_min=_fixed_min(settings, [c.input for c in (*candidate.calls, *candidate.training_calls)]),
            batch_norm=_folded_batch_norm(candidate, trace, modules),
            shares_input_of=owner,
            calibrates_input=first[owner] == call.name,
            fixed_min_hidden=_fixed_min(settings, [c.hidden for c in (*candidate.calls, *candidate.training_calls)]),
            calls=len(candidate.calls),
            type=supported_class(candidate.layer).__name__,
            shares_in_amct=None if in_amct[call.name] == owner else in_amct[call.name],
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


def _fixed_min(config: LayerConfig, values: list[Value | None] | list[Value]) -> bool:
    given = config.retrain_data_config.fixed_min
    return all(value is not None and value.producer in RELU for value in values) if given is None else given


def _folded_batch_norm(candidate: Candidate, trace: Trace, modules: dict[str, nn.Module]) -> str | None:
    output = candidate.calls[0].output if len(candidate.calls) == 1 else None
    if output is None or len(output.readers) != 1 or not LAYER_TYPES[type(candidate.layer)].folds_batch_norm:
        return None
    (reader,) = output.readers
    if not isinstance(reader, str) or trace.batch_norm_calls.get(reader) != 1:
        return None
    return reader if _only_normalizes(modules[reader]) else None


def _only_normalizes(module: nn.Module) -> bool:
    """Tell whether a BatchNorm multiplies and adds what its parameters and statistics say, and nothing else."""
    own = type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward) and "forward" not in vars(module)
    return own and getattr(module, "running_var", None) is not None


def _float_parts(trace: Trace, layers: tuple[LayerPlan, ...]) -> tuple[tuple[str, int], ...]:
    folded = {layer.batch_norm for layer in layers}
    modules = [kind for name, kind in trace.float_modules.items() if name not in folded]
    return tuple(Counter([*trace.float_operators, *modules]).most_common())


def _nothing_eligible(model: nn.Module, candidates: dict[str, Candidate]) -> str:
    kinds = ", ".join(kind.__name__ for kind in LAYER_TYPES)
    reasons = "; ".join(f"'{c.name}': {c.reason}" for c in list(candidates.values())[:5])
    found = f"Candidates that were refused: {reasons}." if reasons else f"It has no layer of type {kinds}."
    return f"No supported layers to quantize in {type(model).__name__}. {found}"
