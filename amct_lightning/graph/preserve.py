"""Run a model and put back everything the run may have changed."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without gradients, then restore the model and the random generators.

    Restored are every module's training flag, the buffers (the objects and their content), and the random state
    of Python, numpy and torch on the model's devices. Fused fast paths of torch's transformer layers, which
    would hide the layers inside them, are off during the block.

    Args:
        model: The model that the block runs.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, dict(module._buffers), {k: _copy(v) for k, v in module._buffers.items()}) for module in model.modules()
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with _preserved_random_state(model), torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in flags:
            module.training = False
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, training in flags:
                module.training = training
            for module, objects, contents in buffers:
                _restore_buffers(module, objects, contents)


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or _uninitialized(buffer) else buffer.detach().clone()


def _uninitialized(tensor: Tensor) -> bool:
    return isinstance(tensor, UninitializedTensorMixin)


def _restore_buffers(module: nn.Module, objects: dict[str, Tensor | None], contents: dict[str, Tensor | None]) -> None:
    lazily_made = {k for k, v in objects.items() if v is not None and _uninitialized(v)}
    for name in set(module._buffers) - set(objects):
        del module._buffers[name]
    for name, buffer in objects.items():
        if name in lazily_made:
            continue
        module._buffers[name] = buffer
        content = contents[name]
        # Writing only what changed keeps the version counters of untouched buffers.
        if buffer is not None and content is not None and not _same(buffer, content):
            buffer.copy_(content)


def _same(buffer: Tensor, content: Tensor) -> bool:
    if buffer.is_meta:
        return True
    return buffer.shape == content.shape and torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(content))


@contextmanager
def _preserved_random_state(model: nn.Module) -> Iterator[None]:
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type not in ("cpu", "meta")}
    by_type: dict[str, list[torch.device]] = {}
    for device in devices:
        by_type.setdefault(device.type, []).append(device)
    try:
        with _forked(by_type):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def _forked(by_type: dict[str, list[torch.device]]) -> Iterator[None]:
    if not by_type:
        with torch.random.fork_rng(devices=[]):
            yield
        return
    kind, devices = by_type.popitem()
    with torch.random.fork_rng(devices=devices, device_type=kind), _forked(by_type):
        yield
