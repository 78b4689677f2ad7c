"""Batches to verify with: real ones from a file, cut as the exported network takes them, or random numbers."""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from amct_lightning.commands.base import UserError
from amct_lightning.graph.forward import InputData
from amct_lightning.wording import abbreviated

MOST = 32
"""How many samples go into a batch for a network that takes any number of them."""


def read_batches(path: str, model: nn.Module) -> list[InputData]:
    """Read what a model is called with from a file.

    Args:
        path: A file of ``torch.save`` (a tensor, a tuple of arguments, a mapping of keyword arguments, or a list of
            such batches), ``.npz``, ``.npy`` or ``.safetensors`` (arrays by the names of arguments).
        model: The model, whose forward has names for its arguments.

    Raises:
        UserError: If there is no such file, or it holds something else.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise UserError(f"--batches {path}: must be a file of torch.save (.pt), .npz, .npy or .safetensors.")
    try:
        content = _READERS[suffix](path)
    except FileNotFoundError:
        raise UserError(f"--batches {path}: there is no such file.") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, ValueError, EOFError, RuntimeError) as error:
        raise UserError(
            f"--batches {path}: cannot be read as a file of tensors and plain containers: {_first_line(error)}"
        ) from error
    batches = content if isinstance(content, list) else [content]
    if not batches:
        raise UserError(f"--batches {path}: holds no batch.")
    return [_as_call(batch, model, path) for batch in batches]


def fitted(
    batches: Sequence[InputData], inputs: Mapping[str, Sequence[int | str]], tell: Callable[[str], object]
) -> Iterator[InputData]:
    """Cut batches into such as an exported network takes.

    Args:
        batches: The batches.
        inputs: The shapes of its inputs by their names; an axis that is no number has any length.
        tell: Is given a note about samples that are left out.

    Raises:
        UserError: If a batch has too few samples.
    """
    first_axes = {shape[0] for shape in inputs.values() if len(shape)}
    size = first_axes.pop() if len(first_axes) == 1 else None
    left_out = 0
    for batch in batches:
        given = _ordered(batch, list(inputs))
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        counts = {tensor.shape[0] for tensor in tensors if tensor.dim()}
        if size is None or len(counts) != 1:
            yield given  # not all of them have a first axis of samples
            continue
        count, step = counts.pop(), size if isinstance(size, int) else MOST
        if isinstance(size, int) and count < size:
            raise UserError(
                f"--batches: a batch holds {count} sample(s), and the exported network takes {size} at a time. Give "
                "more, or export for another number (--input-shape, --dynamic-batch)."
            )
        whole = count - count % step if isinstance(size, int) else count
        left_out += count - whole
        for start in range(0, whole, step):
            yield _cut(given, start, start + step)
    if left_out:
        tell(f"{left_out} sample(s) are left out: the exported network takes exactly {size} at a time.")


def random_batches(input_data: InputData, count: int) -> list[InputData]:
    """Make batches of random numbers, always the same ones; integers are 0 or 1, truth values as they are.

    Args:
        input_data: An input like them.
        count: How many.

    Example:
        >>> [batch.shape for batch in random_batches(torch.zeros(1, 3), 2)]
        [torch.Size([1, 3]), torch.Size([1, 3])]
    """
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:
            return tensor
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return torch.randint(2, tensor.shape, generator=generator).to(tensor.dtype)

    return [tree_map_only(Tensor, random, input_data) for _ in range(count)]


def _from_torch(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _from_numpy(path: str) -> Any:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return _tensor(content)
    arrays = {name: _tensor(content[name]) for name in content.files}
    unnamed = [f"arr_{number}" for number in range(len(arrays))]  # what savez calls positional arguments
    return tuple(arrays[name] for name in unnamed) if set(unnamed) == set(arrays) else arrays


def _from_safetensors(path: str) -> Any:
    try:
        from safetensors.torch import load_file  # noqa: PLC0415  (optional)
    except ModuleNotFoundError as error:
        raise UserError(f"--batches {path}: needs safetensors: pip install safetensors") from error
    return load_file(path)


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array as networks take it: what NumPy computes is float64 unless one asks for less."""
    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


_READERS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _from_torch),
        **dict.fromkeys((".npz", ".npy"), _from_numpy),
        ".safetensors": _from_safetensors,
    }
)


def _as_call(batch: Any, model: nn.Module, path: str) -> InputData:
    if not isinstance(batch, (Tensor, tuple, Mapping)) or not any(isinstance(x, Tensor) for x in tree_leaves(batch)):
        raise UserError(
            f"--batches {path}: a batch is a {type(batch).__name__}; it must be a tensor, a tuple of the arguments of "
            "forward or a mapping with their names, without labels."
        )
    if not isinstance(batch, Mapping):
        return batch
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [name for name in batch if name not in names]
    if len(batch) == 1 and unknown:
        return (next(iter(batch.values())),)
    if unknown and not takes_any:
        raise UserError(
            f"--batches {path}: holds {abbreviated(unknown)}, and forward of {type(model).__name__} takes "
            f"{abbreviated(names)}. Name the tensors so, and leave labels out."
        )
    return dict(batch)


def _cut(batch: InputData, start: int, end: int) -> InputData:
    cut: InputData = tree_map_only(Tensor, lambda tensor: tensor[start:end], batch)
    return cut


def _ordered(batch: InputData, names: Sequence[str]) -> InputData:
    """Bring keyword arguments into the order of a network's inputs."""
    if not isinstance(batch, Mapping):
        return batch
    return {name: batch[name] for name in sorted(batch, key=lambda n: names.index(n) if n in names else len(names))}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
