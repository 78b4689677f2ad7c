"""Which modules a sharding strategy shards together, and which parameters it leaves whole on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from amct_lightning.protocols import KeepsWhole

Units = Sequence[str] | Callable[[str, nn.Module], bool] | None


def shard(module: nn.Module, mesh: DeviceMesh, units: Units, min_num_params: int, reshard: bool | None) -> None:
    """Shard a module whose owner has not done it, in units that gather their parameters together.

    Every part of ``module`` with a forward of its own is a unit, and inside of it those that ``units`` names or, if it
    names none, those with so many parameters. A unit holds all users of its parameters: tied weights are sharded
    by the smallest part that has both ends. What belongs to no unit stays whole.

    Args:
        module: The LightningModule, whose own forward is not called for every step and so is never a unit.
        mesh: The ranks to shard over.
        units: Class names, or a function of a module's name and the module.
        min_num_params: Size of a unit, if ``units`` is None.
        reshard: ``reshard_after_forward`` of ``fully_shard``.
    """
    owners = _owners(module)
    for name, root in _roots("", module, owners):
        inner = _inner_units(name, root, owners, units, min_num_params)
        for unit in (*inner, root):  # from the inside out
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, ignored_params=whole_parameters(unit))


def is_sharded(module: nn.Module) -> bool:
    """Tell whether parameters of a module are sharded already, by ``fully_shard`` or for tensor parallelism.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    return any(isinstance(parameter, DTensor) for parameter in module.parameters()) or any(
        isinstance(part, FSDPModule) for part in module.modules()
    )


def reshard(module: nn.Module) -> None:
    """Free gathered parameters, so that a module has the parameters that its optimizer knows.

    Where a forward was not followed by a backward, as in an evaluation, the outermost units keep theirs gathered.

    Args:
        module: The module.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that stay whole: those of modules that say so, and single numbers.

    Args:
        module: The module.

    Example:
        >>> import torch
        >>> module = nn.Linear(2, 2)
        >>> module.gain = nn.Parameter(torch.ones(()))
        >>> whole_parameters(module) == {module.gain}
        True
    """
    return {
        parameter
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
        if keeps_whole(part) or parameter.dim() == 0
    }


@contextmanager
def without_whole_modules(module: nn.Module) -> Iterator[None]:
    """Take the modules that stay whole out of a module while its owner shards it, and put them back.

    ``fully_shard`` refuses single numbers and ``parallelize_module`` wants nothing but a weight and a bias in a linear
    layer; a ``configure_model`` that was written for the float model knows nothing of them.

    Args:
        module: The module.

    Yields:
        Nothing.
    """
    before = {part: dict(part._modules) for part in module.modules() if any(map(keeps_whole, part.children()))}
    for part, children in before.items():
        for name, child in children.items():
            if keeps_whole(child):
                del part._modules[name]
    try:
        yield
    finally:
        for part, children in before.items():
            now = dict(part._modules)
            part._modules.clear()
            for name in (*children, *(name for name in now if name not in children)):
                if name in now or keeps_whole(children[name]):
                    part._modules[name] = now.get(name, children.get(name))


def keeps_whole(module: object) -> bool:
    """Tell whether a module says that its parameters stay whole."""
    return isinstance(module, KeepsWhole) and module.keeps_whole


def _owners(module: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(parameter, []).append(part)
    return owners


def _roots(prefix: str, module: nn.Module, owners: Any) -> Iterator[tuple[str, nn.Module]]:
    """Find the outermost units below a module."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}".lstrip(".")
        if _can_be_unit(child, owners):
            yield path, child
        else:
            yield from _roots(path, child, owners)


def _inner_units(prefix: str, root: nn.Module, owners: Any, units: Units, min_num_params: int) -> list[nn.Module]:
    """Find the units inside of an outermost one, inner before outer."""
    found: list[nn.Module] = []

    def visit(path: str, module: nn.Module) -> int:
        """Return the number of parameters that are in no unit yet."""
        left = sum(p.numel() for p in module.parameters(recurse=False) if p not in whole)
        if not isinstance(module, nn.MultiheadAttention):  # which uses the parameters of its parts itself
            left += sum(visit(f"{path}.{name}", child) for name, child in module.named_children())
        if module is root or not left or not _can_be_unit(module, owners):
            return left
        if _is_wanted(path, module, units, left >= min_num_params):
            found.append(module)
            return 0
        return left

    whole = whole_parameters(root)
    visit(prefix, root)
    return found


def _is_wanted(path: str, module: nn.Module, units: Units, is_large: bool) -> bool:
    if units is None:
        return is_large
    if callable(units):
        return bool(units(path, module))
    return any(kind.__name__ in units for kind in type(module).__mro__)


def _can_be_unit(module: nn.Module, owners: dict[nn.Parameter, list[nn.Module]]) -> bool:
    if keeps_whole(module) or type(module).forward is nn.Module.forward:
        return False
    inside = set(module.modules())
    own = set(module.parameters()) - whole_parameters(module)
    return bool(own) and all(owner in inside for parameter in own for owner in owners[parameter])
