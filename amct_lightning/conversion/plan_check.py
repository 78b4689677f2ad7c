"""Whether what a checkpoint holds as a plan is one: types at every depth, and names that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

_NAME, _NAMES = "text or null", "a list of names"
_SERVED_IN = (None, "bfloat16", "float16")
_ENTRIES = {
    "submodule": _NAME,
    "record": _NAME,
    "execution": _NAME,
    "float_layers": _NAMES,
    "missed_layers": _NAMES,
    "other_parts": "plans by name",
    "observed": "lists of tensors by name",
    "calibration_steps": "an integer",
}


def check_plan(plan: Any) -> None:
    """Refuse a plan whose parts have other types than they are for, or name layers that it does not have.

    Args:
        plan: A ``QuantPlan`` that was made of what a file holds (its file imports this one).

    Raises:
        TypeError: If a value has another type.
        LookupError: If a name is repeated or belongs to nothing.
    """
    for item in (*plan.layers, *plan.refused):
        _check_types(item, repr(item.name))
    _check_types(plan, "the plan", ("search_n", "target", "deploy_grid", "serving"))
    if plan.serving not in _SERVED_IN:
        raise LookupError(f"no server computes in {plan.serving!r}")
    _check_all(plan.ends, str, "ends")
    _check_all((name for name, _ in plan.float_parts), str, "float_parts")
    _check_all((number for _, number in plan.float_parts), int, "float_parts")
    names = {layer.name for layer in plan.layers}
    if len(names) < len(plan.layers):
        raise LookupError("two layers have the same name")
    for layer in plan.layers:
        if layer.name not in plan.config:
            raise LookupError(f"layer {layer.name!r} has no configuration")
        if layer.shares_input_of not in names:
            raise LookupError(f"layer {layer.name!r} shares the input of {layer.shares_input_of!r}, which is no layer")


def check_entry(entry: object, source: str) -> None:
    """Refuse what a checkpoint holds beside the plan if it has other types than it is written with.

    Args:
        entry: The entry of the callback in a checkpoint.
        source: The checkpoint, for the message.

    Raises:
        ValueError: Naming the part, what it must be and what was found.

    Example:
        >>> check_entry({"plan": {}, "record": 3}, "last.ckpt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint last.ckpt is damaged: its 'record' must be text or null, found int. ... checkpoint.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("plan"), dict):
        raise ValueError(f"The checkpoint {source} is damaged: it has no quantization plan. Use another checkpoint.")
    for key, wanted in _ENTRIES.items():
        if key in entry and not _is(entry[key], wanted):
            raise ValueError(
                f"The checkpoint {source} is damaged: its '{key}' must be {wanted}, found {type(entry[key]).__name__}"
                f"{' with something else in it' if isinstance(entry[key], (list, dict)) else ''}. "
                "Use another checkpoint."
            )


def _is(value: object, wanted: str) -> bool:
    if wanted == _NAME:
        return value is None or isinstance(value, str)
    if wanted == _NAMES:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if wanted == "an integer":
        return isinstance(value, int)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    if wanted == "plans by name":
        return all(isinstance(plan, dict) for plan in value.values())
    lists = value.values()
    return all(isinstance(one, list) and all(isinstance(batch, Tensor) for batch in one) for one in lists)


def _check_types(item: Any, of: str, only: Iterable[str] = ()) -> None:
    for field in fields(item):
        value, allowed = getattr(item, field.name), str(field.type)
        found = type(value).__name__.replace("NoneType", "None")
        if (not only or field.name in only) and found not in allowed.split(" | "):
            raise TypeError(f"{field.name} of {of} must be {allowed.replace(' | ', ' or ')}, found {found}")


def _check_all(values: Iterable[object], kind: type, what: str) -> None:
    if not all(isinstance(value, kind) for value in values):
        raise TypeError(f"{what} must hold {kind.__name__} only")
