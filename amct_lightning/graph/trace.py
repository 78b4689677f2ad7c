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
        self._operators += 1
        read = [self._value(tensor) for tensor in _tensors((args, kwargs))]
        alone = self._inside or self._inside_node
        key = None if alone else node_key(func, args, kwargs, lambda tensor: self._look(tensor)[1])
        made, value = self._made.get(key), self._seen_through(func, args, kwargs)
        if made is None and value is None:
            reader = self._inside[0] if self._inside else self._operators
            for given in read:
                self._read_as.get(id(given), given).read_by(reader)
        output = func(*args, **kwargs)
        tensors = _tensors(output)
        if made is None:
            made = [(value or Value(producer(func, args)), self._count()) for _ in tensors]
        for tensor, seen in zip(tensors, made, strict=True):
            self._bind(tensor, *seen, rises=self._rises(func, args))
        if key is not None:
            self._made[key] = made
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
            value = Value(func)
        self._bind(tensor, value, self._count())

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
            seen = [self._seen.get((id(p), _version(p))) for p in parameters]
            if any(found[0].readers - {name} for found in seen if found is not None):
                self.trace.read_from_outside.add(name)

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
