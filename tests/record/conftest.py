from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from amct_lightning.record import LayerRecord, QuantRecord
from amct_lightning.record.checks import OFFSET_RANGES
from amct_lightning.record.layer_record import KVCacheRecord

MODELS = Path(__file__).parent.parent / "golden" / "models_data"


@pytest.fixture(scope="session")
def golden_texts() -> dict[str, str]:
    """The record texts that AMCT wrote, by case; cases where AMCT failed have none."""
    texts = {p.parent.name: json.loads(p.read_text()).get("record_text") for p in sorted(MODELS.glob("*/meta.json"))}
    texts = {case: text for case, text in texts.items() if text is not None}
    assert texts, f"no golden record texts below {MODELS}"
    return texts


def make_layer(**changes: object) -> LayerRecord:
    factors: dict[str, object] = {"scale_d": 0.1, "offset_d": -3, "scale_w": [0.25, 0.3], "offset_w": [0, 0]}
    return LayerRecord(**(factors | changes))  # type: ignore[arg-type]


def full_layer() -> LayerRecord:
    """A layer with every field of the schema set to something else than its default."""
    return make_layer(
        act_type="INT16",
        wts_type="INT4",
        shift_bit=[1, 16],
        tensor_balance_factor=[0.9, 1.1],
        skip_fusion=True,
        dst_type="INT4",
        fakequant_precision_mode="FORCE_FP16_QUANT",
        scale_h=0.7,
        offset_h=300,
        scale_r=[0.1, 0.2, 0.3],
        offset_r=[0, 0, 0],
        kv_cache=KVCacheRecord(scale=[0.5, 0.6], offset=[1, -2]),
    )


scales = st.floats(min_value=2.0**-149, max_value=3.4028234663852886e38, width=32)
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def weights(least: int = 1) -> st.SearchStrategy[list[float]]:
    return st.lists(scales, min_size=least, max_size=4)


@st.composite
def layers(draw: st.DrawFn) -> LayerRecord:
    act_type = draw(st.sampled_from(list(OFFSET_RANGES)))
    offsets = st.integers(*OFFSET_RANGES[act_type])
    scale_w = draw(weights())
    recurrent: dict[str, object] = {}
    if draw(st.booleans()):
        scale_r = draw(weights())
        recurrent = {
            "scale_h": draw(scales),
            "offset_h": draw(offsets),
            "scale_r": scale_r,
            "offset_r": [0] * len(scale_r),
        }
    return make_layer(
        scale_d=draw(scales),
        offset_d=draw(offsets),
        scale_w=scale_w,
        offset_w=[0] * len(scale_w),
        act_type=act_type,
        wts_type=draw(st.sampled_from(list(OFFSET_RANGES))),
        shift_bit=draw(st.sampled_from([[], [0], [16], [3] * len(scale_w)])),
        skip_fusion=draw(st.sampled_from([None, True, False])),
        dst_type=draw(st.none() | keys),
        tensor_balance_factor=draw(weights(0)),
        kv_cache=draw(st.none() | weights(0).map(lambda s: KVCacheRecord(scale=s, offset=[7] * len(s)))),
        **recurrent,
    )


records = st.dictionaries(keys, layers(), max_size=4).map(QuantRecord)
