"""What a piece of code asks of the device: every operator that reaches the backend, and every wait of the host for it.

An operator counts as native if the torch_npu wheel registers a kernel for it. A composite one is taken apart, as the
dispatcher does it, until only operators of the backend are left; one that then has no kernel is what the real device
runs on the host. Waits are found in two ways: by the operators that read or copy over the bus, and by torch_npu's own
trace of synchronisations, which also sees those without an operator (``torch.npu.synchronize()``, events).
"""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ascend_sim import native_operators
from tests.ascend_sim.cache import ROOT

KINDS = ("kernels", "views", "composites", "fallbacks")
_COMPOSITE = (
    DispatchKey.CompositeExplicitAutogradNonFunctional,
    DispatchKey.CompositeExplicitAutograd,
    DispatchKey.CompositeImplicitAutograd,
)
# Their results have a size, or are a number, that the host has to know before it can go on.
_READS = {
    "aten::_local_scalar_dense",
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_BY_MASK = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"}
_SUSPECTS = {*_READS, *_BY_MASK, *_COPIES, "aten::lift_fresh"}


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the device.

    Attributes:
        what: The operator, or the kind of synchronisation that torch_npu has reported.
        where: The innermost function of the package, Lightning, torchmetrics or the tests that led to it.
        phase: The phase of the trace at that moment.
    """

    what: str
    where: str
    phase: str


class DeviceTrace(TorchDispatchMode):
    """While it is entered, notes all operators on NPU tensors, by phase.

    Attributes:
        phase: What the operators belong to; set it as the traced code goes on.
        tables: Kind -> phase -> operators with their numbers of calls. The kinds are "kernels" of torch_npu; "views",
            which start nothing on the device; "composites", which are made of the others; and "fallbacks", which
            have no kernel and would run on the host.
        waits: Where the host waits for the device.
    """

    def __init__(self, phase: str = "step") -> None:
        super().__init__()
        self.phase = phase
        self.tables: dict[str, dict[str, Counter[str]]] = {kind: defaultdict(Counter) for kind in KINDS}
        self.waits: list[Wait] = []
        self._native = native_operators()
        self._kinds: dict[OpOverload, tuple[str, DispatchKey | None]] = {}
        self._is_reading = False

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Let operators belong to a phase for a while."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def operators(self, kind: str) -> set[str]:
        """All operators of a kind, whatever the phase."""
        return set().union(*self.tables[kind].values())

    def __enter__(self) -> DeviceTrace:
        super().__enter__()
        _listen(self._synchronised)
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _listen(None)

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind, composite = self._kind(func)
        if kind == "foreign" or not any(map(_is_on_npu, _leaves((args, tuple(kwargs.values()))))):
            return func(*args, **kwargs)
        if composite is None:
            result = self._run(func, args, kwargs)
        else:
            with self:  # what it is made of comes here as well
                result = func._op_dk(composite, *args, **kwargs)
        self.tables[kind][self.phase][func.name()] += 1
        if func._schema.name in _SUSPECTS and _waits(func, args, kwargs, result):
            self._wait(func.name())
        return result

    def _kind(self, func: OpOverload) -> tuple[str, DispatchKey | None]:
        """Tell what an operator is, and which kernel takes it apart."""
        if func not in self._kinds:
            self._kinds[func] = self._find_kind(func)
        return self._kinds[func]

    def _find_kind(self, func: OpOverload) -> tuple[str, DispatchKey | None]:
        if func.namespace != "aten":
            return "foreign", None
        key = next((key for key in _COMPOSITE if func.has_kernel_for_dispatch_key(key)), None)
        is_native = func.name() in self._native
        if func.is_view and (is_native or key):
            return "views", None  # not taken apart: detach() would come here again for ever
        if is_native:
            return "kernels", None
        return ("composites", key) if key else ("fallbacks", None)

    def _run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        self._is_reading = func._schema.name == "aten::_local_scalar_dense"  # counted as that, and not once more
        try:
            return func(*args, **kwargs)
        finally:
            self._is_reading = False

    def _synchronised(self, kind: str) -> None:
        if not self._is_reading:
            self._wait(kind)

    def _wait(self, what: str) -> None:
        self.waits.append(Wait(what, _place(), self.phase))


def _waits(func: OpOverload, args: Any, kwargs: Any, result: Any) -> bool:
    name = func._schema.name
    if name in _READS:
        # The overload of a number repeats every element alike, and given the size of the result nothing is read.
        return "self_int" not in func.name() and kwargs.get("output_size") is None
    if name in _BY_MASK:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "aten::lift_fresh":  # torch.tensor(number, device="npu"): the copy itself is not dispatched
        return True
    source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], result)
    is_blocking = not (kwargs.get("non_blocking") or (name == "aten::copy_" and True in args[2:]))
    return is_blocking and _is_on_npu(source) != _is_on_npu(target)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _is_on_npu(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.device.type == "npu"
    return isinstance(leaf, torch.device) and leaf.type == "npu"


def _place() -> str:
    """Name the innermost function that is not of torch itself or of this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path == Path(__file__) or path.name == "steps.py":
            continue
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and ".cache" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.name}"
        for library in ("lightning", "torchmetrics"):
            if library in path.parts and "site-packages" in path.parts:
                start = path.parts.index("site-packages") + 1
                return f"{Path(*path.parts[start:])}:{frame.name}"
    return "torch"


class _Listeners:
    current: Callable[[str], None] | None = None
    registered = False


def _listen(callback: Callable[[str], None] | None) -> None:
    """Have torch_npu report synchronisations of the host. It never forgets a listener: there is one that passes on."""
    _Listeners.current = callback
    if _Listeners.registered:
        return
    import torch_npu
    from torch_npu.utils import _npu_trace

    def pass_on(kind: str) -> Callable[..., None]:
        return lambda *_: _Listeners.current(kind) if _Listeners.current is not None else None

    for kind in ("stream", "device", "event"):
        register = getattr(_npu_trace, f"register_callback_for_npu_{kind}_synchronization")
        register(pass_on(f"{kind} synchronisation"), "tests")
    torch_npu._C._activate_npu_trace(0)  # 0: of streams and events
    _Listeners.registered = True
