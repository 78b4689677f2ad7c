"""Counting the operators that a piece of code dispatches, and the bytes that autograd keeps of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")


class Operators(TorchDispatchMode):
    """Count the dispatched operators, and those among them that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def host_reads(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if name in HOST_READS}


class Reads(TorchFunctionMode):
    """Count the calls that bring numbers to the host; some of them, such as ``tolist``, dispatch no operator."""

    _NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "__array__", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self._NAMES:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def saved_bytes(forward: Callable[[], object]) -> int:
    """Return how many bytes of distinct storages autograd keeps for backward.

    Args:
        forward: What is run.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())
