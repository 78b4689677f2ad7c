"""Protobuf schemas (proto2) written as Python tables, each in a descriptor pool of its own.

AMCT registers messages with the same names in protobuf's default pool. A private pool lets one process use both.
Which messages a file has is said where the file is read: ``record/schema.py``, ``config/simple_schema.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Final, NamedTuple

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    EnumValueDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    OneofDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass


class Field(NamedTuple):
    """One line of a message, in the words of a .proto file.

    Attributes:
        label: ``"optional"``, ``"required"`` or ``"repeated"``.
        type: A scalar type, or the name of a message or an enum.
        name: The name of the field.
        number: Its number.
        default: Its default value as text; empty if it has none.
        oneof: The oneof it belongs to; empty if it belongs to none.
    """

    label: str
    type: str
    name: str
    number: int
    default: str = ""
    oneof: str = ""


@dataclass(frozen=True)
class Schema:
    """The messages of one kind of file.

    Args:
        file_name: The name of the .proto file.
        messages: The fields of each message.
        enums: The words of each enum and their numbers. An enum inside a message is called ``Message.Enum``.

    Example:
        >>> enums = {"Color": {"RED": 0, "BLUE": 1}}
        >>> schema = Schema("demo.proto", {"Car": (Field("optional", "Color", "color", 1, "BLUE"),)}, enums)
        >>> schema.message_class("Car")().color
        1
    """

    file_name: str
    messages: Mapping[str, tuple[Field, ...]]
    enums: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def message_class(self, name: str) -> Callable[..., Message]:
        """Give the protobuf class of one message.

        Args:
            name: The name of the message.

        Returns:
            The class; calling it with field names as keywords makes a message.

        Raises:
            KeyError: If the schema has no such message.
        """
        return GetMessageClass(self._pool.FindMessageTypeByName(name))

    def describe(self) -> FileDescriptorProto:
        """Describe the messages as a ``.proto`` file in protobuf's own terms, not registered anywhere."""
        return FileDescriptorProto(
            name=self.file_name,
            syntax="proto2",
            message_type=[self._message(name, fields) for name, fields in self.messages.items()],
            enum_type=self._enums_in(""),
        )

    @cached_property
    def _pool(self) -> DescriptorPool:
        pool = DescriptorPool()
        pool.AddSerializedFile(self.describe().SerializeToString())
        return pool

    def _message(self, name: str, fields: tuple[Field, ...]) -> DescriptorProto:
        oneofs = list(dict.fromkeys(line.oneof for line in fields if line.oneof))
        return DescriptorProto(
            name=name,
            field=[self._field(line, oneofs) for line in fields],
            oneof_decl=[OneofDescriptorProto(name=oneof) for oneof in oneofs],
            enum_type=self._enums_in(name),
        )

    def _field(self, line: Field, oneofs: list[str]) -> FieldDescriptorProto:
        described = FieldDescriptorProto(name=line.name, number=line.number, label=_LABELS[line.label])
        if line.type in _SCALARS:
            described.type = _SCALARS[line.type]
        else:
            is_enum = line.type in self.enums
            described.type = FieldDescriptorProto.TYPE_ENUM if is_enum else FieldDescriptorProto.TYPE_MESSAGE
            described.type_name = f".{line.type}"
        if line.default:
            described.default_value = line.default
        if line.oneof:
            described.oneof_index = oneofs.index(line.oneof)
        return described

    def _enums_in(self, message: str) -> list[EnumDescriptorProto]:
        enums = []
        for path, words in self.enums.items():
            owner, _, name = path.rpartition(".")
            if owner == message:
                values = [EnumValueDescriptorProto(name=word, number=number) for word, number in words.items()]
                enums.append(EnumDescriptorProto(name=name, value=values))
        return enums


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
