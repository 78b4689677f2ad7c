"""What can be counted of a step, and is the same in every run: operators, waits for the device, bytes."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler import profile

from tests.benchmarks.bench.results import Facts
from tests.benchmarks.bench.training import Training
from tests.operators import HOST_READS

ALLOCATION = "[memory]"
COMPILED = "## Call CompiledFxGraph"


def facts(training: Training) -> Facts:
    """Count what a step does; operators are those of forward and backward, without the optimizer's."""
    training.step()
    training.optimizer.zero_grad(set_to_none=True)
    counts = operators(training.backward)
    training.optimizer.zero_grad(set_to_none=True)
    own = [*training.model.parameters(), *training.model.buffers()]
    kept, with_own = kept_bytes(training.loss, own)
    alive, _ = allocated(training.loss)
    _, peak = allocated(lambda: (training.backward(), training.optimizer.step()))
    training.optimizer.zero_grad(set_to_none=True)
    reads = sum(count for name, count in counts.items() if name in HOST_READS)
    return Facts(sum(counts.values()), reads, kept, with_own, alive, peak)


def operators(step: Callable[[], object]) -> Counter[str]:
    """Count the operators that a step dispatches; a compiled graph counts as one.

    A dispatch mode would not see what is compiled: while one is on, PyTorch runs such code operator by operator.
    Operators that are defined by others, such as ``linear``, do not count, and neither do those inside of a kernel.
    """
    with _unheard(), profile(experimental_config=_ExperimentalConfig(capture_overload_names=True)) as found:
        step()
    counts: Counter[str] = Counter()
    events: Any = found.function_events
    for event in events:
        if _counts(event) and not any(map(_counts, _around(event))):
            counts[COMPILED if event.name.startswith(COMPILED) else event.name] += 1
    return counts


def kept_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> tuple[int, int]:
    """Return how many bytes of distinct storages autograd keeps for backward: without parameters and buffers, and with.

    Args:
        forward: Computes what would be called backward on.
        own: The parameters and buffers.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()  # what autograd drops again is gone from it

    def pack(tensor: Tensor) -> _Kept:
        kept.add(held := _Kept(tensor))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = forward()
    storages = [held.tensor.untyped_storage() for held in kept]
    del result
    of_model = {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in of_model), sum(sizes.values())


class _Kept:
    """A tensor in autograd's keeping."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the result of a node would keep the node, and so itself


def allocated(step: Callable[[], object]) -> tuple[int, int]:
    """Return how many bytes torch's allocator has handed out more at the end of a step, and at most during it.

    What the step returns still lives at its end. Unlike the memory of the process, this does not depend on what the C
    library keeps of memory that was freed before; scratch memory inside of oneDNN's kernels is not in it.
    """
    with _unheard(), profile(profile_memory=True) as found:
        result = step()
    events: Any = found.kineto_results
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events.events() if event.name() == ALLOCATION),
        key=lambda change: change[0],
    )
    del result
    totals = list(accumulate((size for _, size in changes), initial=0))
    return totals[-1], max(totals)


def _around(event: Any) -> Iterator[Any]:
    outer = event.cpu_parent
    while outer is not None:
        yield outer
        outer = outer.cpu_parent


def _counts(event: Any) -> bool:
    return event.name.startswith(COMPILED) or _has_kernel(f"{event.name}.{event.overload_name}".rstrip("."))


@cache
def _has_kernel(operator: str) -> bool:
    """Tell whether a name is that of an operator, and of one that is not defined by others."""
    is_operator = operator in torch._C._dispatch_get_all_op_names()
    return is_operator and not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CompositeImplicitAutograd")


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Throw away what PyTorch's profiler writes to the terminal when it starts and stops."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
