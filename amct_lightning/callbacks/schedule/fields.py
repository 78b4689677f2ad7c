"""What the fields of a schedule may be, and what they stand for."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from amct_lightning.wording import closest

_Class = TypeVar("_Class")

Epoch = int | float
"""An epoch counted from 0 as an int, or a share of ``max_epochs`` as a float between 0 and 1."""

_MOMENTS = ("start", "freeze_data", "freeze_weights", "freeze_bn")
_PERIODS = ("update_every_n_steps", "update_every_n_epochs")
_EXCEPTIONS = (*_MOMENTS, "calibrate", *_PERIODS)


def check_fields(values: Mapping[str, Any], where: str = "QuantSchedule") -> None:
    """Refuse fields of a wrong type or value.

    Args:
        values: Field name -> value; also of an exception for some layers.
        where: What it is called in messages.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a wrong value.
    """
    for name in _MOMENTS:
        if values.get(name) is not None:
            check_moment(values[name], f"{where}({name}={values[name]!r})")
    if not isinstance(values.get("restart_scores", False), bool):
        raise TypeError(f"{where}(restart_scores={values['restart_scores']!r}): must be True or False.")
    calibrate = values.get("calibrate")
    if isinstance(calibrate, list) and not calibrate:
        raise ValueError(f"{where}(calibrate=[]): give at least one epoch, or None for the default.")
    for moment in calibrate if isinstance(calibrate, list) else [calibrate]:
        if moment is not None or isinstance(calibrate, list):
            check_moment(moment, f"{where}(calibrate={calibrate!r})")
    for name in (*_PERIODS, "calibrate_batches"):
        value = values.get(name, 1)
        if value is None and name == "calibrate_batches":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{where}({name}={value!r}): must be an integer.")
        if value < 1:
            raise ValueError(f"{where}({name}={value!r}): must be 1 or more.")


def check_exceptions(layers: Any) -> None:
    """Refuse exceptions that are no mapping of patterns to fields, or have wrong fields.

    Args:
        layers: Pattern -> fields.

    Raises:
        TypeError: If it is no such mapping, or a field has the wrong type.
        ValueError: If a field is unknown or has a wrong value.
    """
    if not isinstance(layers, Mapping):
        raise TypeError(f"QuantSchedule(layers={layers!r}): must be a mapping of layer name patterns to fields.")
    for pattern, values in layers.items():
        where = f"QuantSchedule.layers[{pattern!r}]"
        if not isinstance(pattern, str) or not isinstance(values, Mapping):
            raise TypeError(f"{where} = {values!r}: must be a mapping of fields, such as {{'freeze_data': 3}}.")
        check_names(values, _EXCEPTIONS, where)
        check_fields(values, where)


def check_names(values: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Refuse unknown field names, and say which is probably meant.

    Args:
        values: The fields.
        allowed: The names that there are.
        where: What it is called in messages.

    Raises:
        ValueError: If there is an unknown name.

    Example:
        >>> check_names({"freeze_bm": 3}, ["freeze_bn"], "schedule")
        Traceback (most recent call last):
        ValueError: schedule: there is no field 'freeze_bm'. Did you mean 'freeze_bn'? The fields are freeze_bn.
    """
    allowed = list(allowed)
    for name in values:
        if name not in allowed:
            raise ValueError(
                f"{where}: there is no field '{name}'.{closest(name, allowed, 1)} The fields are {', '.join(allowed)}."
            )


def plain(value: Any) -> Any:
    """Give mappings and sequences of any class as dicts and lists, at any depth, and other values as they are.

    So are OmegaConf's ``DictConfig`` and ``ListConfig`` taken, whose interpolations this resolves.

    Args:
        value: What a user gave.

    Example:
        >>> from collections import UserDict, UserList
        >>> plain(UserDict({"calibrate": UserList([0, 3])}))
        {'calibrate': [0, 3]}
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [plain(item) for item in value]
    return value


def import_subclass(path: Any, kind: type[_Class]) -> type[_Class]:
    """Import the class that a ``class_path`` names.

    Args:
        path: The dotted path.
        kind: The class that it is to derive from, or to be.

    Raises:
        TypeError: If it does not.
        ValueError: If it cannot be imported.
    """
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"schedule: class_path '{path}' cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise TypeError(f"schedule: class_path '{path}' is no subclass of {kind.__name__}.")
    return found


def to_epoch(moment: Epoch, max_epochs: int | None, name: str) -> int:
    """Return the epoch that an int, or a share of ``max_epochs`` as a float, stands for.

    Args:
        moment: The int or float.
        max_epochs: Number of epochs of the training, ``None`` if it is not limited by epochs.
        name: What it is called in messages.

    Raises:
        ValueError: If a share is given of nothing.

    Example:
        >>> to_epoch(0.7, 10, "start"), to_epoch(0.5, 3, "start"), to_epoch(4, None, "start")
        (7, 2, 4)
    """
    if isinstance(moment, int):
        return moment
    if max_epochs is None:
        raise ValueError(
            f"QuantSchedule({name}={moment}): a share of the training needs max_epochs, and the Trainer has none. Set "
            "max_epochs, or give the epoch as an integer."
        )
    return math.ceil(round(moment * max_epochs, 6))  # 0.7 * 10 is a little more than 7


def check_moment(moment: Any, where: str) -> None:
    """Refuse what is neither an epoch nor a share of the training.

    Args:
        moment: What a user gave.
        where: What it is called in messages.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is a wrong one.
    """
    if isinstance(moment, bool) or not isinstance(moment, (int, float)):
        raise TypeError(f"{where}: must be an epoch as an integer, or a share of max_epochs as a float in [0, 1].")
    if isinstance(moment, float) and not 0 <= moment <= 1:
        raise ValueError(f"{where}: a float is a share of max_epochs and must be in [0, 1]; give epochs as integers.")
    if moment < 0:
        raise ValueError(f"{where}: epochs are counted from 0.")
