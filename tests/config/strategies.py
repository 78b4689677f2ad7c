"""Hypothesis strategies for the objects of a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from amct_lightning.config import DataConfig, LayerConfig, QuantChoices, RetrainConfig, WeightConfig
from amct_lightning.config.json_format import RUN_KEYS

POSITIVE = st.floats(min_value=1e-6, max_value=3e38)
CLIPS = st.one_of(st.just((None, None)), st.tuples(POSITIVE, POSITIVE.map(lambda value: -value)))
TYPE_PAIRS = st.sampled_from([("INT4", "INT4"), ("INT8", "INT8"), ("INT16", "INT8"), ("INT8", "INT4")])
BOOL = st.booleans()
OPTIONAL_BOOL = st.sampled_from([None, True, False])
MODES = st.sampled_from(["DEFAULT", "FORCE_FP16_QUANT"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def layer_configs(draw: st.DrawFn, enabled: st.SearchStrategy[bool] = BOOL) -> LayerConfig:
    (clip_max, clip_min), (data_type, weight_type) = draw(CLIPS), draw(TYPE_PAIRS)
    data = DataConfig("ulq_quantize", clip_max, clip_min, draw(OPTIONAL_BOOL), data_type)
    weight = WeightConfig(draw(st.sampled_from(["arq_retrain", "ulq_retrain"])), draw(OPTIONAL_BOOL), weight_type)
    return LayerConfig(draw(enabled), data, weight)


@st.composite
def retrain_configs(draw: st.DrawFn) -> RetrainConfig:
    names = st.text(max_size=8).filter(lambda name: name not in RUN_KEYS)
    layers = draw(st.dictionaries(names, layer_configs(), max_size=4))
    layers["on"] = LayerConfig()
    return RetrainConfig(batch_num=draw(st.integers(1, 10**6)), fakequant_precision_mode=draw(MODES), layers=layers)


@st.composite
def quant_choices(draw: st.DrawFn, patterns: Sequence[str], kinds: Sequence[str]) -> QuantChoices:
    settings = layer_configs(st.just(True))
    return QuantChoices(
        batch_num=draw(st.integers(1, 10**6)),
        fakequant_precision_mode=draw(MODES),
        defaults=draw(settings),
        types=draw(st.dictionaries(st.sampled_from(kinds), settings, max_size=2)),
        layers=draw(st.dictionaries(st.sampled_from(patterns), settings, max_size=3)),
        skip_layers=tuple(draw(st.lists(st.sampled_from(patterns), max_size=2))),
        skip_types=tuple(draw(st.lists(st.sampled_from(kinds), max_size=2))),
    )
