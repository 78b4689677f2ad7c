"""What the converted model itself computes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from amct_lightning.export.integer.graph_file import GraphFile
from amct_lightning.export.verify.expected import ExpectedLayer
from amct_lightning.modules.grid.codes import activation_codes
from amct_lightning.quantizers import ActivationQuantizer


@dataclass
class Call:
    """One call of a layer; of an LSTM or GRU the time axis comes first.

    Attributes:
        x: Its input, float32.
        eps: The distance from 1 to the next number of the dtype it computes in.
        y: Its output, that of the BatchNorm which is folded into it included, float32.
        state: The initial states of an LSTM or GRU, (1, batch, hidden); zeros where none are given.
        last: Its last states.
    """

    x: Tensor
    eps: float
    y: Tensor = field(default_factory=lambda: torch.empty(0))
    state: tuple[Tensor, ...] = ()
    last: tuple[Tensor, ...] = ()


@dataclass
class TorchRun:
    """One forward of the model.

    Attributes:
        calls: Layer name -> its calls, in order; the layers in order of execution.
        outputs: The tensors of the output, flattened.
    """

    calls: dict[str, list[Call]]
    outputs: list[np.ndarray]


def run_model(model: nn.Module, layers: Mapping[str, ExpectedLayer], batch: Any) -> TorchRun:
    """Run a model in evaluation and note what its layers computed.

    Args:
        model: The model.
        layers: Its quantized layers.
        batch: A tensor, a tuple of positional or a mapping of keyword arguments.
    """
    run = TorchRun({}, [])
    with torch.no_grad(), _evaluated(model), _noted(layers, run.calls):
        device = next(model.parameters()).device
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device, copy=True), batch)  # it may be written into
        if isinstance(moved, Mapping):
            output = model(**moved)
        else:
            output = model(*moved) if isinstance(moved, (tuple, list)) else model(moved)
    run.outputs = [_array(tensor) for tensor in tensors_in(output)]
    return run


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a structure, flattened in order."""
    plain = dict(value) if isinstance(value, Mapping) else value
    return [leaf for leaf in tree_flatten(plain)[0] if isinstance(leaf, Tensor)]


def onnx_inputs(given: Mapping[str, Tensor], file: GraphFile) -> dict[str, np.ndarray]:
    """Return what a model is called with by the names of a graph's inputs: those of the arguments, or else in order.

    A graph does not have the inputs that its outputs do not depend on.

    Args:
        given: The tensors by the names of the arguments.
        file: The graph.

    Raises:
        ValueError: If the batch has another number of tensors than the graph has inputs.
    """
    names = list(file.inputs)
    if set(names) <= given.keys():
        return {name: _array(given[name]) for name in names}
    if len(given) == len(names):
        return {name: _array(tensor) for name, tensor in zip(names, given.values(), strict=True)}
    raise ValueError(
        f"{file.label} has {len(names)} input(s), {', '.join(map(repr, names))}, and a batch holds {len(given)} "
        f"tensor(s), {', '.join(map(repr, given)) or 'none'}. A batch is what the model is called with, without "
        "labels: a tensor, a tuple or a mapping."
    )


def torch_codes(quantizer: ActivationQuantizer, x: Tensor, on_grid: bool) -> Tensor:
    """Return the codes with which training computes, integers in float32 on the CPU.

    They are read off what the quantizer gives, so that they are those of this very quantizer.

    Args:
        quantizer: The quantizer.
        x: Its input.
        on_grid: Whether the layer computes with what the device computes with.
    """
    device = quantizer.clip_max.device
    with torch.no_grad():
        if on_grid:
            codes = activation_codes(quantizer, x.to(device), *quantizer.usable_clips()).values
            return (codes + quantizer.offset).cpu()
        y = quantizer.quantize(x.to(device), *quantizer.usable_clips())
        return (torch.round(y / quantizer.scale) + quantizer.offset).cpu()


def near_a_tie(x: Tensor, scale: float, offset: float, ulps: float = 4.0) -> Tensor:
    """Tell where rounding ``x/scale + offset`` is a matter of the last bits of float32.

    Args:
        x: The values.
        scale: The scale.
        offset: The offset.
        ulps: Up to how many units in the last place of the largest number involved.
    """
    ratio = x.double() / float(np.float32(scale))
    shifted = ratio + offset
    distance = (shifted - shifted.floor() - 0.5).abs()
    return distance <= ulps * 2.0**-23 * torch.maximum(ratio.abs(), shifted.abs()).clamp(min=1.0)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _noted(layers: Mapping[str, ExpectedLayer], calls: dict[str, list[Call]]) -> Iterator[None]:
    handles = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            call = Call(_kept(x), torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps)
            if isinstance(module, (nn.LSTM, nn.GRU)):
                hx = args[1] if len(args) > 1 else kwargs.get("hx")
                call.x = _time_first(module, call.x)
                call.state = _states(module, hx, call.x)
            calls.setdefault(name, []).append(call)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            call = calls[name][-1]
            if isinstance(module, (nn.LSTM, nn.GRU)):
                call.y = _time_first(module, _kept(output[0]))
                last = output[1] if isinstance(output[1], tuple) else (output[1],)
                call.last = tuple(_kept(part).reshape(call.state[0].shape) for part in last)
            else:
                call.y = _kept(output)

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(layer.module.register_forward_hook(after(name)))
            if layer.folds is not None:
                handles.append(layer.folds.register_forward_hook(after(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _time_first(module: nn.Module, x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x.unsqueeze(1)
    return x.transpose(0, 1) if cast(Any, module).batch_first else x


def _states(module: nn.Module, hx: Any, x: Tensor) -> tuple[Tensor, ...]:
    shape = (1, x.shape[1], cast(int, cast(Any, module).hidden_size))
    count = 2 if isinstance(module, nn.LSTM) else 1
    if hx is None:
        return tuple(torch.zeros(shape) for _ in range(count))
    return tuple(_kept(part).reshape(shape) for part in (hx if isinstance(hx, (tuple, list)) else (hx,)))


def _kept(tensor: Tensor) -> Tensor:
    """Return a copy: what follows may change the tensor in place."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
