"""Observed forwards: which module produced each tensor, and who read it.

The model runs as it is, on one input. A dispatch mode sees every operator and module hooks see every call,
so Python control flow, keyword arguments and functional code need no special treatment. Tensors are identified by
object and version, so an in-place operation makes a new value.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode  # the documented way to write a dispatch mode
from torch.utils._pytree import tree_leaves

from amct_lightning.graph.float_parts import FloatParts
from amct_lightning.graph.nodes import Value, is_own_node, is_same_value, node_key, permutation, producer
from amct_lightning.graph.tensors import tensors_in
from amct_lightning.quantizers.base import in_backward

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BATCH_FIRST = (1, 0, 2)


@dataclass
class Call:
    """One call of a watched layer.

    Attributes:
        name: Name of the layer.
        input: The value it read.
        input_type: Class of its input.
        input_dims: Rank of its input.
        hidden: The value of the initial hidden state that a recurrent layer was given.
        output: The value it returned.
    """

    name: str
    input: Value
    input_type: type
    input_dims: int
    hidden: Value | None = None
    output: Value | None = None


@dataclass
class Trace:
    """What the observed forward saw.

    Attributes:
        calls: Calls of the watched layers in order of execution.
        batch_norm_calls: How often each BatchNorm module was called, by name.
        read_from_outside: Names of the watched layers whose parameters were read by other code than their own.
        in_training: Calls of the watched layers on the path that training takes; ``None`` if that was not seen.
        float_operators: Kinds of the products, softmax and norms that belong to no module with parameters.
        float_modules: Name -> class name of the other modules with parameters that were used.
    """

    calls: list[Call] = field(default_factory=list)
    batch_norm_calls: dict[str, int] = field(default_factory=dict)
    read_from_outside: set[str] = field(default_factory=set)
    in_training: list[Call] | None = None
    float_operators: list[str] = field(default_factory=list)
    float_modules: dict[str, str] = field(default_factory=dict)


class Observer(TorchDispatchMode):
    """Notes, while it is entered, which value each operator reads and makes, and which watched layer runs.

    Attributes:
        trace: What it has seen.
        float_parts: Notes what else computes.
    """

    def __init__(self, float_parts: FloatParts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.float_parts = float_parts
        self._values: dict[tuple[int, int], Value] = {}
        self._alive: list[Tensor] = []  # an id is unique only as long as its tensor lives
        self._inside: list[str] = []
        self._inside_node = 0
        self._read_as: dict[int, Value] = {}  # how the layer that runs reads its input
        self._open_calls: dict[str, list[Call]] = {}
        self._operators = 0
        self._nodes: dict[Hashable, tuple[list[Value], list[Value]]] = {}  # with what they read, or ids would be reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if in_backward():  # of gradients that the model takes itself; they are no part of its data flow
            return func(*args, **kwargs)
        self._operators += 1
        read = [self._value(tensor) for tensor in _tensors((args, kwargs))]
        values, key = self._without_node(func, args, kwargs)
        if values is None:
            for value in read:
                reader = self._inside[0] if self._inside else self._operators
                self._read_as.get(id(value), value).read_by(reader)
        output = func(*args, **kwargs)
        tensors = _tensors(output)
        values = values or [Value(producer(func, args)) for _ in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            self._bind(tensor, value, in_place=func._schema.is_mutable)
        if key is not None:
            self._nodes[key] = (read, values)
        if not self._inside:
            self.float_parts.see(func._schema.name, _tensors((args, kwargs)), tensors)
        return output

    def _without_node(self, func: Any, args: Any, kwargs: Any) -> tuple[list[Value] | None, Hashable]:
        """Return what an operator makes if it is no new node that reads something, and what it is known by."""
        if is_same_value(func, args, kwargs):
            return [self._value(args[0])], None
        if self._inside or self._inside_node:
            return None, None
        key = node_key(func, args, kwargs, lambda tensor: id(self._value(tensor)))
        if key in self._nodes:
            return self._nodes[key][1], None
        order = permutation(func, args)
        return (None if order is None else [self._value(args[0]).transpose(order, self._operators)]), key

    def replace(self, tensor: Tensor, func: Any) -> None:
        """Note that a tensor is what a node made of it: whoever reads it from now on reads that node."""
        self._operators += 1
        self._value(tensor).read_by(self._operators)
        self._bind(tensor, Value(func))

    @contextmanager
    def watching(self, model: nn.Module, run: nn.Module, watched: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hook the watched layers and other modules that count during a block.

        Args:
            model: The model whose module names are used.
            run: The module that is called, which contains it.
            watched: The layers of interest, by name.
        """
        handles = [handle for name, layer in watched.items() for handle in self._watch_layer(name, layer)]
        for name, module in model.named_modules():
            if issubclass(getattr(module, "cls_to_become", None) or type(module), _BATCH_NORM):
                handles += self._watch_batch_norm(name, module)
        handles += [handle for module in run.modules() if is_own_node(module) for handle in self._watch_node(module)]
        handles += _around(model, self.float_parts.enter, self.float_parts.leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch_node(self, module: nn.Module) -> list[Any]:
        def step(number: int) -> None:
            self._inside_node += number

        return _around(module, lambda *_: step(1), lambda *_: step(-1))

    def _watch_layer(self, name: str, layer: nn.Module) -> list[Any]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args else kwargs.get("input")
            read = next(iter(tensors_in([given, args, kwargs])), None)
            value, dims = (Value(), 0) if read is None else (self._value(read), read.dim())
            if getattr(layer, "batch_first", False) and dims == len(_BATCH_FIRST):
                self._operators += 1
                given_as, value = value, value.transpose(_BATCH_FIRST, self._operators)  # exported along the first axis
                self._read_as = {id(given_as): value}
            call = Call(name, value, type(given), dims)
            hidden = tensors_in(args[1] if len(args) > 1 else kwargs.get("hx"))
            call.hidden = self._value(hidden[0]) if hidden else None
            self.trace.calls.append(call)
            self._open_calls.setdefault(name, []).append(call)
            self._inside.append(name)

        def leave(_: nn.Module, _args: Any, output: Any) -> None:
            self._inside.pop()
            self._read_as = {}
            call = self._open_calls[name].pop()
            tensors = tensors_in(output)
            if tensors:
                call.output = self._value(tensors[0])
                call.output.from_layer = name

        return _around(layer, enter, leave)

    def _watch_batch_norm(self, name: str, module: nn.Module) -> list[Any]:
        def enter(_: nn.Module, _args: Any, _kwargs: Any) -> None:
            calls = self.trace.batch_norm_calls
            calls[name] = calls.get(name, 0) + 1
            self._inside.append(name)

        def leave(_: nn.Module, _args: Any, _output: Any) -> None:
            self._inside.pop()

        return _around(module, enter, leave)

    def read_by_user(self, output: Any) -> None:
        """Count the model's output as read, so that nothing folded into another layer disappears from it."""
        for tensor in tensors_in(output):
            self._value(tensor).read_by("output")

    def find_outside_readers(self, watched: Mapping[str, nn.Module]) -> None:
        """Note whose parameters other code has read, for example ``F.linear(x, layer.weight)``."""
        for name, layer in watched.items():
            parameters = [p for p in layer.parameters(recurse=False) if not is_lazy(p)]
            values = [self._values.get((id(p), _version(p))) for p in parameters]
            if any(value.readers - {name} for value in values if value is not None):
                self.trace.read_from_outside.add(name)

    def find_float_parts(self, model: nn.Module) -> None:
        """Note what else computed in float; that of a BatchNorm may be folded into the layer before it."""
        kinds = {name: type(model.get_submodule(name)).__name__ for name in self.trace.batch_norm_calls}
        self.trace.float_operators = self.float_parts.operators
        self.trace.float_modules = self.float_parts.modules | kinds

    def _value(self, tensor: Tensor) -> Value:
        return self._values.get((id(tensor), _version(tensor))) or self._bind(tensor, Value())

    def _bind(self, tensor: Tensor, value: Value, in_place: bool = False) -> Value:
        self._values[id(tensor), _version(tensor)] = value
        if in_place:  # the version of the argument rises only after this mode has returned
            self._values[id(tensor), _version(tensor) + 1] = value
        self._alive.append(tensor)
        return value


def _around(module: nn.Module, enter: Any, leave: Any) -> list[Any]:
    """Hook ``enter`` and ``leave`` directly around the module's own forward, inside of all its other hooks."""
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        # Called also if the forward raises, which the model may catch.
        module.register_forward_hook(leave, prepend=True, always_call=True),
    ]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
