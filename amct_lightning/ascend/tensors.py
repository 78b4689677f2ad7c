"""Tensors of NPUs beyond training: out-of-memory errors, generator states, checkpoints that load anywhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from amct_lightning.ascend.devices import npu


@contextmanager
def known_out_of_memory() -> Iterator[None]:
    """Word NPU's out-of-memory error so that Lightning recognises it, and free what the allocator holds.

    Lightning's ``BatchSizeFinder`` goes on with a smaller batch after such an error, but recognises it only by the
    words "CUDA" and "out of memory" in the text of a RuntimeError.

    Yields:
        Nothing.

    Raises:
        torch.OutOfMemoryError: The same error with the words added.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if error.args and "NPU out of memory" in str(error.args[0]) and "CUDA" not in str(error.args[0]):
            error.args = (f"{error.args[0]}\n(To Lightning, this is the same as 'CUDA out of memory'.)",)
        raise


def generator_state(device: torch.device) -> Tensor:
    """Give the state of a device's random number generator.

    Args:
        device: The device.

    Returns:
        The state, uint8 on the CPU.
    """
    state: Tensor = npu().get_rng_state(device)
    return state


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Set the state of a device's random number generator.

    Args:
        device: The device.
        state: What :func:`generator_state` gave.
    """
    npu().set_rng_state(state.cpu(), device)


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
