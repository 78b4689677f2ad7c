"""Observed forwards: which module produced each tensor, and who read it.

The model runs as it is, on one input. A dispatch mode sees every operator and module hooks see every call,
so Python control flow, keyword arguments and functional code need no special treatment. Tensors are identified by
object and version, so an in-place operation makes a new value.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode  # the documented way to write a dispatch mode

from amct_lightning.graph.float_parts import FloatParts
from amct_lightning.graph.nodes import Value, is_own_node, is_same_value, node_key, permutation, producer
from amct_lightning.graph.nonnegative import result_is_never_negative
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


def calls_by_name(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """Return the calls of each layer, the layers in the order of their first call."""
    named: dict[str, list[Call]] = {}
    for call in calls:
        named.setdefault(call.name, []).append(call)
    return named


@dataclass
class Trace:
    """What the observed forward saw.

    Attributes:
        calls: Calls of the watched layers in order of execution.
        batch_norm_calls: How often each BatchNorm module was called, by name.
        read_from_outside: Names of the watched layers whose parameters were read by other code than their own.
        in_training: Calls of the watched layers on the path that training takes; ``None`` if that was not seen.
        training_error: The error for which that path was not seen although it was looked for.
        trained: Names of the layers that training reaches, in any process; ``None`` if that was not looked for.
        float_operators: Kinds of the products, softmax and norms that belong to no module with parameters.
        float_modules: Name -> class name of the other modules with parameters that were used.
    """

    calls: list[Call] = field(default_factory=list)
    batch_norm_calls: dict[str, int] = field(default_factory=dict)
    read_from_outside: set[str] = field(default_factory=set)
    in_training: list[Call] | None = None
    training_error: str | None = None
    trained: set[str] | None = None
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
        # By id and version the value of a tensor, and a number that only equal operators give alike: the exporter looks
        # for these before it leaves any out, so there ``x`` and ``x[:]`` are two.
        self._seen: dict[tuple[int, int], tuple[Value, int]] = {}
        self._made: dict[Hashable, list[tuple[Value, int]]] = {}
        self._alive: list[Tensor] = []  # an id is unique only as long as its tensor lives
        self._inside: list[str] = []
        self._inside_node = 0
        self._read_as: dict[int, Value] = {}  # how the layer that runs reads its input
        self._open_calls: dict[str, list[Call]] = {}
        self._operators = self._numbered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if in_backward():  # of gradients that the model takes itself; they are no part of its data flow
            return func(*args, **kwargs)
        self._operators += 1
        given = _tensors((args, *kwargs.values()))
        read = [self._value(tensor) for tensor in given]
        alone = self._inside or self._inside_node
        key = None if alone else node_key(func, args, kwargs, lambda tensor: self._look(tensor)[1])
        made, value = self._made.get(key), self._seen_through(func, args, kwargs)
        if made is None and value is None:
            reader = self._inside[0] if self._inside else self._operators
            for seen in read:
                self._read_as.get(id(seen), seen).read_by(reader)
        output = func(*args, **kwargs)
        tensors = _tensors(output)
        if made is None:
            nonnegative = value is None and result_is_never_negative(func, args, kwargs, self._value)
            made = [(value or Value(producer(func, args), nonnegative=nonnegative), self._count()) for _ in tensors]
        rises = self._rises(func, args)
        for tensor, numbered in zip(tensors, made, strict=True):
            self._bind(tensor, *numbered, rises=rises)
        if key is not None:
            self._made[key] = made
        if not self._inside:
            self.float_parts.see(func._schema.name, given, tensors)
        return output

    def _rises(self, func: Any, args: Any) -> int:
        """Return by how much the version of what an operator returns will rise once this mode has returned."""
        returns = func._schema.returns
        if func._schema.is_mutable or not returns or returns[0].alias_info is None:
            return int(func._schema.is_mutable)
        return _version(args[0])  # a view has the version of what it shows

    def _seen_through(self, func: Any, args: Any, kwargs: Any) -> Value | None:
        """Return what an operator makes if it reads nothing, because the exporter leaves it out or may do so."""
        if is_same_value(func, args, kwargs):
            return self._value(args[0])
        order = None if self._inside else permutation(func, args)
        return None if order is None else self._value(args[0]).transpose(order, self._operators)

    def replace(self, tensor: Tensor, func: Any) -> None:
        """Note that a function has returned a tensor as it is; ``None`` stands for one that is no node."""
        value = self._value(tensor)
        if func is not None:
            self._operators += 1
            value.read_by(self._operators)
            value = Value(func, nonnegative=value.nonnegative)
        self._bind(tensor, value, self._count())

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
            seen = [self._seen.get((id(p), _version(p))) for p in parameters]
            if any(found[0].readers - {name} for found in seen if found is not None):
                self.trace.read_from_outside.add(name)

    def find_float_parts(self, model: nn.Module) -> None:
        """Note what else computed in float; that of a BatchNorm may be folded into the layer before it."""
        kinds = {name: type(model.get_submodule(name)).__name__ for name in self.trace.batch_norm_calls}
        self.trace.float_operators = self.float_parts.operators
        self.trace.float_modules = self.float_parts.modules | kinds

    def _value(self, tensor: Tensor) -> Value:
        return self._look(tensor)[0]

    def _look(self, tensor: Tensor) -> tuple[Value, int]:
        return self._seen.get((id(tensor), _version(tensor))) or self._bind(tensor, Value(), self._count())

    def _bind(self, tensor: Tensor, value: Value, number: int, rises: int = 0) -> tuple[Value, int]:
        for version in {_version(tensor), _version(tensor) + rises}:
            self._seen[id(tensor), version] = value, number
        self._alive.append(tensor)
        return value, number

    def _count(self) -> int:
        self._numbered += 1
        return self._numbered


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
    """Return the tensors that an operator takes or returns: they stand alone or in lists."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [tensor for part in tree for tensor in _tensors(part)]
    return []
