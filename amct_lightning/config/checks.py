"""The rules for single settings, as pure functions that list what is wrong with given values.

The dataclasses apply them when they are made. The file readers only say where the culprit was found:
``config.json: layer 'conv1', key 'retrain_data_config.clip_max'`` instead of ``DataConfig.clip_max``. Rules that need
the model (which layers exist, what their type allows) are in ``resolve.py``.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from amct_lightning.wording import closest

DATA_ALGOS = ("ulq_quantize",)
WEIGHT_ALGOS = ("arq_retrain", "ulq_retrain")
NUM_BITS = {"INT4": 4, "INT8": 8, "INT16": 16}
DATA_TYPES = ("INT4", "INT8", "INT16")
WEIGHT_TYPES = ("INT4", "INT8")
TYPE_PAIRS = (("INT4", "INT4"), ("INT8", "INT8"), ("INT16", "INT8"), ("INT8", "INT4"))
_FLOAT32_MAX = 3.4028234663852886e38
_SMALLEST_RANGE = 1.192092896e-7
"""Below it (the float32 machine epsilon) a range has no scale."""
_LARGEST_BATCH_NUM = 2**31 - 1
PRECISION_MODES = ("DEFAULT", "FORCE_FP16_QUANT")


class Fault(NamedTuple):
    """One broken rule: the exception it deserves, the key, and what follows the key in the message."""

    kind: type[Exception]
    key: str
    text: str


def raise_first(faults: Iterable[Fault], subject: Callable[[str], str]) -> None:
    """Raise the first fault, if there is one, with a message that begins with ``subject(key)``."""
    for fault in faults:
        end = "" if fault.text.endswith("?") else "."
        error = fault.kind(f"{subject(fault.key)} {fault.text}{end}")
        error.fault = fault  # type: ignore[attr-defined]
        raise error


@contextlib.contextmanager
def located(subject: Callable[[str], str]) -> Iterator[None]:
    """Say of a rule that a dataclass finds broken within it where the value was found.

    Args:
        subject: From the key in the dataclass to the beginning of the message.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise_first([error.fault] if hasattr(error, "fault") else [], subject)
        raise


def data_faults(values: Mapping[str, object]) -> Iterator[Fault]:
    """List what is wrong with the settings of an activation quantizer."""
    yield from _choice_faults(values, "algo", DATA_ALGOS)
    for key in ("clip_max", "clip_min"):
        if values.get(key) is not None:
            yield from _clip_faults(key, values[key])
    yield from _clip_pair_faults(values)
    yield from _optional_bool_faults(values, "fixed_min")
    yield from _choice_faults(values, "dst_type", DATA_TYPES)


def weight_faults(values: Mapping[str, object]) -> Iterator[Fault]:
    """List what is wrong with the settings of a weight quantizer."""
    yield from _choice_faults(values, "algo", WEIGHT_ALGOS)
    yield from _optional_bool_faults(values, "channel_wise")
    yield from _choice_faults(values, "dst_type", WEIGHT_TYPES)


def type_pair_faults(data_type: str, weight_type: str) -> Iterator[Fault]:
    """List what is wrong with a combination of activation and weight types."""
    if (data_type, weight_type) not in TYPE_PAIRS:
        allowed = ", ".join(f"{data} with {weight}" for data, weight in TYPE_PAIRS)
        yield Fault(
            ValueError,
            "retrain_data_config.dst_type",
            f"is {data_type} while that of the weights is {weight_type}; "
            f"the hardware runs these activation/weight pairs: {allowed}",
        )


def key_faults(raw: Mapping[Any, Any], allowed: tuple[str, ...]) -> Iterator[Fault]:
    """List the keys that are not known."""
    for key in raw:
        if key not in allowed:
            text = f"is not known (allowed: {', '.join(allowed)})."
            yield Fault(ValueError, str(key), f"{text}{closest(key, allowed)}".rstrip("."))


def run_faults(values: Mapping[str, object]) -> Iterator[Fault]:
    """List what is wrong with the settings that belong to no layer; keys that are absent are not checked."""
    yield from _integer_faults(values, "version")
    if values.get("version", 1) != 1:
        yield Fault(ValueError, "version", f"should be 1, found {found(values['version'])}")
    yield from _integer_faults(values, "batch_num")
    batch_num = values.get("batch_num", 1)
    if isinstance(batch_num, int) and batch_num < 1:
        yield Fault(ValueError, "batch_num", f"must be at least 1, found {found(batch_num)}")
    if isinstance(batch_num, int) and batch_num > _LARGEST_BATCH_NUM:
        yield Fault(ValueError, "batch_num", f"must be at most {_LARGEST_BATCH_NUM}, found {found(batch_num)}")
    yield from _choice_faults(values, "fakequant_precision_mode", PRECISION_MODES)


def type_fault(key: str, expected: str, value: object) -> Fault:
    """Say that ``key`` holds a value of the wrong type."""
    return Fault(TypeError, key, f"must be {expected}, found {found(value)}")


def found(value: object) -> str:
    """Show a value in a message, shortened, with its type.

    Example:
        >>> found(1)
        '1 (int)'
    """
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _choice_faults(values: Mapping[str, object], key: str, allowed: tuple[str, ...]) -> Iterator[Fault]:
    if key not in values:
        return
    choices = " or ".join(map(repr, allowed))
    value = values[key]
    if not isinstance(value, str):
        yield type_fault(key, choices, value)
    elif value not in allowed:
        yield Fault(ValueError, key, f"must be {choices}, found {found(value)}")


def _integer_faults(values: Mapping[str, object], key: str) -> Iterator[Fault]:
    if key in values and not isinstance(values[key], int):
        yield type_fault(key, "an integer", values[key])


def _optional_bool_faults(values: Mapping[str, object], key: str) -> Iterator[Fault]:
    if values.get(key) is not None and not isinstance(values[key], bool):
        yield type_fault(key, "true or false", values[key])


def _clip_faults(key: str, value: object) -> Iterator[Fault]:
    if not isinstance(value, float):
        yield type_fault(key, "a float such as 1.0, not an integer", value)
        return
    sign = 1.0 if key == "clip_max" else -1.0
    side = "above" if key == "clip_max" else "below"
    if not abs(value) <= _FLOAT32_MAX or value * sign <= 0.0:
        yield Fault(ValueError, key, f"must be a finite number {side} 0, found {found(value)}")


def _clip_pair_faults(values: Mapping[str, object]) -> Iterator[Fault]:
    given = [key for key in ("clip_max", "clip_min") if values.get(key) is not None]
    if len(given) == 1:
        missing = "clip_min" if given == ["clip_max"] else "clip_max"
        yield Fault(ValueError, given[0], f"comes without {missing}; give both, or neither to have them calibrated")
    elif given and _both_float(values) and values["clip_max"] - values["clip_min"] < _SMALLEST_RANGE:  # type: ignore[operator]
        text = f"and clip_min are closer than {_SMALLEST_RANGE}, found {found(values['clip_max'])}"
        yield Fault(ValueError, "clip_max", f"{text} and {found(values['clip_min'])}")


def _both_float(values: Mapping[str, object]) -> bool:
    return all(isinstance(values[key], float) for key in ("clip_max", "clip_min"))
