from __future__ import annotations

import subprocess
import sys

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from amct_lightning.record.schema import RECORD_SCHEMA

COLLISION = """
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from amct_lightning.record.schema import RECORD_SCHEMA

ours = RECORD_SCHEMA.describe()
names = [message.name for message in ours.message_type]
empty = [DescriptorProto(name=name) for name in names]
theirs = FileDescriptorProto(name=ours.name, syntax="proto2", message_type=empty)
descriptor_pool.Default().AddSerializedFile(theirs.SerializeToString())

from amct_lightning.record import LayerRecord, QuantRecord

layer = LayerRecord(scale_d=0.5, offset_d=0, scale_w=[0.5], offset_w=[0])
record = QuantRecord({"fc": layer})
assert QuantRecord.from_text(record.to_text()) == record
assert not descriptor_pool.Default().FindMessageTypeByName("SingleLayerRecord").fields
"""

CONTRACT = {
    "ScaleOffsetRecord": {"record": 1, "prune_record": 2},
    "MapFiledEntry": {"key": 1, "value": 2, "kv_cache_value": 3},
    "SingleLayerRecord": {
        "scale_d": 1,
        "offset_d": 2,
        "scale_w": 3,
        "offset_w": 4,
        "shift_bit": 5,
        "tensor_balance_factor": 6,
        "skip_fusion": 9,
        "dst_type": 10,
        "act_type": 11,
        "wts_type": 12,
        "fakequant_precision_mode": 13,
        "scale_h": 21,
        "offset_h": 22,
        "scale_r": 23,
        "offset_r": 24,
    },
    "SingleLayerKVCacheRecord": {"scale": 1, "offset": 2},
    "PruneRecord": {"producer": 1, "consumer": 2, "selective_prune": 3},
    "PruneNode": {"name": 1, "attr": 2},
}


@pytest.mark.parametrize("name", CONTRACT)
def test_messages_have_the_names_and_numbers_of_the_contract(name: str) -> None:
    found = {message.name: message for message in RECORD_SCHEMA.describe().message_type}[name]
    assert {field.name: field.number for field in found.field} == CONTRACT[name]


def test_only_the_name_of_a_prune_node_is_required() -> None:
    required = [
        (message.name, field.name)
        for message in RECORD_SCHEMA.describe().message_type
        for field in message.field
        if field.label == FieldDescriptorProto.LABEL_REQUIRED
    ]
    assert required == [("PruneNode", "name")]


@pytest.mark.parametrize(
    ("field", "default"),
    [
        ("skip_fusion", False),
        ("dst_type", "INT8"),
        ("act_type", "INT8"),
        ("wts_type", "INT8"),
        ("fakequant_precision_mode", "DEFAULT"),
    ],
)
def test_absent_fields_have_the_defaults_of_the_contract(field: str, default: object) -> None:
    assert getattr(RECORD_SCHEMA.message_class("SingleLayerRecord")(), field) == default


def test_same_message_names_in_the_default_pool_do_not_collide() -> None:
    # In a process of its own: protobuf's default pool cannot forget what is registered in it.
    subprocess.run([sys.executable, "-c", COLLISION], check=True)
