"""One node per quantized layer: what stands for a layer while the rest of the model is translated into ONNX.

Both exporters of torch see a call of a quantized layer as one operator of a domain of our own, which has the number of
the call. Neither weights nor quantizers pass through them; ``forms/`` puts these into the place of the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.modules.layers import QATLayer

DOMAIN = "amct_lightning"
OPERATOR = "Layer"


@dataclass(frozen=True)
class LayerCall:
    """One call of a quantized layer in the forward that is traced.

    Attributes:
        name: Name of the layer.
        layer: The layer.
        rank: Number of axes of its input.
        output_padding: For transposed convolutions, what it adds to the size of the output at the end of each axis.
        shapes: Shapes of the outputs, known once TorchScript has traced it.
    """

    name: str
    layer: QATLayer
    rank: int
    output_padding: tuple[int, ...] = ()
    shapes: list[tuple[int, ...]] = field(default_factory=list)


_calls: ContextVar[list[LayerCall]] = ContextVar("calls of quantized layers in the forward that is traced")


# These three have real values, so that a model that looks at them takes the branch that it takes otherwise.
@torch.library.custom_op("amct_lightning::traced_layer", mutates_args=())
def _traced_layer(x: Tensor, call: int) -> Tensor:
    (output,) = _seen(call, (_run(_calls.get()[call], x),))
    return output


@torch.library.custom_op("amct_lightning::traced_lstm", mutates_args=())
def _traced_lstm(x: Tensor, h: Tensor, c: Tensor, call: int) -> tuple[Tensor, Tensor, Tensor]:
    output, (last_h, last_c) = _calls.get()[call].layer.float_forward(x, (h, c))
    return cast("tuple[Tensor, Tensor, Tensor]", _seen(call, (output, last_h, last_c)))


@torch.library.custom_op("amct_lightning::traced_gru", mutates_args=())
def _traced_gru(x: Tensor, h: Tensor, call: int) -> tuple[Tensor, Tensor]:
    output, last = _calls.get()[call].layer.float_forward(x, h)
    return cast("tuple[Tensor, Tensor]", _seen(call, (output, last)))


def _seen(call: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Note the shapes of outputs, and return tensors that share no memory with the inputs, as operators must."""
    _calls.get()[call].shapes[:] = [tuple(output.shape) for output in outputs]
    return tuple(output.clone() for output in outputs)


@contextmanager
def placeholders(layers: Mapping[str, QATLayer], symbolic: bool, static: bool = True) -> Iterator[Sequence[LayerCall]]:
    """Let quantized layers be traced as single operators.

    Args:
        layers: Name -> layer. They are changed for the time being.
        symbolic: Whether the exporter that is built on ``torch.export`` traces them, and not that of TorchScript.
        static: Whether all axes have the lengths that are traced.

    Yields:
        The calls; the attribute ``call`` of a node is the number of one.
    """
    calls: list[LayerCall] = []
    token = _calls.set(calls)
    for name, layer in layers.items():
        layer.forward = _stand_in(name, layer, symbolic)  # type: ignore[method-assign]
    try:
        with _torchscript_nodes(static):
            yield calls
    finally:
        _calls.reset(token)
        for layer in layers.values():
            del layer.forward


def _stand_in(name: str, layer: QATLayer, symbolic: bool) -> Callable[..., Any]:
    kind = LAYER_TYPES[supported_class(layer)]
    if kind.gates:
        return lambda input, hx=None: _recurrent(name, layer, input, hx, symbolic)
    if kind.transposed:
        return lambda input, output_size=None: _plain(
            LayerCall(name, layer, input.dim(), _output_padding(layer, input, output_size)), input, symbolic
        )
    return lambda input: _plain(LayerCall(name, layer, input.dim()), input, symbolic)


def _plain(call: LayerCall, x: Tensor, symbolic: bool) -> Tensor:
    number = _noted(call)
    return _node((x,), number, (_run(call, x).shape,))[0] if symbolic else cast(Tensor, _traced_layer(x, number))


def _recurrent(name: str, layer: Any, x: Tensor, hx: Any, symbolic: bool) -> tuple[Tensor, Any]:
    if x.dim() != 3:
        raise ValueError(
            f"Layer '{name}' gets an input of {x.dim()} axes. The hardware runs recurrent layers on batches only: give "
            "it (time, batch, features), or leave it in float (skip_layers)."
        )
    parts = 2 if isinstance(layer, nn.LSTM) else 1
    if hx is None:
        zeros = x.new_zeros(1, x.shape[0 if layer.batch_first else 1], layer.hidden_size)
        hx = (zeros,) * parts
    state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    number = _noted(LayerCall(name, layer, x.dim()))
    if symbolic:
        shapes = [(*x.shape[:2], layer.hidden_size), *(part.shape for part in state)]
        outputs: Sequence[Tensor] = _node((x, *state), number, shapes)
    else:
        outputs = (_traced_lstm if parts > 1 else _traced_gru)(x, *state, number)
    output, *last = outputs
    return output, tuple(last) if parts > 1 else last[0]


def _noted(call: LayerCall) -> int:
    calls = _calls.get()
    calls.append(call)
    return len(calls) - 1


def _node(inputs: tuple[Tensor, ...], call: int, shapes: Sequence[Any]) -> Sequence[Tensor]:
    """Return the outputs of a node that ``torch.export`` keeps and the exporter on it writes as it is."""
    types = [inputs[0].dtype] * len(shapes)
    attributes: Any = {"call": call}
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{OPERATOR}", inputs, attributes, dtypes=types, shapes=[tuple(shape) for shape in shapes], version=1
    )


def _run(call: LayerCall, x: Tensor) -> Tensor:
    """Run the float layer: for its values, or only for the shape of its output."""
    if not call.output_padding:
        return cast(Tensor, call.layer.float_forward(x))
    layer: Any = call.layer
    operate = getattr(torch.nn.functional, f"conv_transpose{len(call.output_padding)}d")
    settings = (layer.stride, layer.padding, call.output_padding, layer.groups, layer.dilation)
    return cast(Tensor, operate(x, layer.weight, layer.bias, *settings))


def _output_padding(layer: Any, x: Tensor, output_size: Any) -> tuple[int, ...]:
    dims = len(layer.kernel_size)
    size = None if output_size is None else [int(length) for length in output_size]
    settings = (layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation)
    return tuple(int(padding) for padding in layer._output_padding(x, size, *settings))


@contextmanager
def _torchscript_nodes(static: bool) -> Iterator[None]:
    """Tell the TorchScript exporter what to make of our operators."""
    onnx: Any = torch.onnx
    outputs = {"traced_layer": 1, "traced_lstm": 3, "traced_gru": 2}
    for name, number in outputs.items():
        onnx.register_custom_op_symbolic(f"amct_lightning::{name}", _torchscript_node(number, static), 1)
    try:
        yield
    finally:
        for name in outputs:
            onnx.unregister_custom_op_symbolic(f"amct_lightning::{name}", 1)


def _torchscript_node(outputs: int, static: bool) -> Callable[..., Any]:
    def node(graph: Any, *arguments: Any) -> Any:
        *inputs, number = arguments
        call = int(number.node().t("value"))
        made = graph.op(f"{DOMAIN}::{OPERATOR}", *inputs, call_i=call, outputs=outputs)
        values = (made,) if outputs == 1 else made
        for value, shape in zip(values, _calls.get()[call].shapes, strict=True):
            value.setType(inputs[0].type().with_sizes(list(shape) if static else [None] * len(shape)))
        return made

    return node
