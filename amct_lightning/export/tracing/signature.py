"""The call of a model as a list of tensors in and a list of tensors out, which is all that ONNX knows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from amct_lightning.graph.forward import InputData


class FlatCall(nn.Module):
    """Calls a model with tensors only, and returns the tensors among its outputs.

    Numbers, text and ``None`` in the input are constants of the call.

    Args:
        model: The model.
        input_data: A tensor, a tuple of positional or a mapping of keyword arguments.

    Attributes:
        tensors: The tensors of the input, in their order.
        names: Their names: those of the arguments of ``forward``, with keys and positions of nested ones.
        output_names: After the first call, the names of the outputs.
        dropped: After the first call, what the outputs have besides tensors, for people.

    Example:
        >>> call = FlatCall(nn.Linear(2, 1), torch.ones(1, 2))
        >>> call.names, len(call(*call.tensors))
        (['input'], 1)
    """

    def __init__(self, model: nn.Module, input_data: InputData) -> None:
        super().__init__()
        self.run = model
        args, kwargs = _arguments(input_data)
        leaves, self._spec = pytree.tree_flatten_with_path((args, kwargs))
        self._leaves = [leaf for _, leaf in leaves]
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        parameters = list(inspect.signature(model.forward).parameters.values())
        self.names = _unique([_input_name(leaves[place][0], parameters) for place in self._places])
        self.output_names: list[str] = []
        self.dropped: list[str] = []

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the input."""
        return [self._leaves[place] for place in self._places]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self._take(self.run(*args, **kwargs))

    def _take(self, output: Any) -> tuple[Tensor, ...]:
        leaves, _ = pytree.tree_flatten_with_path(output)
        found = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
        others = [(path, leaf) for path, leaf in leaves if not isinstance(leaf, Tensor) and leaf is not None]
        self.dropped = [f"{_path_text(path) or 'output'} ({type(leaf).__name__})" for path, leaf in others]
        self.output_names = _unique([_path_text(path) or "output" for path, _ in found])
        return tuple(leaf for _, leaf in found)


def flat_tensors(input_data: InputData) -> list[Tensor]:
    """Return the tensors of an input in the order in which an exported network takes them.

    Args:
        input_data: A tensor, a tuple of positional or a mapping of keyword arguments.

    Example:
        >>> [tensor.shape for tensor in flat_tensors({"x": torch.ones(1, 2), "scale": 3})]
        [torch.Size([1, 2])]
    """
    leaves, _ = pytree.tree_flatten(_arguments(input_data))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def on_cpu(input_data: InputData) -> InputData:
    """Return an input with its tensors on the CPU, floating ones in float32."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().cpu()
        return leaf.float() if leaf.is_floating_point() else leaf

    moved: InputData = pytree.tree_map(move, input_data)
    return moved


def _arguments(input_data: InputData) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(input_data, Mapping):
        return (), dict(input_data)
    return (input_data if isinstance(input_data, tuple) else (input_data,)), {}


def _input_name(path: tuple[Any, ...], parameters: Sequence[inspect.Parameter]) -> str:
    kind, first, *rest = path
    if kind.idx == 1:  # a keyword argument
        return _path_text((first, *rest))
    named = first.idx < len(parameters) and parameters[first.idx].kind is not inspect.Parameter.VAR_POSITIONAL
    name = parameters[first.idx].name if named else f"input_{first.idx}"
    return "_".join([name, *([_path_text(tuple(rest))] if rest else [])])


def _path_text(path: tuple[Any, ...]) -> str:
    if len(path) == 1 and isinstance(path[0], pytree.SequenceKey):
        return f"output_{path[0].idx}"
    parts = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
    return "_".join(parts)


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        count = seen[name] = seen.get(name, -1) + 1
        unique.append(f"{name}_{count}" if count else name)
    return unique


def dynamic_shapes(
    dynamic_axes: Mapping[str, Any] | None, names: Sequence[str]
) -> tuple[tuple[dict[int, Any], ...]] | None:
    """Turn ``dynamic_axes`` as :func:`torch.onnx.export` knows them into the form that ``torch.export`` takes.

    Args:
        dynamic_axes: Name of an input or output -> its dynamic axes, with their names or as a list.
        names: Names of the inputs.
    """
    if not dynamic_axes:
        return None
    dims: dict[str, Any] = {}

    def of_input(name: str) -> dict[int, Any]:
        axes = dynamic_axes.get(name, {})
        named = axes if isinstance(axes, Mapping) else {axis: f"{name}_{axis}" for axis in axes}
        for text in map(str, named.values()):
            dims.setdefault(text, torch.export.Dim(_identifier(text)))
        return {axis: dims[str(text)] for axis, text in named.items()}

    return (tuple(of_input(name) for name in names),)


def _identifier(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)
