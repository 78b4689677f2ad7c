"""The protobuf schema (proto2) of the record file.

How a schema becomes classes is in ``proto_schema.py``; reading and writing of record texts in ``proto_text.py``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from amct_lightning.proto_schema import Field, Schema

_MESSAGES: Final = MappingProxyType(
    {
        "ScaleOffsetRecord": (
            Field("repeated", "MapFiledEntry", "record", 1),
            Field("repeated", "PruneRecord", "prune_record", 2),
        ),
        "MapFiledEntry": (
            Field("optional", "string", "key", 1),
            Field("optional", "SingleLayerRecord", "value", 2),
            Field("optional", "SingleLayerKVCacheRecord", "kv_cache_value", 3),
        ),
        "SingleLayerRecord": (
            Field("optional", "float", "scale_d", 1),
            Field("optional", "int32", "offset_d", 2),
            Field("repeated", "float", "scale_w", 3),
            Field("repeated", "int32", "offset_w", 4),
            Field("repeated", "uint32", "shift_bit", 5),
            Field("repeated", "float", "tensor_balance_factor", 6),
            Field("optional", "bool", "skip_fusion", 9, "false"),
            Field("optional", "string", "dst_type", 10, "INT8"),
            Field("optional", "string", "act_type", 11, "INT8"),
            Field("optional", "string", "wts_type", 12, "INT8"),
            Field("optional", "string", "fakequant_precision_mode", 13, "DEFAULT"),
            Field("optional", "float", "scale_h", 21),
            Field("optional", "int32", "offset_h", 22),
            Field("repeated", "float", "scale_r", 23),
            Field("repeated", "int32", "offset_r", 24),
        ),
        "SingleLayerKVCacheRecord": (
            Field("repeated", "float", "scale", 1),
            Field("repeated", "int32", "offset", 2),
        ),
        "PruneRecord": (
            Field("repeated", "PruneNode", "producer", 1),
            Field("repeated", "PruneNode", "consumer", 2),
            Field("optional", "PruneNode", "selective_prune", 3),
        ),
        "PruneNode": (
            Field("required", "string", "name", 1),
            Field("repeated", "AttrProto", "attr", 2),
        ),
        # AMCT takes AttrProto from another of its files. Only the pruning features read it; here its content
        # is passed through from text to text: the names and types matter and the numbers (ONNX's) do not.
        "AttrProto": (
            Field("optional", "string", "name", 1),
            Field("optional", "float", "f", 2),
            Field("optional", "int64", "i", 3),
            Field("optional", "bytes", "s", 4),
            Field("repeated", "float", "floats", 7),
            Field("repeated", "int64", "ints", 8),
            Field("repeated", "bytes", "strings", 9),
            Field("optional", "AttrProto.AttributeType", "type", 20),
        ),
    }
)

_ATTRIBUTE_TYPES: Final = MappingProxyType(
    {"UNDEFINED": 0, "FLOAT": 1, "INT": 2, "STRING": 3, "FLOATS": 6, "INTS": 7, "STRINGS": 8}
)

RECORD_SCHEMA: Final = Schema(
    "amct_lightning/record/scale_offset_record.proto",
    _MESSAGES,
    MappingProxyType({"AttrProto.AttributeType": _ATTRIBUTE_TYPES}),
)
"""The messages of a record file; the root is ``ScaleOffsetRecord``."""
