"""Which layers of a model can be quantized, and why the others cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from amct_lightning.graph.float_model import check_float_model
from amct_lightning.graph.forward import Forward, InputData, copy_to_run, counterpart, noticed_calls
from amct_lightning.graph.nonnegative import after_relu, never_negative
from amct_lightning.graph.observe import observe
from amct_lightning.graph.preserve import preserved
from amct_lightning.graph.trace import Call, Trace, calls_by_name
from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.modules.registry import QAT_CLASSES

NOT_REACHED = "never called with the given input_data"
NOT_TRAINED = "runs in evaluation only, so that no training batch could calibrate the range of its input"
ONLY_TRAINED = "runs in training only, so that it is no part of the network that is deployed"


@dataclass(frozen=True)
class Candidate:
    """A layer of a supported type, or of a subclass of one, which is always refused.

    Attributes:
        name: Its dotted name in the model.
        layer: The layer.
        calls: Its calls in the observed forward.
        training_calls: Its calls on the path of training, if that was observed.
        reason: Why it cannot be quantized; ``None`` if it can.
    """

    name: str
    layer: nn.Module
    calls: tuple[Call, ...]
    training_calls: tuple[Call, ...]
    reason: str | None

    @property
    def input_after_relu(self) -> bool:
        """Whether a ReLU made each of its inputs: AMCT's rule for ``fixed_min``."""
        return after_relu(call.input for call in (*self.calls, *self.training_calls))

    @property
    def input_never_negative(self) -> bool:
        """Whether the data flow shows that none of its inputs has a negative element."""
        return never_negative(call.input for call in (*self.calls, *self.training_calls))

    @property
    def hidden_after_relu(self) -> bool:
        """Whether a ReLU made each of the initial hidden states that it was given: AMCT's rule for those."""
        return after_relu(call.hidden for call in (*self.calls, *self.training_calls))


def find_candidates(
    model: nn.Module, input_data: InputData | Forward, allow_reuse: bool = False
) -> tuple[dict[str, Candidate], Trace]:
    """Observe how the model runs and judge every layer of a supported type and its subclasses.

    Args:
        model: The float model.
        input_data: Input for which ``model`` works, or how it is run if there is more to say.
        allow_reuse: Whether a layer may be called several times.

    Returns:
        The candidates by name in ``named_modules()`` order, and the observed data flow.

    Raises:
        RuntimeError: If the model is not a plain float model, see :func:`check_float_model`, or fails on the input.
        TypeError: If ``model`` is not a module.

    Example:
        >>> import torch
        >>> candidates, _ = find_candidates(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2))
        >>> [(c.name, c.reason) for c in candidates.values()]
        [('0', None)]
    """
    check_float_model(model)
    forward = input_data if isinstance(input_data, Forward) else Forward(model, input_data)
    trace = _observe_layers(model, forward)
    if trace.training_error is not None:
        _warn_unseen(forward, trace.training_error)
    calls, training_calls = calls_by_name(trace.calls), calls_by_name(trace.in_training or [])
    modules: dict[str, nn.Module] = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, tuple(LAYER_TYPES))}
    shared = _shared_weights(layer for layer in layers.values() if type(layer) in LAYER_TYPES)
    candidates = {}
    for name, layer in layers.items():
        called = calls.get(name, [])
        reason = _class_reason(layer) or _weight_reason(layer) or _call_reason(name, called, trace, allow_reuse)
        reason = reason or _use_reason(layer, called, shared)
        in_training = training_calls.get(name, [])
        is_trained = trace.trained is None or name in trace.trained
        if reason is None and not is_trained:
            reason = NOT_TRAINED
        elif reason == NOT_REACHED and trace.trained is not None and is_trained:
            reason = ONLY_TRAINED
        candidates[name] = Candidate(name, layer, tuple(called), tuple(in_training), reason)
    return candidates, trace


def eligible_layers(model: nn.Module, input_data: InputData) -> dict[str, nn.Module]:
    """Return the layers that a default configuration lists, by name in ``named_modules()`` order.

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
    return listed_layers(candidates)


def listed_layers(candidates: Mapping[str, Candidate]) -> dict[str, nn.Module]:
    """Return those of the candidates that a default configuration lists.

    Args:
        candidates: The candidates by name.
    """
    return {
        name: c.layer for name, c in candidates.items() if c.reason is None and LAYER_TYPES[type(c.layer)].by_default
    }


def computed_weights(model: nn.Module) -> dict[str, str]:
    """Return the layers whose weight is computed before each call, by name, and why they stay in float.

    AMCT takes them for layers like others: it lists them in the configurations that it writes, and fails in training.

    Args:
        model: The model.

    Example:
        >>> from torch.nn.utils import parametrizations
        >>> model = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)))
        >>> list(computed_weights(model))
        ['1']
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, tuple(LAYER_TYPES))}
    reasons = {
        name: _computed_reason(layer) for name, layer in layers.items() if not isinstance(layer, LazyModuleMixin)
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _observe_layers(model: nn.Module, forward: Forward) -> Trace:
    """Observe the layers of exactly the supported types in a copy of the model, or in the model if that must be.

    The model itself has to run if it cannot be copied, if its first forward builds layers, and if its copy calls
    layers of the model.
    """
    own = _exact_layers(model)
    copied = copy_to_run(forward.run)
    if copied is not None:
        part = counterpart(model, forward.run, copied)
        # What the copy holds may lead back to the model, as a function does that was compiled for it.
        with noticed_calls(own) as called, preserved(forward.run, training=True):
            trace = observe(part, _exact_layers(part), replace(forward, run=copied))
        if not called and _exact_layers(part).keys() == own.keys():
            return trace
    trace = observe(model, own, forward)
    built = _exact_layers(model)
    return observe(model, built, forward) if built.keys() - own.keys() else trace


def _warn_unseen(forward: Forward, error: str) -> None:
    """Tell that a model which evaluates an example does not train on it."""
    what = "" if forward.method == "__call__" else f".{forward.method}"
    warnings.warn(
        f"{type(forward.run).__name__}{what} fails in training mode on the example that shows its data flow, on which "
        f"it runs in evaluation: {error}. So evaluation alone tells which layers are quantized, and which share a "
        "range. Layers that run in evaluation only are quantized as well, without a range as long as no training "
        "batch reaches them; what else differs in training is not known. Give input_data on which it also trains, "
        "such as a batch of several examples.",
        stacklevel=3,
    )


def _exact_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that are, or as lazy ones will be, exactly of a supported type."""
    return {
        name: module
        for name, module in model.named_modules()
        if (getattr(module, "cls_to_become", None) or type(module)) in LAYER_TYPES
    }


def _class_reason(layer: nn.Module) -> str | None:
    if isinstance(layer, LazyModuleMixin):
        return NOT_REACHED
    computed = _computed_reason(layer)
    if computed is not None:
        return computed
    if type(layer) not in LAYER_TYPES:
        base = supported_class(layer).__name__
        return f"is a {type(layer).__name__}, a subclass of {base}; only the exact class is quantized, as in AMCT"
    if "forward" in vars(layer):
        return "its forward was replaced on the object, so a quantized one would never run; undo that first"
    return None


def _computed_reason(layer: nn.Module) -> str | None:
    if parametrize.is_parametrized(layer):
        names = ", ".join(f"'{name}'" for name in layer.parametrizations)  # type: ignore[union-attr]
        return (
            f"{names} is computed by a parametrization (e.g. weight norm); remove_parametrizations makes it permanent"
        )
    if type(layer) not in LAYER_TYPES:
        return None
    for name, weight in _weights(layer).items():
        if not isinstance(weight, nn.Parameter):
            return (
                f"'{name}' is no parameter but computed before each call (weight norm, spectral norm, pruning); "
                "remove_weight_norm, remove_spectral_norm or prune.remove makes it permanent"
            )
    return None


def _weight_reason(layer: nn.Module) -> str | None:
    for name, weight in _weights(layer).items():
        if not weight.is_floating_point():
            return f"'{name}' is {weight.dtype}; only real floating-point weights are quantized"
    return None


def _call_reason(name: str, calls: list[Call], trace: Trace, allow_reuse: bool) -> str | None:
    if not name:
        return "it is the model itself, so it has no name for the record; put it into a module, e.g. nn.Sequential"
    if not calls and name in trace.read_from_outside:
        return "never called: other code reads its weight, as in F.linear(x, layer.weight); call the layer instead"
    if not calls:
        return NOT_REACHED
    if len(calls) > 1 and not allow_reuse:
        return f"called {len(calls)} times; quantized only with allow_reuse=True"
    return None


def _use_reason(layer: nn.Module, calls: list[Call], shared: set[int]) -> str | None:
    if any(id(weight) in shared for weight in _weights(layer).values()):
        return "its weight is shared with another layer"
    kind = LAYER_TYPES[type(layer)]
    for call in calls:
        if issubclass(call.input_type, PackedSequence):
            return "its input is a PackedSequence, which the hardware cannot run; give it the padded tensor"
        if kind.batched_dims is not None and call.input_dims != kind.batched_dims:
            return f"its input has {call.input_dims} dimensions, not {kind.batched_dims} (no batch axis)"
    return kind.obstacle(layer)


def _shared_weights(layers: Iterable[nn.Module]) -> set[int]:
    """Return the ids of weights that keep the layers that share them from being quantized."""
    users: dict[int, list[nn.Module]] = {}
    for layer in layers:
        for weight in _weights(layer).values():
            users.setdefault(id(weight), []).append(layer)
    return {
        weight
        for weight, sharing in users.items()
        if len(sharing) > 1 and any(LAYER_TYPES[type(layer)].finds_shared_weights for layer in sharing)
    }


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(layer, name) for name in QAT_CLASSES[type(layer)].weight_quantizers.values()}
