"""The QuantPlan: everything the conversion and the record need to know, decided once and kept with the model.

A plan is plain data. It goes into every checkpoint, so that the same structure can be rebuilt without tracing the
model or reading a config file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from amct_lightning.config import LayerConfig, RetrainConfig
from amct_lightning.graph.eligibility import Candidate, find_candidates
from amct_lightning.graph.trace import InputData, Trace
from amct_lightning.modules.registry import LAYER_TYPES

_PLAN_ATTRIBUTE = "_amct_quant_plan"
_RELU = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done with one layer.

    Attributes:
        name: Dotted name of the layer in the model.
        fixed_min: Whether its input is never negative: the config's word, else whether a ReLU made it.
        batch_norm: Name of the BatchNorm that the record folds into its weight scales.
        shares_input_of: Name of the layer that owns its activation quantizer; its own name if that is itself.
        calibrates_input: Whether it is the first of its sharing group to run.
    """

    name: str
    fixed_min: bool
    batch_norm: str | None
    shares_input_of: str
    calibrates_input: bool


@dataclass(frozen=True)
class QuantPlan:
    """The layers to quantize in order of first execution, and the settings they follow.

    Attributes:
        config: The complete configuration, every eligible layer listed.
        layers: One plan per enabled layer.
    """

    config: RetrainConfig
    layers: tuple[LayerPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain dicts, lists, strings and numbers, for a checkpoint."""
        return {"config": self.config.to_dict(), "layers": [asdict(layer) for layer in self.layers]}

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
            config = RetrainConfig.from_dict(data["config"], source)
            return cls(config, tuple(LayerPlan(**layer) for layer in data["layers"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The quantization plan in {source} is damaged ({type(error).__name__}: {error}). "
                "Use another checkpoint, or convert again from the float model."
            ) from error


def make_plan(
    model: nn.Module,
    config: RetrainConfig | None,
    input_data: InputData,
    run: nn.Module | None = None,
    source: str = "config",
) -> QuantPlan:
    """Decide which layers are quantized and how, from one observed forward and the user's choices.

    Args:
        model: The float model.
        config: The user's choices; ``None`` quantizes every eligible layer with the defaults.
        input_data: Input for which the model works.
        run: The module to call, if it is one that contains ``model``.
        source: Where the config comes from, for messages.

    Returns:
        The plan.

    Raises:
        ValueError: If the config does not fit the model, or nothing is left to quantize.
        RuntimeError: If the model is quantized already or fails on the input.

    Example:
        >>> plan = make_plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), None, torch.ones(1, 2))
        >>> [(layer.name, layer.fixed_min) for layer in plan.layers]
        [('0', False), ('2', True)]
    """
    candidates, trace = find_candidates(model, input_data, run)
    eligible = {name: c.layer for name, c in candidates.items() if c.reason is None}
    if not eligible:
        raise ValueError(_nothing_eligible(model, candidates))
    if config is None:
        config = RetrainConfig(layers={name: LayerConfig() for name in eligible})
    resolved = config.resolve(eligible, source)
    return QuantPlan(resolved, _layer_plans(resolved, candidates, trace, dict(model.named_modules())))


def attach_plan(model: nn.Module, plan: QuantPlan) -> None:
    """Keep ``plan`` with the converted model; deepcopy and pickle take it along."""
    setattr(model, _PLAN_ATTRIBUTE, plan)


def find_plan(model: nn.Module) -> tuple[nn.Module, QuantPlan] | None:
    """Return the converted module inside ``model`` (or itself) and its plan, or ``None`` if there is none.

    Args:
        model: A converted model, or a wrapper around one (DDP, a LightningModule, a compiled module).
    """
    for module in model.modules():
        plan = module.__dict__.get(_PLAN_ATTRIBUTE)
        if plan is not None:
            return module, plan
    return None


def _layer_plans(
    config: RetrainConfig, candidates: dict[str, Candidate], trace: Trace, modules: dict[str, nn.Module]
) -> tuple[LayerPlan, ...]:
    enabled = {name: c for name, c in candidates.items() if name in config and config[name].retrain_enable}
    owners = _owners(config, enabled)
    seen: set[str] = set()
    plans = []
    for call in trace.calls:
        if call.name not in enabled:
            continue
        owner = owners[call.name]
        plans.append(
            LayerPlan(
                name=call.name,
                fixed_min=_fixed_min(config[call.name], call.input.producer),
                batch_norm=_folded_batch_norm(enabled[call.name], trace, modules),
                shares_input_of=owner,
                calibrates_input=owner not in seen,
            )
        )
        seen.add(owner)
    return tuple(plans)


def _owners(config: RetrainConfig, enabled: dict[str, Candidate]) -> dict[str, str]:
    """Group layers that read one value with equal settings; the first in the model owns the quantizer."""
    first: list[tuple[Any, LayerConfig, str]] = []
    owners = {}
    for name, candidate in enabled.items():
        value = candidate.call.input if candidate.call else None
        for other, settings, owner in first:
            if other is value and settings == config[name]:
                owners[name] = owner
                break
        else:
            first.append((value, config[name], name))
            owners[name] = name
    return owners


def _fixed_min(config: LayerConfig, producer: Any) -> bool:
    given = config.retrain_data_config.fixed_min
    return producer in _RELU if given is None else given


def _folded_batch_norm(candidate: Candidate, trace: Trace, modules: dict[str, nn.Module]) -> str | None:
    output = candidate.call.output if candidate.call else None
    if output is None or len(output.readers) != 1 or not LAYER_TYPES[type(candidate.layer)].folds_batch_norm:
        return None
    (reader,) = output.readers
    if not isinstance(reader, str) or trace.batch_norm_calls.get(reader) != 1:
        return None
    return reader if getattr(modules[reader], "running_var", None) is not None else None


def _nothing_eligible(model: nn.Module, candidates: dict[str, Candidate]) -> str:
    kinds = ", ".join(kind.__name__ for kind in LAYER_TYPES)
    reasons = "; ".join(f"'{c.name}': {c.reason}" for c in list(candidates.values())[:5])
    found = f"Candidates that were refused: {reasons}." if reasons else f"It has no layer of type {kinds}."
    return f"No supported layers to quantize in {type(model).__name__}. {found}"
