"""Faults to plant in the recorded exports: each changes one thing of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Fault = tuple[str, str, Callable[[ModelProto], None]]
"""Layer, what is wrong, and what makes it wrong."""

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
RECURRENT = ("BasicLSTMInplaceFillWindowCache", "BasicGRUInplaceFillWindowCache", "LSTM", "GRU")


def node(model: ModelProto, name: str) -> NodeProto:
    return next(item for item in model.graph.node if item.name == name)


def array(model: ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(tensor(model, name)).copy()


def tensor(model: ModelProto, name: str) -> TensorProto:
    found = next((item for item in model.graph.initializer if item.name == name), None)
    if found is None:
        made = next(item for item in model.graph.node if name in item.output)
        if made.op_type == "Cast":
            return tensor(model, made.input[0])
        return made.attribute[0].t
    return found


def set_array(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    found = tensor(model, name)
    found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found).copy()), found.name))


def one_more(place: int, step: float = 1) -> Callable[[np.ndarray], np.ndarray]:
    """One number is another one by a step; at an end of its type, in the other direction."""

    def change(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(-1)
        flat[place % flat.size] += -step if flat[place % flat.size] >= 100 else step
        return values

    return change


def lowest_bit(place: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(-1)
        flat[place % flat.size] ^= 1
        return values

    return change


def swapped_axes(model: ModelProto, reader: str, place: int = 0) -> None:
    """Swap the last two axes of what a node reads."""
    before = node(model, reader)
    rank = ranks(model)[before.input[place]]
    order = [*range(rank - 2), rank - 1, rank - 2]
    name = f"{reader}.swapped"
    added = helper.make_node("Transpose", [before.input[place]], [name], name, perm=order)
    before.input[place] = name
    model.graph.node.insert(list(model.graph.node).index(before), added)


_RANKS: dict[str, dict[str, int]] = {}


def ranks(model: ModelProto) -> dict[str, int]:
    """The number of axes of every tensor, from one run of the deploy model."""
    return _RANKS[model.graph.name]


def remember_ranks(model: ModelProto, found: dict[str, int]) -> None:
    _RANKS[model.graph.name] = found


def layers(model: ModelProto) -> list[str]:
    """The quantized layers: recurrent ones, and products whose sums are dequantized."""
    names = {item.name.replace("fakedequant.mul", "dequant") for item in model.graph.node}
    return [
        item.name
        for item in model.graph.node
        if item.op_type in RECURRENT or (item.op_type in PRODUCTS and f"{item.name}.dequant" in names)
    ]


def deploy_faults(model: ModelProto) -> Iterator[Fault]:
    """One weight code, offset, dequantization parameter, bias and axis wrong, in every layer."""
    quantizers: dict[str, str] = {}
    for name in layers(model):
        layer = node(model, name)
        if layer.op_type in RECURRENT:
            yield from recurrent_faults(model, layer)
            continue
        owner = quantizers.setdefault(layer.input[0], name)
        quant = layer.input[0].removesuffix(".output0")
        yield name, "weight code", lambda m, w=layer.input[1]: set_array(m, w, one_more(7))
        yield name, "dequant parameter", lambda m, n=name: set_array(m, f"{n}.dequant.param", lowest_bit(3))
        yield name, "dequant parameter above the scale", lambda m, n=name: set_array(m, f"{n}.dequant.param", high_bit)
        if len(layer.input) > 2:
            yield name, "bias", lambda m, b=layer.input[2]: set_array(m, b, one_more(1))
        yield owner, "offset", lambda m, q=quant: one_offset(node(m, q), "offset")
        yield owner, "scale", lambda m, q=quant: one_offset(node(m, q), "scale", 1e-4)
        yield owner, "swapped axis before the quantizer", lambda m, q=quant: swapped_axes(m, q)
        yield name, "swapped axis of the codes", lambda m, n=name: swapped_axes(m, n)
        yield name, "swapped axis of the sums", lambda m, n=name: swapped_axes(m, f"{n}.dequant")
        if layer.op_type in ("Gemm", "MatMul"):
            yield name, "transposed weight", lambda m, w=layer.input[1]: set_array(m, w, lambda a: a.T.copy())
    yield from float_faults(model)


def float_faults(model: ModelProto) -> Iterator[Fault]:
    for item in model.graph.node:
        bias = next((name for name in item.input if name.endswith("sub_module.bias")), None)
        if item.op_type == "Add" and bias is not None:
            yield bias.removesuffix(".sub_module.bias"), "bias", lambda m, b=bias: set_array(m, b, one_more(1, 0.01))


def a_little_more(values: np.ndarray) -> np.ndarray:
    return (values * 1.0001).astype(np.float32)


def high_bit(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[0] |= np.uint64(1 << 33)
    return values


def one_offset(item: NodeProto, name: str, by: float = 1.0) -> None:
    attribute = next(found for found in item.attribute if found.name == name)
    attribute.f = attribute.f * (1 + by) if name == "scale" else attribute.f + (by if attribute.f < 0 else -by)


def recurrent_faults(model: ModelProto, layer: NodeProto) -> Iterator[Fault]:
    lstm, name = "LSTM" in layer.op_type, layer.name
    bias, parameter = (layer.input[i] for i in ((5, 8) if lstm else (4, 7)))
    yield name, "weight code", lambda m: set_array(m, layer.input[1], one_more(7))
    yield name, "recurrent weight code", lambda m: set_array(m, layer.input[2], one_more(9))
    yield name, "bias", lambda m: set_array(m, bias, one_more(-1))
    yield name, "dequant parameter", lambda m: set_array(m, parameter, lowest_bit(2))
    yield name, "dequant parameter of h", lambda m: set_array(m, parameter, lowest_bit(-1))
    yield name, "offset", lambda m: one_offset(node(m, name), "quant_offset_x")
    yield name, "offset of h", lambda m: one_offset(node(m, name), "quant_offset_h")
    yield name, "swapped axis", lambda m: swapped_axes(m, name)
    yield name, "swapped axis of the initial state", lambda m: swapped_axes(m, name, 3)


def fake_quant_faults(model: ModelProto) -> Iterator[Fault]:
    """The same in a fake-quant model."""
    for name in layers(model):
        layer = node(model, name)
        if layer.op_type in RECURRENT:
            for place, what in ((1, "weight"), (2, "recurrent weight"), (3, "bias")):
                yield name, what, lambda m, t=layer.input[place]: set_array(m, t, one_more(5, 0.01))
        else:
            yield name, "weight code", lambda m, w=layer.input[1]: set_array(m, w, one_more(7))
            scale = f"{name}.fakedequant.dqscale.output0"
            yield (
                name,
                "scale of the sums",
                lambda m, s=scale: set_array(m, s, a_little_more),
            )
            if len(layer.input) > 2:
                yield name, "bias", lambda m, b=layer.input[2]: set_array(m, b, one_more(1))
        quant = f"{name}.quant.fakequant"
        if any(item.name == f"{quant}.mul" for item in model.graph.node):
            yield name, "offset", lambda m, q=quant: set_array(m, f"{q}.offset.output0", lambda a: a + np.float32(1))
            yield name, "swapped axis", lambda m, q=quant: swapped_axes(m, f"{q}.mul")
    yield from float_faults(model)
