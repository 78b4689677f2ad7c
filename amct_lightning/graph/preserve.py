"""Run a model and put back everything the run may have changed."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from amct_lightning.graph.tensors import tensors_in


@contextmanager
def preserved(model: nn.Module, training: bool = False, with_gradients: bool = False) -> Iterator[None]:
    """Run a block, in eval mode without gradients by default, then restore the model and the random generators.

    Restored are every module's training flag, the buffers (the objects and their content), tensors that a forward
    keeps in plain attributes, and the random state of Python, numpy and torch on the model's devices. Fused fast
    paths of torch's transformer layers, which would hide the layers inside them, are off during the block.

    Args:
        model: The model that the block runs.
        training: Leave each module in the mode that it is in.
        with_gradients: Run the block with gradients.
    """
    states = [_ModuleState(module) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with _preserved_random_state(model), torch.set_grad_enabled(with_gradients):
        torch.backends.mha.set_fastpath_enabled(False)
        for state in states:
            state.module.training = state.training and training
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for state in states:
                state.restore()


class _ModuleState:
    """What one module itself, without its children, was before the block."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training = module.training
        self.buffers = dict(_buffers(module))
        self.contents = {name: _copy(buffer) for name, buffer in self.buffers.items()}
        self.attributes = dict(vars(module))

    def restore(self) -> None:
        self.module.training = self.training
        self._restore_attributes()
        self._restore_buffers()

    def _restore_attributes(self) -> None:
        """Put back attributes that hold tensors now: state such as ``self.hidden = h``, unlike flags and counters."""
        for name, value in list(vars(self.module).items()):
            before = self.attributes.get(name)
            if value is before or not tensors_in(value):
                continue
            # A tensor with a graph behind it, such as an old weight norm leaves, could not be deep-copied.
            if any(not tensor.is_leaf for tensor in tensors_in(before)):
                continue
            if name in self.attributes:
                vars(self.module)[name] = before
            else:
                del vars(self.module)[name]

    def _restore_buffers(self) -> None:
        present = _buffers(self.module)
        for name in set(present) - set(self.buffers):
            del present[name]
        for name, buffer in self.buffers.items():
            if buffer is not None and self.contents[name] is None:
                continue  # a lazy one, made by now
            present[name] = buffer
            # Writing only what changed keeps the version counters of untouched buffers.
            content = self.contents[name]
            if buffer is not None and content is not None and not _same(buffer, content):
                buffer.copy_(content)


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers of a module itself, to be changed in place; a scripted module keeps its own in C++."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return dict(module.named_buffers(recurse=False)) if scripted else module._buffers


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or is_lazy(buffer) else buffer.detach().clone()


def _same(buffer: Tensor, content: Tensor) -> bool:
    """Compare bit by bit, NaN included; what has no plain memory to compare (meta, sparse) counts as unchanged."""
    if buffer.is_meta or buffer.is_quantized or buffer.layout != torch.strided:
        return True
    return buffer.shape == content.shape and torch.equal(_bytes(buffer), _bytes(content))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def random_state() -> tuple[Any, ...]:
    """Return the state of the random generators on the host, to be compared."""
    numpy = sys.modules.get("numpy")
    drawn = (numpy.random.get_state(legacy=False)["state"],) if numpy else ()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), *map(repr, drawn)


@contextmanager
def _preserved_random_state(model: nn.Module) -> Iterator[None]:
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type not in ("cpu", "meta")}
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices}:
            alike = [device for device in devices if device.type == kind]
            forks.enter_context(torch.random.fork_rng(devices=alike, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
