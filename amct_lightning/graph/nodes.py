"""Which operators are nodes of the graph that an exporter makes of a model, as AMCT has it made.

AMCT decides on that graph what shares a quantizer and what a ReLU made. The exporter leaves operators out that
change no number, joins transpositions that cancel, and keeps one of two equal operators on one value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ATEN = torch.ops.aten

RELU = (_ATEN.relu.default, _ATEN.relu_.default)
"""The operators that are the node ``Relu``."""

_THRESHOLD = (_ATEN.threshold.default, _ATEN.threshold_.default)
_SAME_VALUE = (_ATEN.alias.default, _ATEN.clone.default, _ATEN.detach.default, _ATEN.lift_fresh.default)
_NEUTRAL = {_ATEN.add.Tensor: 0, _ATEN.sub.Tensor: 0, _ATEN.mul.Tensor: 1}
_WHOLE_AXIS = (0, 2**63 - 1)

# Functions that may return their argument itself, so that no operator is seen, but are nodes of an exported graph.
_FLATTEN = (torch.flatten, Tensor.flatten)
_CASTS = (Tensor.to, Tensor.type)
_CAST_TO = (torch.dtype, torch.device, str, Tensor)
_NODES = (Tensor.float, Tensor.cpu)


class VisibleNodes(TorchFunctionMode):
    """Let a node of the exported graph make a new value also where it returns its argument or an alias of it.

    Args:
        replace: Notes that a function has returned a tensor as it is, and the function if that is a node; whoever reads
            the tensor from now on reads what the function made of it.

    Example:
        >>> x = torch.ones(1)
        >>> with VisibleNodes(lambda *_: None):
        ...     x.float() is x, x[:1] is x
        (False, False)
    """

    def __init__(self, replace: Callable[[Tensor, Any], None]) -> None:
        super().__init__()
        self.replace = replace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if func is Tensor.__getitem__ and result.shape == args[0].shape:  # x[:4] of length 4; x[:] is no node
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            ends = [part.stop for part in parts if isinstance(part, slice)]
            return result.view(result.shape) if any(end is not None for end in ends) else result
        if not args or result is not args[0]:
            return result
        casts = func in _CASTS and any(isinstance(arg, _CAST_TO) for arg in (*args[1:], *kwargs.values()))
        if func in _NODES or casts:
            return result.view(result.shape)
        self.replace(result, func if func in _FLATTEN else None)
        return result


@dataclass
class Value:
    """One tensor value of the observed forward.

    Attributes:
        producer: Operator that made it, as :func:`producer` calls it; ``None`` for a model input or parameter.
        from_layer: Name of the watched layer whose output it is, if any.
        readers: Who read it: the name of a watched layer or BatchNorm module, or else a running number of the
            reading operator.
        transposed: Of a transposed value the value with its axes in their first order, which of those axes each of
            its own is, and the number of the transposing operator. It reads that value only if somebody reads this
            one: what transposes back takes the first value.
        nonnegative: Whether it is known to have no negative element, see ``graph/nonnegative.py``.
    """

    producer: Any = None
    from_layer: str | None = None
    readers: set[str | int] = field(default_factory=set)
    transposed: tuple[Value, tuple[int, ...], int] | None = None
    nonnegative: bool = False

    def read_by(self, reader: str | int) -> None:
        """Note who has read it."""
        self.readers.add(reader)
        if self.transposed is not None:
            origin, _, number = self.transposed
            origin.readers.add(number)

    def transpose(self, order: tuple[int, ...], number: int) -> Value:
        """Return the value with its axes in another order; that may be a value that there is already.

        Args:
            order: Which of its axes each axis of the result is.
            number: The number of the operator.
        """
        identity, origin = tuple(range(len(order))), self
        if order == identity:
            return self
        if self.transposed is not None:
            origin, first, _ = self.transposed
            order = tuple(first[axis] for axis in order)
        if order == identity:
            return origin
        return Value(_ATEN.permute.default, transposed=(origin, order, number), nonnegative=self.nonnegative)


def producer(func: Any, args: tuple[Any, ...]) -> Any:
    """Return the operator that is noted as having made a value: that of the node it is exported as.

    Args:
        func: The operator.
        args: Its positional arguments.

    Example:
        >>> producer(torch.ops.aten.threshold.default, (torch.ones(1), 0, 0.0))
        <OpOverload(op='aten.relu', overload='default')>
    """
    return _ATEN.relu.default if func in _THRESHOLD and tuple(args[1:3]) == (0, 0) else func


def is_same_value(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operator returns the numbers of its first argument and is no node of the exported graph.

    Besides copies these are ``x[:]`` and, with the constant as an integer, ``x + 0``, ``x - 0`` and ``x * 1``.

    Args:
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Example:
        >>> x = torch.ones(1)
        >>> is_same_value(torch.ops.aten.sub.Tensor, (x, 0), {}), is_same_value(torch.ops.aten.sub.Tensor, (x, 0.0), {})
        (True, False)
    """
    if func in _SAME_VALUE:
        return True
    if func in _NEUTRAL:
        return type(args[1]) is int and args[1] == _NEUTRAL[func] and not kwargs and args[0].is_floating_point()
    return func is _ATEN.slice.Tensor and len(args) == 4 and (args[2] or 0, args[3]) == _WHOLE_AXIS


def permutation(func: Any, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Return which axis of its argument each axis of the result of a transposition is.

    Args:
        func: The operator.
        args: Its positional arguments.

    Returns:
        The axes, or ``None`` if the operator does anything else than to order them anew.

    Example:
        >>> permutation(torch.ops.aten.transpose.int, (torch.ones(1, 2, 3), 1, -1))
        (0, 2, 1)
    """
    if func is _ATEN.permute.default:
        return tuple(axis % args[0].dim() for axis in args[1])
    if func is _ATEN.t.default:
        return tuple(reversed(range(args[0].dim())))
    if func is not _ATEN.transpose.int or not args[0].dim():
        return None
    axes = list(range(args[0].dim()))
    axes[args[1]], axes[args[2]] = axes[args[2]], axes[args[1]]
    return tuple(axes)


def node_key(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: Callable[[Tensor], int]) -> Hashable:
    """Return what equal operators on equal values have in common.

    Args:
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        name: Gives the same number to tensors of one value.

    Returns:
        Something to compare, or ``None`` if two such operators are two nodes: they are random, write into their
        argument, or read no tensor.

    Example:
        >>> x, relu = torch.ones(1), torch.ops.aten.relu.default
        >>> node_key(relu, (x,), {}, id) == node_key(relu, (x,), {}, id)
        True
    """
    if func.namespace != "aten" or func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    read: list[int] = []

    def note(tensor: Tensor) -> tuple[str, int]:
        read.append(name(tensor))
        return ("value", read[-1])

    key = (func, _hashable((args, dict(kwargs)), note))
    return key if read else None


def is_own_node(module: nn.Module) -> bool:
    """Tell whether a module is one of torch without parts, each call of which is a node of its own in AMCT's graph.

    Args:
        module: The module.

    Example:
        >>> is_own_node(nn.ReLU()), is_own_node(nn.Sequential(nn.ReLU()))
        (True, False)
    """
    return type(module).__module__.startswith("torch.nn.") and not module._modules


def _hashable(tree: Any, note: Callable[[Tensor], Hashable]) -> Hashable:
    if isinstance(tree, Tensor):
        return note(tree)
    if isinstance(tree, (list, tuple)):
        return tuple(_hashable(part, note) for part in tree)
    if isinstance(tree, dict):
        return tuple((key, _hashable(part, note)) for key, part in tree.items())
    # 1, 1.0 and True are different constants; what cannot be compared equals only itself
    return (type(tree), tree if isinstance(tree, Hashable) else id(tree))
