"""The tensors inside whatever a model takes and returns: containers, dataclasses, objects with attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

_OPAQUE = (str, bytes, type, ModuleType, nn.Module)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in ``tree``, in the order in which it holds them.

    Args:
        tree: A tensor, or anything that holds tensors: mappings, sequences, sets, dataclasses and other objects, in
            any nesting. Modules are not looked into.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> [t.item() for t in tensors_in({"a": [torch.tensor(1), None], "b": SimpleNamespace(c=torch.tensor(2))})]
        [1, 2]
    """
    return list(_walk(tree, {}))


def _walk(item: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
        return
    if isinstance(item, _OPAQUE) or id(item) in seen:
        return
    seen[id(item)] = item  # keeping it alive keeps its id its own
    for part in _parts(item):
        yield from _walk(part, seen)


def _parts(item: Any) -> Iterable[Any]:
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, (list, tuple, AbstractSet)):
        return item
    if is_dataclass(item):
        return [getattr(item, field.name, None) for field in fields(item)]
    return list(vars(item).values()) if hasattr(item, "__dict__") else ()
