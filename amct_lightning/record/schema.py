"""The protobuf schema (proto2) of the record file, built in a descriptor pool of its own.

AMCT registers messages with these very names in protobuf's default pool. A private pool lets one process use
both. Reading and writing of record texts is in ``proto_text.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MappingProxyType
from typing import Final, NamedTuple

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    EnumValueDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

FILE_NAME: Final = "amct_lightning/record/scale_offset_record.proto"


class _Field(NamedTuple):
    """One line of a message, in the words of a .proto file."""

    label: str
    type: str
    name: str
    number: int
    default: str = ""


_MESSAGES: Final = MappingProxyType(
    {
        "ScaleOffsetRecord": (
            _Field("repeated", "MapFiledEntry", "record", 1),
            _Field("repeated", "PruneRecord", "prune_record", 2),
        ),
        "MapFiledEntry": (
            _Field("optional", "string", "key", 1),
            _Field("optional", "SingleLayerRecord", "value", 2),
            _Field("optional", "SingleLayerKVCacheRecord", "kv_cache_value", 3),
        ),
        "SingleLayerRecord": (
            _Field("optional", "float", "scale_d", 1),
            _Field("optional", "int32", "offset_d", 2),
            _Field("repeated", "float", "scale_w", 3),
            _Field("repeated", "int32", "offset_w", 4),
            _Field("repeated", "uint32", "shift_bit", 5),
            _Field("repeated", "float", "tensor_balance_factor", 6),
            _Field("optional", "bool", "skip_fusion", 9, "false"),
            _Field("optional", "string", "dst_type", 10, "INT8"),
            _Field("optional", "string", "act_type", 11, "INT8"),
            _Field("optional", "string", "wts_type", 12, "INT8"),
            _Field("optional", "string", "fakequant_precision_mode", 13, "DEFAULT"),
            _Field("optional", "float", "scale_h", 21),
            _Field("optional", "int32", "offset_h", 22),
            _Field("repeated", "float", "scale_r", 23),
            _Field("repeated", "int32", "offset_r", 24),
        ),
        "SingleLayerKVCacheRecord": (
            _Field("repeated", "float", "scale", 1),
            _Field("repeated", "int32", "offset", 2),
        ),
        "PruneRecord": (
            _Field("repeated", "PruneNode", "producer", 1),
            _Field("repeated", "PruneNode", "consumer", 2),
            _Field("optional", "PruneNode", "selective_prune", 3),
        ),
        "PruneNode": (
            _Field("required", "string", "name", 1),
            _Field("repeated", "AttrProto", "attr", 2),
        ),
        # AMCT takes AttrProto from another of its files. Only the pruning features read it; here its content
        # is passed through from text to text: the names and types matter and the numbers (ONNX's) do not.
        "AttrProto": (
            _Field("optional", "string", "name", 1),
            _Field("optional", "float", "f", 2),
            _Field("optional", "int64", "i", 3),
            _Field("optional", "bytes", "s", 4),
            _Field("repeated", "float", "floats", 7),
            _Field("repeated", "int64", "ints", 8),
            _Field("repeated", "bytes", "strings", 9),
            _Field("optional", "AttributeType", "type", 20),
        ),
    }
)

_ATTRIBUTE_TYPES: Final = MappingProxyType(
    {"UNDEFINED": 0, "FLOAT": 1, "INT": 2, "STRING": 3, "FLOATS": 6, "INTS": 7, "STRINGS": 8}
)

_SCALARS: Final = MappingProxyType(
    {
        "float": FieldDescriptorProto.TYPE_FLOAT,
        "int32": FieldDescriptorProto.TYPE_INT32,
        "uint32": FieldDescriptorProto.TYPE_UINT32,
        "int64": FieldDescriptorProto.TYPE_INT64,
        "bool": FieldDescriptorProto.TYPE_BOOL,
        "string": FieldDescriptorProto.TYPE_STRING,
        "bytes": FieldDescriptorProto.TYPE_BYTES,
    }
)

_LABELS: Final = MappingProxyType(
    {
        "optional": FieldDescriptorProto.LABEL_OPTIONAL,
        "required": FieldDescriptorProto.LABEL_REQUIRED,
        "repeated": FieldDescriptorProto.LABEL_REPEATED,
    }
)


@cache
def message_class(name: str) -> Callable[..., Message]:
    """Give the protobuf class of one message of the record file.

    Args:
        name: The name of the message, for example ``"SingleLayerRecord"``.

    Returns:
        The class; calling it with field names as keywords makes a message.

    Raises:
        KeyError: If the schema has no such message.

    Example:
        >>> message_class("SingleLayerRecord")(scale_d=0.5, scale_w=[0.25])
        scale_d: 0.5
        scale_w: 0.25
        <BLANKLINE>
    """
    return GetMessageClass(_pool().FindMessageTypeByName(name))


def file_descriptor() -> FileDescriptorProto:
    """Describe the record file's messages as a ``.proto`` file in protobuf's own terms.

    Returns:
        A new description, not registered anywhere.

    Example:
        >>> [message.name for message in file_descriptor().message_type][:2]
        ['ScaleOffsetRecord', 'MapFiledEntry']
    """
    return FileDescriptorProto(
        name=FILE_NAME,
        syntax="proto2",
        message_type=[_message(name, fields) for name, fields in _MESSAGES.items()],
    )


@cache
def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    pool.AddSerializedFile(file_descriptor().SerializeToString())
    return pool


def _message(name: str, fields: tuple[_Field, ...]) -> DescriptorProto:
    message = DescriptorProto(name=name, field=[_field(field) for field in fields])
    if name == "AttrProto":
        values = [EnumValueDescriptorProto(name=word, number=n) for word, n in _ATTRIBUTE_TYPES.items()]
        message.enum_type.append(EnumDescriptorProto(name="AttributeType", value=values))
    return message


def _field(field: _Field) -> FieldDescriptorProto:
    described = FieldDescriptorProto(name=field.name, number=field.number, label=_LABELS[field.label])
    if field.type in _SCALARS:
        described.type = _SCALARS[field.type]
    elif field.type == "AttributeType":
        described.type = FieldDescriptorProto.TYPE_ENUM
        described.type_name = ".AttrProto.AttributeType"
    else:
        described.type = FieldDescriptorProto.TYPE_MESSAGE
        described.type_name = f".{field.type}"
    if field.default:
        described.default_value = field.default
    return described
