"""A configuration is accepted or refused exactly as the contract's section on the JSON form says.

The rules are written down here a second time, value by value; the few where this package is stricter are marked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amct_lightning.config import RetrainConfig

ELIGIBLE = {"conv1": nn.Conv2d(4, 8, 3), "conv2": nn.Conv2d(8, 12, 3), "fc": nn.Linear(12, 10)}
ANYTHING = [None, True, False, 0, 1, 2, -1, 8, 1.0, -1.0, 0.0, math.nan, math.inf, "", "INT8", "true", [], {}]

FIELDS: dict[str, tuple[list[Any], list[Any]]] = {
    # path: (values that are allowed, values that are not)
    "version": ([1, True], [2, 0]),
    "batch_num": ([1, 5, True], [0, -2, False]),
    "fakequant_precision_mode": (["DEFAULT", "FORCE_FP16_QUANT"], ["FP16"]),
    "foo": ([], [1]),
    "LAYER/retrain_enable": ([True, False], []),
    "LAYER/foo": ([], [1]),
    "LAYER/regular_prune_enable": ([], [False]),
    "LAYER/regular_prune_config": ([], [{}]),
    "LAYER/retrain_data_config": ([{}], []),
    "LAYER/retrain_data_config/algo": (["ulq_quantize"], ["ifmr", "arq_retrain"]),
    "LAYER/retrain_data_config/clip_max": ([2.5, 1e-30], [0.0, -0.5]),
    "LAYER/retrain_data_config/clip_min": ([-2.5, -1e-30], [0.0, 0.5]),
    "LAYER/retrain_data_config/fixed_min": ([True, False], []),
    "LAYER/retrain_data_config/dst_type": (["INT4", "INT8", "INT16"], ["INT2", "int8"]),
    "LAYER/retrain_data_config/foo": ([], [1]),
    "LAYER/retrain_weight_config": ([{}], []),
    "LAYER/retrain_weight_config/algo": (["arq_retrain", "ulq_retrain"], ["ulq_quantize"]),
    "LAYER/retrain_weight_config/channel_wise": ([True, False], []),
    "LAYER/retrain_weight_config/dst_type": (["INT4", "INT8"], ["INT16", "INT2"]),
    "LAYER/retrain_weight_config/foo": ([], [1]),
}
REMOVED = object()


@st.composite
def edited_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid configuration in which up to four values were replaced or removed."""
    raw: dict[str, Any] = {"version": 1, "batch_num": 1}
    for name in draw(st.sets(st.sampled_from([*ELIGIBLE, *ELIGIBLE, "nope"]), min_size=1)):
        raw[name] = {"retrain_enable": True, "retrain_data_config": {}, "retrain_weight_config": {}}
    layers = [name for name in raw if name not in ("version", "batch_num")]
    for _ in range(draw(st.integers(0, 4))):
        path = draw(st.sampled_from(sorted(FIELDS)))
        allowed, forbidden = FIELDS[path]
        choices = st.sampled_from([*allowed, *allowed, *forbidden, REMOVED]) | st.sampled_from(ANYTHING)
        *parents, last = path.replace("LAYER", draw(st.sampled_from(layers))).split("/")
        owner: Any = raw
        for parent in parents:
            owner = owner.setdefault(parent, {}) if isinstance(owner, dict) else None
        if not isinstance(owner, dict):
            continue
        value = draw(choices)
        if value is REMOVED:
            owner.pop(last, None)
        else:
            owner[last] = value
    return json.loads(json.dumps(raw))


def verdicts(raw: dict[str, Any]) -> Iterator[type[Exception]]:
    """Give the error of each rule that is broken."""
    layers = {key: value for key, value in raw.items() if key not in RUN_RULES}
    for key, rule in RUN_RULES.items():
        if key in raw or key != "fakequant_precision_mode":
            yield from rule(raw.get(key, REMOVED))
    for name, layer in layers.items():
        if name not in ELIGIBLE or not isinstance(layer, dict):
            yield ValueError
        if isinstance(layer, dict):
            yield from layer_verdicts(layer, isinstance(ELIGIBLE.get(name), nn.Linear))
    if not any(isinstance(layer, dict) and layer.get("retrain_enable") for layer in layers.values()):
        yield ValueError


def layer_verdicts(layer: dict[str, Any], is_linear: bool) -> Iterator[type[Exception]]:
    data, weight = layer.get("retrain_data_config", {}), layer.get("retrain_weight_config", {})
    # Keys that are not known raise here also directly in a layer, where AMCT ignores them.
    if not set(layer) <= {"retrain_enable", "retrain_data_config", "retrain_weight_config"}:
        yield ValueError
    yield from typed(layer, "retrain_enable", bool)
    for section, rules in ((data, DATA_RULES), (weight, WEIGHT_RULES)):
        if not isinstance(section, dict):
            yield TypeError
            continue
        for key, value in section.items():
            yield from rules[key](value) if key in rules else [ValueError]
    if not isinstance(data, dict) or not isinstance(weight, dict):
        return
    if ("clip_max" in data) != ("clip_min" in data):
        yield ValueError
    pair = data.get("dst_type", "INT8"), weight.get("dst_type", "INT8")
    if pair not in [("INT4", "INT4"), ("INT8", "INT8"), ("INT16", "INT8"), ("INT8", "INT4")]:
        yield ValueError
    if is_linear and weight.get("channel_wise") is True:
        yield ValueError


def typed(raw: dict[str, Any], key: str, kind: type) -> Iterator[type[Exception]]:
    if key in raw and not isinstance(raw[key], kind):
        yield TypeError


def integer(is_allowed: Any) -> Any:
    def rule(value: Any) -> Iterator[type[Exception]]:
        if value is REMOVED:
            yield ValueError
        elif not isinstance(value, int):
            yield TypeError
        elif not is_allowed(value):
            yield ValueError

    return rule


def word(*allowed: str) -> Any:
    def rule(value: Any) -> Iterator[type[Exception]]:
        if not isinstance(value, str):
            yield TypeError
        elif value not in allowed:
            yield ValueError

    return rule


def flag(value: Any) -> Iterator[type[Exception]]:
    if not isinstance(value, bool):
        yield TypeError


def number(sign: float) -> Any:
    def rule(value: Any) -> Iterator[type[Exception]]:
        if not isinstance(value, float):
            yield TypeError
        # NaN, which AMCT lets pass, and infinity are refused here.
        elif not (value * sign > 0 and math.isfinite(value)):
            yield ValueError

    return rule


RUN_RULES = {
    "version": integer(lambda value: value == 1),
    "batch_num": integer(lambda value: value > 0),
    "fakequant_precision_mode": word("DEFAULT", "FORCE_FP16_QUANT"),
}
DATA_RULES = {
    "algo": word("ulq_quantize"),
    "clip_max": number(1.0),
    "clip_min": number(-1.0),
    "fixed_min": flag,
    "dst_type": word("INT4", "INT8", "INT16"),
}
WEIGHT_RULES = {
    "algo": word("arq_retrain", "ulq_retrain"),
    "channel_wise": flag,
    "dst_type": word("INT4", "INT8"),
}


@pytest.mark.filterwarnings("ignore:.*INT8 is used instead of INT4")
@settings(deadline=None)
@given(raw=edited_configs())
def test_content_is_accepted_or_refused_as_the_contract_says(raw: dict[str, Any]):
    expected = set(verdicts(raw))
    if expected:
        with pytest.raises((ValueError, TypeError)) as caught:
            RetrainConfig.from_dict(raw).resolve(ELIGIBLE)
        assert type(caught.value) in expected
        return
    config = RetrainConfig.from_dict(raw)
    assert RetrainConfig.from_dict(json.loads(config.to_text())) == config
    resolved = config.resolve(ELIGIBLE)
    assert list(resolved) == list(ELIGIBLE)
    assert not any(resolved[name].retrain_enable for name in ELIGIBLE if name not in raw)
