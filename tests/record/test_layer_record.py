from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch

from amct_lightning.record.layer_record import KVCacheRecord, LayerRecord
from tests.record.conftest import full_layer, make_layer

RECURRENT = {"scale_h": 0.5, "offset_h": 0, "scale_r": [0.5], "offset_r": [0]}

WRONG = [
    ({"scale_d": 0.0}, "scale_d is 0.0"),
    ({"scale_d": -0.5}, "scale_d is -0.5"),
    ({"scale_d": math.nan}, "scale_d is nan"),
    ({"scale_d": math.inf}, "scale_d is inf"),
    ({"scale_d": 1e39}, "scale_d is inf"),
    ({"scale_d": 1e-50}, "scale_d is 0.0"),
    ({"offset_d": 128}, "offset_d is 128; with act_type INT8 it must be in -128..127"),
    ({"offset_d": -9, "act_type": "INT4"}, "with act_type INT4 it must be in -8..7"),
    ({"offset_d": 32768, "act_type": "INT16"}, "with act_type INT16 it must be in -32768..32767"),
    ({"act_type": "INT3"}, "act_type is 'INT3'; it must be one of INT4, INT8, INT16"),
    ({"wts_type": None}, "wts_type is None"),
    ({"scale_w": [0.5, -1.0]}, r"scale_w\[1\] is -1.0"),
    ({"scale_w": [0.5]}, "scale_w has 1 values and offset_w has 2"),
    ({"scale_w": [], "offset_w": []}, "scale_w has 0 values"),
    ({"offset_w": [0, 4]}, r"offset_w\[1\] is 4"),
    ({"shift_bit": [0, 3]}, r"shift_bit is \[0, 3\]"),
    ({"shift_bit": [17]}, r"in 1\.\.16"),
    ({"shift_bit": [-1]}, r"in 1\.\.16"),
    ({"shift_bit": [1, 1, 1]}, "shift_bit has 3 values"),
    ({"tensor_balance_factor": [math.nan]}, r"tensor_balance_factor\[0\] is nan"),
    ({"skip_fusion": "yes"}, "skip_fusion is 'yes'"),
    ({"dst_type": 8}, "dst_type is 8"),
    ({"fakequant_precision_mode": "FP16"}, "one of DEFAULT, FORCE_FP16_QUANT"),
    ({"scale_h": 0.5}, "offset_h, scale_r and offset_r are missing"),
    (RECURRENT | {"scale_h": 0.0}, "scale_h is 0.0"),
    (RECURRENT | {"offset_h": 200}, "offset_h is 200"),
    (RECURRENT | {"scale_r": [math.inf]}, r"scale_r\[0\] is inf"),
    (RECURRENT | {"offset_r": [0, 0]}, "scale_r has 1 values and offset_r has 2"),
    (RECURRENT | {"offset_r": [1]}, r"offset_r\[0\] is 1"),
    ({"kv_cache": KVCacheRecord([0.5], [])}, "kv_cache has 1 scales and 0 offsets"),
    ({"kv_cache": KVCacheRecord([0.0], [0])}, r"kv_cache scale\[0\] is 0.0"),
    ({"kv_cache": KVCacheRecord([0.5], [2**31])}, r"kv_cache offset\[0\]"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_validation_names_layer_field_value_and_what_is_allowed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^layer 'block\.conv1': .*{message}"):
        make_layer(**changes).validate("block.conv1")


@pytest.mark.parametrize(
    "changes",
    [
        {"offset_d": -128},
        {"offset_d": 7, "act_type": "INT4", "wts_type": "INT4"},
        {"offset_d": 32767, "act_type": "INT16"},
        {"shift_bit": [0, 0]},
        {"shift_bit": [16]},
        {"shift_bit": [1, 16]},
        {"scale_d": 2.0**-149},
        RECURRENT,
    ],
)
def test_limits_of_the_allowed_ranges_are_valid(changes: dict[str, object]) -> None:
    make_layer(**changes).validate("conv1")


def test_layer_with_every_field_set_is_valid() -> None:
    full_layer().validate("lstm")


def test_floats_are_held_in_the_precision_of_the_file() -> None:
    assert make_layer(scale_d=0.1).scale_d == torch.tensor(0.1).item()


def test_tensors_are_taken_as_numbers() -> None:
    layer = make_layer(scale_d=torch.tensor(0.5), offset_d=torch.tensor(3), scale_w=torch.ones(2))
    assert (layer.scale_d, layer.offset_d, layer.scale_w) == (0.5, 3, [1.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_d": "0.5"}, "scale_d is '0.5'; it must be a number"),
        ({"scale_w": 0.5}, "scale_w is 0.5; it must be a list"),
        ({"scale_w": ["a"]}, r"scale_w\[0\] is 'a'"),
        ({"offset_d": 1.5}, "offset_d is 1.5; it must be an integer"),
    ],
)
def test_what_is_no_number_is_refused_when_the_record_is_made(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_layer(**changes)


def test_caller_lists_are_copied() -> None:
    mine = [0.5, 0.5]
    layer = make_layer(scale_w=mine)
    mine.append(1.0)
    assert layer.scale_w == [0.5, 0.5]


def test_fields_cannot_be_assigned() -> None:
    with pytest.raises(FrozenInstanceError):
        make_layer().scale_d = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal(clone: object) -> None:
    assert clone(full_layer()) == full_layer()  # type: ignore[operator]


def test_differences_ignore_floats_within_the_tolerance() -> None:
    assert make_layer(scale_d=1.0).differences(make_layer(scale_d=1.00005)) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"scale_d": 0.2}, "scale_d: 0.10000000149011612 here, 0.20000000298023224 there"),
        ({"offset_d": 1}, "offset_d: -3 here, 1 there"),
        ({"act_type": "INT16"}, "act_type: 'INT8' here, 'INT16' there"),
        ({"scale_w": [0.25, 0.5]}, "scale_w: 1 of 2 values, first [1]: 0.30000001192092896 here, 0.5 there"),
        ({"scale_w": [0.25]}, "scale_w: 2 values here, 1 there"),
        ({"scale_h": 0.5}, "scale_h: None here, 0.5 there"),
    ],
)
def test_differences_name_the_field_and_both_values(changes: dict[str, object], line: str) -> None:
    assert make_layer().differences(make_layer(**changes)) == [line]


def test_differences_look_into_the_kv_cache() -> None:
    here, there = (make_layer(kv_cache=KVCacheRecord([0.5], [offset])) for offset in (1, 2))
    assert here.differences(there) == ["kv_cache offset: 1 of 1 values, first [0]: 1 here, 2 there"]
    assert len(here.differences(make_layer())) == 1


def test_layer_record_needs_only_the_four_factors() -> None:
    layer = LayerRecord(0.5, 0, [0.5], [0])
    assert (layer.act_type, layer.wts_type, layer.shift_bit, layer.scale_h) == ("INT8", "INT8", [], None)
