"""Which layers of a model can be quantized, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from amct_lightning.graph.trace import Call, InputData, Trace, observe
from amct_lightning.modules.layers import QATLayer
from amct_lightning.modules.registry import LAYER_TYPES, unsupported_reason


@dataclass(frozen=True)
class Candidate:
    """A layer of a supported type.

    Attributes:
        name: Its dotted name in the model.
        layer: The layer.
        call: Its one call in the observed forward, if it has exactly one.
        reason: Why it cannot be quantized; ``None`` if it can.
    """

    name: str
    layer: nn.Module
    call: Call | None
    reason: str | None


def find_candidates(
    model: nn.Module, input_data: InputData, run: nn.Module | None = None
) -> tuple[dict[str, Candidate], Trace]:
    """Observe one forward and judge every layer of a supported type.

    Args:
        model: The float model.
        input_data: Input for which ``run`` works.
        run: The module to call, if it is one that contains ``model``.

    Returns:
        The candidates by name in ``named_modules()`` order, and the observed data flow.

    Raises:
        RuntimeError: If the model is quantized already or fails on the input.
        TypeError: If ``model`` is not a module.

    Example:
        >>> import torch
        >>> candidates, _ = find_candidates(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2))
        >>> [(c.name, c.reason) for c in candidates.values()]
        [('0', None)]
    """
    check_float_model(model)
    # A lazy layer gets its class in the observed forward.
    may_become = {name: m for name, m in model.named_modules() if getattr(m, "cls_to_become", type(m)) in LAYER_TYPES}
    trace = observe(model, may_become, run or model, input_data)
    watched = {name: m for name, m in model.named_modules() if type(m) in LAYER_TYPES}
    calls: dict[str, list[Call]] = {name: [] for name in watched}
    for call in trace.calls:
        calls[call.name].append(call)
    weights = Counter(id(layer.weight) for layer in watched.values())
    candidates = {}
    for name, layer in watched.items():
        reason = _reason(name, layer, calls[name], weights[id(layer.weight)])
        candidates[name] = Candidate(name, layer, calls[name][0] if len(calls[name]) == 1 else None, reason)
    return candidates, trace


def eligible_layers(model: nn.Module, input_data: InputData) -> dict[str, nn.Module]:
    """Return the layers that can be quantized, by name in ``named_modules()`` order.

    Args:
        model: The float model.
        input_data: Input for which the model works.

    Raises:
        RuntimeError: If the model is quantized already or fails on the input.

    Example:
        >>> import torch
        >>> list(eligible_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)))
        ['0']
    """
    candidates, _ = find_candidates(model, input_data)
    return {name: c.layer for name, c in candidates.items() if c.reason is None}


def check_float_model(model: nn.Module) -> None:
    """Refuse what is not a module, and a model that has quantized layers already.

    Args:
        model: The model to be quantized.

    Raises:
        TypeError: If it is not a :class:`torch.nn.Module`.
        RuntimeError: If it contains QAT layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
    quantized = [name for name, module in model.named_modules() if isinstance(module, QATLayer)]
    if quantized:
        shown = ", ".join(quantized[:5]) + (", ..." if len(quantized) > 5 else "")
        raise RuntimeError(
            f"The model cannot be quantized because {len(quantized)} of its layers are quantized already ({shown}). "
            "Give the float model, or go on with the one you have."
        )


def _reason(name: str, layer: nn.Module, calls: list[Call], users_of_weight: int) -> str | None:
    kind = LAYER_TYPES[type(layer)]
    if not name:
        return "it is the model itself, so it has no name for the record; put it into a module, e.g. nn.Sequential"
    if not calls:
        return "never called"
    if len(calls) > 1:
        return f"called {len(calls)} times"
    if users_of_weight > 1:
        return "its weight is shared with another layer"
    if kind.input_dims is not None and calls[0].input_dims != kind.input_dims:
        return f"its input has {calls[0].input_dims} dimensions, not {kind.input_dims} (no batch axis)"
    return unsupported_reason(layer)
