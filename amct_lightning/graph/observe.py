"""Run a model, or a copy of it, under observation: in evaluation, and on the path that training takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from amct_lightning.graph.float_parts import FloatParts
from amct_lightning.graph.forward import Forward, InputData
from amct_lightning.graph.nodes import VisibleNodes
from amct_lightning.graph.preserve import preserved, random_state
from amct_lightning.graph.tensors import tensors_in
from amct_lightning.graph.trace import Call, Observer, Trace, calls_by_name

_TRAINING_RUNS = 8
"""A layer that is left out of half of all training steps is missed by all of them once in 256 times."""


def observe(model: nn.Module, watched: Mapping[str, nn.Module], forward: Forward) -> Trace:
    """Run a model and note the data flow around the watched layers; leave no trace in the model.

    What stays are layers that only the first forward builds, such as :class:`torch.nn.LazyLinear`, and plain Python
    attributes that the forward writes: give a copy of the model where there can be one.

    Args:
        model: The model whose module names are used.
        watched: The layers of interest, by name.
        forward: The call. Tensors that are on none of the model's devices are moved to that of its first parameter.

    Returns:
        The observed calls.

    Raises:
        RuntimeError: If the model fails on the input; the model's own error is the cause.
    """
    run = forward.run
    try:
        try:
            trace = _observe_once(model, watched, forward)
        except Exception as error:
            try:  # some models take gradients in their forward; the others do with less
                trace = _observe_once(model, watched, forward, with_gradients=True)
            except Exception:
                raise error from None
    except Exception as error:
        raise RuntimeError(
            f"{type(run).__name__} failed on the given input_data while its data flow was observed "
            f"({_describe(forward.input_data)}): {type(error).__name__}: {error}. Give input_data with which the "
            f"model's forward runs: a tensor, a tuple of positional arguments or a dict of keyword arguments."
            f"{_hint(run)}"
        ) from error
    if forward.sees_training:
        expected = {call.name for call in trace.calls}
        try:
            seen = trace.in_training = _observe_training(model, watched, forward, expected)
        except Exception as error:  # for example of a batch normalization that gets a single example
            seen, trace.training_error = None, f"{type(error).__name__}: {error}"
        trace.trained = forward.agree(expected if seen is None else {call.name for call in seen})
    return trace


def _observe_once(
    model: nn.Module, watched: Mapping[str, nn.Module], forward: Forward, with_gradients: bool = False
) -> Trace:
    with preserved(forward.run, with_gradients=with_gradients):
        return _run(model, watched, forward)


def _observe_training(
    model: nn.Module, watched: Mapping[str, nn.Module], forward: Forward, expected: set[str]
) -> list[Call]:
    """Return the calls on the path of training.

    Models that draw lots about what they run are run several times, as long as a layer of the evaluation is missing.
    """
    calls: dict[str, list[Call]] = {}
    with preserved(forward.run, training=True, with_gradients=True):
        for _ in range(_TRAINING_RUNS):
            before = random_state()
            seen = calls_by_name(_run(model, watched, forward).calls)
            calls |= {name: called for name, called in seen.items() if name not in calls}
            if expected <= calls.keys() or random_state() == before:
                break
    return [call for called in calls.values() for call in called]


def _run(model: nn.Module, watched: Mapping[str, nn.Module], forward: Forward) -> Trace:
    args, kwargs = _arguments(forward.run, forward.input_data)
    observer = Observer(FloatParts(model))
    with observer.watching(model, forward.run, watched):
        with forward.prepare(forward.run), forward.context(), observer, VisibleNodes(observer.replace):
            output = getattr(forward.run, forward.method)(*args, **kwargs)
        observer.read_by_user(output)
        observer.find_outside_readers(watched)
        observer.find_float_parts(model)
    return observer.trace


def _arguments(run: nn.Module, input_data: InputData) -> tuple[tuple[Any, ...], dict[str, Any]]:
    devices = list(dict.fromkeys(p.device for p in run.parameters()))

    moved_already: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        """Make a copy that the model may write to, one for all places where a tensor stands."""
        if id(tensor) not in moved_already:
            elsewhere = devices and tensor.device not in devices
            moved_already[id(tensor)] = (tensor.to(devices[0]) if elsewhere else tensor).detach().clone()
        return moved_already[id(tensor)]

    if isinstance(input_data, Mapping):
        return (), tree_map_only(Tensor, move, dict(input_data))
    moved = tree_map_only(Tensor, move, input_data)
    return (moved if isinstance(moved, tuple) else (moved,)), {}


def _describe(input_data: InputData) -> str:
    shapes = [f"{tuple(t.shape)} {t.dtype}" for t in tensors_in(input_data)]
    return "tensors of shape " + ", ".join(shapes) if shapes else "no tensors"


def _hint(run: nn.Module) -> str:
    if not any(p.is_meta for p in run.parameters()):
        return ""
    return (
        " The model is on the meta device, where no forward works that looks at values; if this one does, convert "
        "the model after its weights are loaded."
    )
