"""``FORCE_FP16_QUANT``: the scales of activations in the record are float16, and the offsets belong to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from amct_lightning import QuantRecord, RetrainConfig, prepare_qat
from amct_lightning.record import LayerRecord


def recorded(clip_max: float, clip_min: float, dst_type: str) -> LayerRecord:
    """The record of one layer with the given range."""
    data = {"algo": "ulq_quantize", "dst_type": dst_type, "clip_max": clip_max, "clip_min": clip_min}
    entry = {"retrain_enable": True, "retrain_data_config": data, "retrain_weight_config": {"algo": "arq_retrain"}}
    settings = {"version": 1, "fakequant_precision_mode": "FORCE_FP16_QUANT", "batch_num": 1, "0": entry}
    model = prepare_qat(nn.Sequential(nn.Linear(2, 2)), RetrainConfig.from_dict(settings), torch.ones(1, 2))
    record = QuantRecord.from_model(model)
    record.validate()
    return record["0"]


@pytest.mark.parametrize(
    ("clip_max", "clip_min", "dst_type", "half"),
    [(3.1, -2.7, "INT8", 128), (7.3, -0.01, "INT8", 128), (3.1, -2.7, "INT16", 32768), (40.0, -9.0, "INT16", 32768)],
)
def test_the_offset_maps_the_lower_clip_to_the_smallest_integer(
    clip_max: float, clip_min: float, dst_type: str, half: int
) -> None:
    layer = recorded(clip_max, clip_min, dst_type)
    if layer.scale_d >= 2.0**-14:
        assert layer.scale_d == float(np.float16(layer.scale_d))
    else:
        root = float(np.float16(math.sqrt(layer.scale_d)))
        assert layer.scale_d == pytest.approx(root * root, rel=1e-7)
    assert layer.offset_d == round(-half - float(np.float32(clip_min)) / layer.scale_d)


@pytest.mark.parametrize("clip_min", [-0.7, -0.8, -0.9, -1.1])
def test_of_values_that_are_never_positive_the_offset_stays_in_range(clip_min: float) -> None:
    layer = recorded(1e-6, clip_min, "INT16")
    beyond = round(-32768 - float(np.float32(clip_min)) / layer.scale_d)
    assert layer.offset_d == min(beyond, 32767)


def test_a_scale_that_is_float16_already_keeps_its_offset() -> None:
    layer = recorded(0.625 * 100, -0.625 * 155, "INT8")
    assert (layer.scale_d, layer.offset_d) == (0.625, 27)
