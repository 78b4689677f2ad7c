"""One observed forward: which module produced each tensor, and who read it.

The model runs once, as it is, on one input. A dispatch mode sees every operator and module hooks see every call,
so Python control flow, keyword arguments and functional code need no special treatment. Tensors are identified by
object and version, so an in-place operation makes a new value.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode  # the documented way to write a dispatch mode
from torch.utils._pytree import tree_leaves, tree_map_only

from amct_lightning.graph.nodes import Value, VisibleNodes, is_own_node, is_same_value, node_key, permutation, producer
from amct_lightning.graph.preserve import preserved
from amct_lightning.graph.tensors import tensors_in

InputData = Tensor | tuple[Any, ...] | Mapping[str, Any]

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
    """

    calls: list[Call] = field(default_factory=list)
    batch_norm_calls: dict[str, int] = field(default_factory=dict)
    read_from_outside: set[str] = field(default_factory=set)


def observe(model: nn.Module, watched: Mapping[str, nn.Module], run: nn.Module, input_data: InputData) -> Trace:
    """Run ``run`` once and note the data flow around the watched layers; leave no trace in the model.

    The one thing that stays are layers that only the first forward builds, such as :class:`torch.nn.LazyLinear`.

    Args:
        model: The model whose module names are used.
        watched: The layers of interest, by name.
        run: The module to call: ``model`` itself or one that contains it.
        input_data: A tensor, a tuple of positional arguments or a mapping of keyword arguments. Tensors that are
            on none of the model's devices are moved to that of its first parameter.

    Returns:
        The observed calls.

    Raises:
        RuntimeError: If the model fails on the input; the model's own error is the cause.
    """
    args, kwargs = _arguments(run, input_data)
    observer = _Observer()
    handles = [handle for name, layer in watched.items() for handle in observer.watch_layer(name, layer)] + [
        handle
        for name, module in model.named_modules()
        if issubclass(getattr(module, "cls_to_become", None) or type(module), _BATCH_NORM)
        for handle in observer.watch_batch_norm(name, module)
    ]
    handles += [handle for module in run.modules() if is_own_node(module) for handle in observer.watch_node(module)]
    try:
        with preserved(run), observer, VisibleNodes(observer.replace):
            output = run(*args, **kwargs)
        observer.read_by_user(output)
        observer.find_outside_readers(watched)
    except Exception as error:
        raise RuntimeError(
            f"{type(run).__name__} failed on the given input_data while its data flow was observed "
            f"({_describe(input_data)}): {type(error).__name__}: {error}. Give input_data with which the model's "
            f"forward runs: a tensor, a tuple of positional arguments or a dict of keyword arguments.{_hint(run)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return observer.trace


class _Observer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
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

    def watch_node(self, module: nn.Module) -> list[Any]:
        def step(number: int) -> None:
            self._inside_node += number

        return _around(module, lambda *_: step(1), lambda *_: step(-1))

    def watch_layer(self, name: str, layer: nn.Module) -> list[Any]:
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

    def watch_batch_norm(self, name: str, module: nn.Module) -> list[Any]:
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


def _arguments(run: nn.Module, input_data: InputData) -> tuple[tuple[Any, ...], dict[str, Any]]:
    devices = list(dict.fromkeys(p.device for p in run.parameters()))

    def move(tensor: Tensor) -> Tensor:
        return tensor if not devices or tensor.device in devices else tensor.to(devices[0])

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
