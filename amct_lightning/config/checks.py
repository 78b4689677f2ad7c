"""The rules for single settings, and how a message names the setting that breaks one.

The dataclasses apply the rules when they are made: ``DataConfig.clip_max must be ...``. A file reader only says where
it found the values: ``config.json: layer 'conv1', key 'retrain_data_config.clip_max' must be ...``. Rules that need
the model (which layers exist, what their type allows) are in ``fit.py``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from amct_lightning.wording import closest

LEARNED_CLIPS = "ulq_quantize"
"""The algorithm of AMCT for activations: a range whose ends are learned."""
ACTIVATION_ALGORITHMS = (LEARNED_CLIPS, "per_token", "none")
"""How the input of a layer may be quantized."""
_GROUP_SIZES = (32, 64, 128)
_TYPE_PAIRS = (("INT4", "INT4"), ("INT8", "INT8"), ("INT16", "INT8"), ("INT8", "INT4"))
FIXED_MIN_RULES = ("propagate", "after_relu")
"""What ``fixed_min`` may be beside true and false."""
_FLOAT32_MAX = 3.4028234663852886e38
_SMALLEST_RANGE = 1.192092896e-7
"""Below it (the float32 machine epsilon) a range has no scale."""
_LARGEST_BATCH_NUM = 2**31 - 1
_RULE = "_amct_broken_rule"


class RuleError(Exception):
    """A broken rule, until :func:`found_in` says where.

    Args:
        kind: The exception it deserves.
        key: The key that breaks it.
        text: What follows the key in the message.
    """

    def __init__(self, kind: type[Exception], key: str, text: str) -> None:
        super().__init__(kind, key, text)
        self.kind, self.key, self.text = kind, key, text


@contextmanager
def found_in(before: str, after: str = "'") -> Iterator[None]:
    """Name the key in the message if the block breaks a rule, also one that is named after a class already.

    Args:
        before: What stands before the key.
        after: What stands behind it.

    Example:
        >>> with found_in("my.json: key '"):
        ...     check_choice("algo", "ifmr", ("arq_retrain", "ulq_retrain"))
        Traceback (most recent call last):
        ...
        ValueError: my.json: key 'algo' must be 'arq_retrain' or 'ulq_retrain', found 'ifmr' (str).
    """
    try:
        yield
    except (RuleError, TypeError, ValueError) as error:
        rule = error if isinstance(error, RuleError) else vars(error).get(_RULE)
        if rule is None:
            raise
        named = rule.kind(f"{before}{rule.key}{after} {rule.text}{'' if rule.text.endswith('?') else '.'}")
        vars(named)[_RULE] = rule
        raise named from None


def check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse what is none of the allowed words."""
    choices = " or ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise wrong_type(key, choices, value)
    if value not in allowed:
        raise RuleError(ValueError, key, f"must be {choices}, found {found(value)}")


def check_flag(key: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise wrong_type(key, "true or false", value)


def check_fixed_min(value: object) -> None:
    """Refuse what neither says whether the lower clip stays 0 nor names a rule for that."""
    if not isinstance(value, (bool, str)):
        raise wrong_type("fixed_min", "true or false, or 'propagate' or 'after_relu'", value)
    if isinstance(value, str) and value not in FIXED_MIN_RULES:
        text = f"must be true or false, or 'propagate' or 'after_relu', found {found(value)}"
        raise RuleError(ValueError, "fixed_min", text)


def check_clips(clip_max: object, clip_min: object) -> None:
    """Refuse clip values that give no scale, and one without the other."""
    for key, clip, sign, side in (("clip_max", clip_max, 1.0, "above"), ("clip_min", clip_min, -1.0, "below")):
        if clip is not None and not isinstance(clip, float):
            raise wrong_type(key, "a float such as 1.0, not an integer", clip)
        if clip is not None and not (abs(clip) <= _FLOAT32_MAX and clip * sign > 0.0):
            raise RuleError(ValueError, key, f"must be a finite number {side} 0, found {found(clip)}")
    if isinstance(clip_max, float) and isinstance(clip_min, float):
        if clip_max - clip_min < _SMALLEST_RANGE:
            text = f"and clip_min are closer than {_SMALLEST_RANGE}, found {found(clip_max)} and {found(clip_min)}"
            raise RuleError(ValueError, "clip_max", text)
    elif clip_max is not None or clip_min is not None:
        given, missing = ("clip_min", "clip_max") if clip_max is None else ("clip_max", "clip_min")
        text = f"comes without {missing}; give both, or neither to have them calibrated"
        raise RuleError(ValueError, given, text)


def check_activations(algo: str, settings: Mapping[str, Any], fixed_min: object, symmetric: bool) -> None:
    """Refuse settings that contradict how activations are quantized.

    Args:
        algo: The algorithm.
        settings: The other settings by key, and what they are if they are not given.
        fixed_min: Whether the lower clip stays 0.
        symmetric: Whether the range is one around 0.
    """
    if algo != LEARNED_CLIPS:
        for key, (value, default) in settings.items():
            if value != default:
                what = "that are quantized" if key == "dst_type" else f"with algo '{LEARNED_CLIPS}'"
                text = f"is for activations {what}, and algo is '{algo}'; leave one of the two out"
                raise RuleError(ValueError, key, text)
    clip_max, clip_min = settings["clip_max"][0], settings["clip_min"][0]
    if symmetric and fixed_min not in (None, False):
        text = f"asks for a range around 0, and fixed_min={fixed_min!r} for one from 0 on; leave one of the two out"
        raise RuleError(ValueError, "symmetric", text)
    if symmetric and clip_max is not None and clip_max != -clip_min:
        text = f"must be -clip_max with symmetric=true, found {found(clip_min)} and {found(clip_max)}"
        raise RuleError(ValueError, "clip_min", text)


def check_start(init: object, percentile: object, clip_max: object) -> None:
    """Refuse a choice of where ranges start that there is none of, and what contradicts it."""
    check_choice("init", init, ("mse", "percentile", "output"))
    if clip_max is not None and init != "mse":
        text = f"says what a calibration finds, found {found(init)}, and clip_max is given; leave one of the two out"
        raise RuleError(ValueError, "init", text)
    if percentile is None:
        return
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)):
        raise wrong_type("percentile", "a number such as 99.99", percentile)
    if not 50 < percentile <= 100:
        raise RuleError(ValueError, "percentile", f"must be above 50 and at most 100, found {found(percentile)}")
    if init != "percentile":
        text = f"is for init: percentile, and init is '{init}'; set that, or leave percentile out"
        raise RuleError(ValueError, "percentile", text)


def check_group_size(size: object, dst_type: str, channel_wise: bool | None) -> None:
    """Refuse groups of a length that nobody has, and where they have no place."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise wrong_type("group_size", f"one of {', '.join(map(str, _GROUP_SIZES))}", size)
    if size not in _GROUP_SIZES:
        text = f"must be one of {', '.join(map(str, _GROUP_SIZES))}, found {found(size)}"
        raise RuleError(ValueError, "group_size", text)
    if dst_type != "INT4":
        text = f"is for weights of INT4, and dst_type is {dst_type}; set that to INT4, or leave group_size out"
        raise RuleError(ValueError, "group_size", text)
    if channel_wise is False:
        text = "divides output channels, which channel_wise=false gives one scale; leave one of the two out"
        raise RuleError(ValueError, "group_size", text)


def check_type_pair(data_type: str, weight_type: str) -> None:
    """Refuse a combination of activation and weight types that the hardware does not run."""
    if (data_type, weight_type) not in _TYPE_PAIRS:
        allowed = ", ".join(f"{data} with {weight}" for data, weight in _TYPE_PAIRS)
        raise RuleError(
            ValueError,
            "dst_type",
            f"is {data_type} while that of the weights is {weight_type}; "
            f"the hardware runs these activation/weight pairs: {allowed}",
        )


def check_run(key: str, value: object) -> None:
    """Refuse what a setting that belongs to no layer cannot be."""
    if key in ("version", "batch_num"):
        if not isinstance(value, int):
            raise wrong_type(key, "an integer", value)
        if key == "version" and value != 1:
            raise RuleError(ValueError, key, f"should be 1, found {found(value)}")
        if value < 1:
            raise RuleError(ValueError, key, f"must be at least 1, found {found(value)}")
        if value > _LARGEST_BATCH_NUM:
            raise RuleError(ValueError, key, f"must be at most {_LARGEST_BATCH_NUM}, found {found(value)}")
    if key == "amct_rules":
        check_flag(key, value)
    if key == "fakequant_precision_mode":
        check_choice(key, value, ("DEFAULT", "FORCE_FP16_QUANT"))


def check_keys(raw: Mapping[Any, Any], allowed: tuple[str, ...], hint: str = "") -> None:
    """Refuse keys that are not known; ``hint`` says more where no known key is similar."""
    for key in raw:
        if key not in allowed:
            similar = closest(key, allowed)
            text = f"is not known (allowed: {', '.join(allowed)})"
            raise RuleError(ValueError, str(key), f"{text}.{similar}" if similar else f"{text}{hint}")


def wrong_type(key: str, expected: str, value: object) -> RuleError:
    """Say that ``key`` holds a value of the wrong type."""
    return RuleError(TypeError, key, f"must be {expected}, found {found(value)}")


def found(value: object) -> str:
    """Show a value in a message, shortened, with its type.

    Example:
        >>> found(1)
        '1 (int)'
    """
    return f"{reprlib.repr(value)} ({type(value).__name__})"
