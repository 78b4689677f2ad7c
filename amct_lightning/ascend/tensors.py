"""Tensors of NPUs beyond training: errors explained, checkpoints that load anywhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_EXPLANATIONS = {
    "NPU out of memory": "(To Lightning, this is the same as 'CUDA out of memory'.)",
    "Only c10::MemoryFormat::Contiguous is supported": (
        "NPUs make no channels_last tensors: torch_npu chooses memory formats by itself. Leave out "
        "memory_format=torch.channels_last; a model may also be converted while it is on the CPU."
    ),
    "Unsupported data type at::kDouble": (
        "HCCL adds no float64. Convert the model or the tensor to float32 (model.float()), or train on one device."
    ),
}


@contextmanager
def explained_errors() -> Iterator[None]:
    """Say what to do about errors of torch_npu, and word its out-of-memory error so that Lightning recognises it.

    Lightning's ``BatchSizeFinder`` goes on with a smaller batch after such an error, but recognises it only by the
    words "CUDA" and "out of memory" in the text of a RuntimeError.

    Yields:
        Nothing.

    Raises:
        RuntimeError: The same error with the words added.

    Example:
        >>> with explained_errors():  # doctest: +ELLIPSIS
        ...     raise RuntimeError("HCCL allreduce: Unsupported data type at::kDouble")
        Traceback (most recent call last):
        RuntimeError: HCCL allreduce: Unsupported data type at::kDouble
        HCCL adds no float64...
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error.args[0]) if error.args else ""
        for words, explanation in _EXPLANATIONS.items():
            if words in text and explanation not in text:
                error.args = (f"{text}\n{explanation}", *error.args[1:])
        raise


def on_cpu(value: Any) -> Any:
    """Copy every NPU tensor in a checkpoint to the CPU, so that it can be read where torch_npu is missing.

    Tensors that are the same memory stay so. Dictionaries, lists and tuples are copied, nothing else is looked into
    and nothing given is changed.

    Args:
        value: The checkpoint or a part of it.

    Returns:
        The same structure with its tensors on the CPU.

    Example:
        >>> on_cpu({"a": [torch.ones(1), 2]})
        {'a': [tensor([1.]), 2]}
    """
    return _copied(value, {})


_Key = tuple[Any, ...]


def _copied(value: Any, done: dict[_Key, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value, done) if value.device.type == "npu" else value
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps the class and attributes, such as a state dict's _metadata
        for key, entry in value.items():
            result[key] = _copied(entry, done)
        return result
    if type(value) in (list, tuple):
        return type(value)(_copied(entry, done) for entry in value)
    return value


def _tensor(value: Tensor, done: dict[_Key, Tensor]) -> Tensor:
    key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
    if key not in done:
        done[key] = value.detach().cpu()
    shared = done[key]
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(shared, value.requires_grad)
    return shared
