"""How a model is run so that its data flow can be seen, and a copy of it to run instead of the model itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

InputData = Tensor | tuple[Any, ...] | Mapping[str, Any]

_COPIED_BYTES = 2**30
"""Up to this size the parameters of a model are copied with it; larger ones are shared, to spare the memory."""

_SHARED = (Dataset, DataLoader)


@dataclass(frozen=True)
class Forward:
    """A call that shows the data flow of a model.

    Attributes:
        run: The module to call; the model itself or one that contains it.
        input_data: A tensor, a tuple of positional or a mapping of keyword arguments for the call.
        method: Name of the method to call, for modules that have no forward.
        sees_training: Whether the path that training takes is to be seen as well as that of evaluation.
        context: Makes the context in which the module runs, such as autocast.
        prepare: Is given the module that will be called, a copy of ``run`` where that can be copied; it returns what
            undoes it.
        agree: Is given the names of the layers that training reaches in this process, and returns those that it reaches
            in any; all processes call it.
    """

    run: nn.Module
    input_data: InputData
    method: str = "__call__"
    sees_training: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    agree: Callable[[set[str]], set[str]] = set


def copy_to_run(run: nn.Module, share_parameters: bool | None = None) -> nn.Module | None:
    """Return a copy of a module that may be run without any change to the module; ``None`` if there can be none.

    Datasets are shared with the copy. So are the parameters if they take more than 1 GiB, which is safe for modules
    that write to their buffers and attributes only.

    Args:
        run: The module.
        share_parameters: Whether to share the parameters; ``None`` decides by their size.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> copied = copy_to_run(model)
        >>> copied[0].weight is model[0].weight, bool((copied[0].weight == model[0].weight).all())
        (False, True)
    """
    if any(is_lazy(parameter) for parameter in run.parameters()):
        return None  # its first forward makes the layers that are to be quantized
    if share_parameters is None:
        share_parameters = sum(parameter.nbytes for parameter in run.parameters()) > _COPIED_BYTES
    try:
        return copy_of(run, share_parameters)
    except Exception as error:  # locks, generators, sharded modules: there is no list of what cannot be copied
        if not any(isinstance(parameter, DTensor) for parameter in run.parameters()):
            warnings.warn(
                f"{type(run).__name__} cannot be copied ({type(error).__name__}: {error}), so it runs itself to show "
                "its data flow. Plain attributes that its forward sets stay set; buffers and random state do not.",
                stacklevel=2,
            )
        return None


def copy_of(run: nn.Module, share_parameters: bool = False) -> nn.Module:
    """Return a copy of a module, with which it shares datasets and what loads them.

    Args:
        run: The module.
        share_parameters: Whether it shares the parameters, too.

    Raises:
        Exception: Whatever there is in it that cannot be copied raises.
    """
    return copy.deepcopy(run, {id(item): item for item in _shared(run, share_parameters)})


def _shared(run: nn.Module, share_parameters: bool) -> Iterator[Any]:
    """Yield what a copy has in common with its module."""
    if share_parameters:
        yield from run.parameters()
    for module in run.modules():
        for value in vars(module).values():
            yield from _data_in(value)
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value  # as an old weight norm leaves them; torch refuses to copy it


def _data_in(value: Any) -> Iterator[Any]:
    """Yield datasets and what loads them, also those in containers."""
    # By name: this room does not know of Lightning.
    if isinstance(value, _SHARED) or any(kind.__name__ == "LightningDataModule" for kind in type(value).__mro__):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _data_in(item)


def counterpart(module: nn.Module, run: nn.Module, copied: nn.Module) -> nn.Module:
    """Return what stands for a module of ``run`` in a copy of that.

    Args:
        module: The module, ``run`` itself or one inside.
        run: The whole.
        copied: The copy of the whole.
    """
    return copied.get_submodule(next(name for name, inner in run.named_modules() if inner is module))


@contextmanager
def noticed_calls(modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Collect the names of those modules that are called in a block."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in modules.items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
