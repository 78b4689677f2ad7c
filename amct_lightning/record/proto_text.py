"""The text form of a record file: between protobuf text and :class:`LayerRecord` objects.

Files, comparison and the mapping that users see are in ``quant_record.py``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message

from amct_lightning.record.checks import RANGELESS
from amct_lightning.record.layer_record import KVCacheRecord, LayerRecord
from amct_lightning.record.long_lists import LISTS, LONG, OFFSETS, cut_lists
from amct_lightning.record.plain_layers import plain_layers
from amct_lightning.record.schema import RECORD_SCHEMA

_ScaleOffsetRecord = RECORD_SCHEMA.message_class("ScaleOffsetRecord")
_SingleLayerRecord = RECORD_SCHEMA.message_class("SingleLayerRecord")
_RECORD = b"\nrecord {\n"

MOST_CHARACTERS = 32 << 20
"""So much of a text is left to protobuf's reader, which needs more than a second for a million characters."""


def read(text: str | bytes) -> tuple[dict[str, LayerRecord], str]:
    """Read a record text.

    Args:
        text: The content of a record file; empty is fine. Bytes must be UTF-8.

    Returns:
        The layers in the order of the text, and the text of what belongs to other features (pruning, and
        entries that hold only a key/value cache), to be given to :func:`write` unchanged.

    Raises:
        ValueError: If the text is not a record, or a layer has no name, no factors, or comes twice.

    Example:
        >>> factors = "scale_d: 1 offset_d: 0 scale_w: 1 offset_w: 0"
        >>> layers, extras = read('record { key: "fc" value { ' + factors + " } }")
        >>> layers["fc"].scale_w, extras
        ([1.0], '')
    """
    plain = _plain(text)
    if plain is not None:
        return {name: LayerRecord(**factors) for name, factors in plain.items()}, ""
    content, lists = _content_and_lists(text)
    layers: dict[str, LayerRecord] = {}
    foreign: list[Message] = []
    seen: set[str] = set()
    for number, entry in enumerate(map(_content, content.get("record", ())), start=1):
        name = _layer_name(entry, number, seen)
        if "value" in entry:
            layers[name] = _layer(name, entry, lists[number - 1])
        else:
            foreign.append(content["record"][number - 1])
    extras = _ScaleOffsetRecord(record=foreign, prune_record=content.get("prune_record", ()))
    return layers, text_format.MessageToString(extras)


def write(layers: Mapping[str, LayerRecord], extras: str = "") -> str:
    """Write a record text in AMCT's layout, floats in their shortest float32 form.

    Args:
        layers: Valid records by layer name.
        extras: What :func:`read` gave as belonging to other features.

    Returns:
        The text.

    Raises:
        ValueError: If ``extras`` is not a record text.

    Example:
        >>> layer = LayerRecord(scale_d=0.1, offset_d=0, scale_w=[0.5], offset_w=[0])
        >>> write({"fc": layer}).splitlines()[1:4]
        ['  key: "fc"', '  value {', '    scale_d: 0.1']
    """
    texts = [piece for name, layer in layers.items() for piece in _layer_text(name, layer)]
    if extras:
        texts.append(text_format.MessageToString(_parse(extras)))
    return "".join(texts)


def _plain(text: str | bytes) -> dict[str, dict[str, Any]] | None:
    """Read a text that holds nothing but layers, all in the usual layout; ``None`` of any other."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if not data.startswith(_RECORD[1:]):
        return None
    return plain_layers(_parts(data[len(_RECORD) - 1 :]))


def _decode(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{text[error.start]:02x} is not UTF-8 text."
        raise ValueError(f"line {line}: not a record in protobuf text format: {found}") from error


def _parse(text: str) -> Message:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"larger than {MOST_CHARACTERS >> 20} million characters, and not laid out as AMCT and this package write "
            "a record, which may be of any size; check the path."
        )
    try:
        message = text_format.Parse(text, _ScaleOffsetRecord())
    except text_format.ParseError as error:
        raise ValueError(_parse_problem(error)) from error
    except UnicodeError as error:
        raise ValueError(f"not a record in protobuf text format: {error}.") from error
    if not message.IsInitialized():
        raise ValueError("a node of a prune_record has no name; every producer and consumer needs one.")
    return message


def _parse_problem(error: text_format.ParseError) -> str:
    line = error.GetLine()
    where = f"line {line}: " if line is not None else ""
    # protobuf begins its own message with "line:column : ".
    found = str(error).partition(" : ")[2] or str(error)
    return f"{where}not a record in protobuf text format (scale_offset_record.proto): {found}"


# Any: protobuf's own type of a field's value; the schema fixes what it is.
def _content(message: Message) -> dict[str, Any]:
    """Give only the fields that the text had, so that absent and default stay apart."""
    return {descriptor.name: value for descriptor, value in message.ListFields()}


def _layer_name(entry: dict[str, Any], number: int, seen: set[str]) -> str:
    name: str = entry.get("key", "")
    if not name:
        raise ValueError(f'record number {number} has no key; every record needs key: "<layer name>".')
    if name in seen:
        raise ValueError(f"layer {name!r}: two records have this key; a layer may have only one.")
    if "value" not in entry and "kv_cache_value" not in entry:
        raise ValueError(f"layer {name!r}: value is missing; it must hold scale_d, offset_d, scale_w, offset_w.")
    seen.add(name)
    return name


def _layer(name: str, entry: dict[str, Any], lists: dict[str, Any]) -> LayerRecord:
    factors: dict[str, Any] = {"scale_w": [], "offset_w": []} | _content(entry["value"]) | lists
    for needed in ("scale_d", "offset_d"):
        if factors.setdefault(needed, None) is None and factors.get("act_type") not in RANGELESS:
            raise ValueError(f"layer {name!r}: {needed} is missing; a record needs exactly one.")
    if "kv_cache_value" in entry:
        cache: dict[str, Any] = {"scale": [], "offset": []} | _content(entry["kv_cache_value"])
        factors["kv_cache"] = KVCacheRecord(**cache)
    return LayerRecord(**factors)


def _content_and_lists(text: str | bytes) -> tuple[dict[str, Any], Sequence[dict[str, Any]]]:
    """Parse a text; return what it has, and for each record the long lists that stand there with one number only."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    cut = [cut_lists(part) for part in _parts(data)]
    # Each part after the first one begins a record, so they belong together if there are as many of both.
    lists: Sequence[dict[str, Any]] = [numbers for _, numbers in cut[(0 if data.startswith(_RECORD[1:]) else 1) :]]
    if any(lists):
        try:
            content = _content(_parse(_decode(_RECORD.join(rest for rest, _ in cut))))
            if _is_as_cut(content.get("record", ()), lists):
                return content, lists
        except ValueError:
            pass  # the whole text says in which line
    content = _content(_parse(_decode(text)))
    return content, [{}] * len(content.get("record", ()))


def _parts(text: bytes) -> Iterator[bytes]:
    """Split a text into its records, one at a time: all at once, a large text would be twice in memory."""
    begin = 0
    while (end := text.find(_RECORD, begin)) >= 0:
        yield text[begin:end]
        begin = end + len(_RECORD)
    yield text[begin:]


def _is_as_cut(records: Sequence[Any], lists: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether each list that was cut is that of its record, in which one number of it is left."""
    return len(records) == len(lists) and all(
        len(getattr(record.value, field)) == 1
        for record, numbers in zip(records, lists, strict=True)
        for field in numbers
    )


def _layer_text(name: str, layer: LayerRecord) -> list[str]:
    """Write one layer, in pieces; of long lists, protobuf writes the first number, and the others are put behind it."""
    entry = _entry(name, layer)
    value = entry["value"]
    rests = {}
    for field in LISTS:
        numbers = value[field]
        if len(numbers) >= LONG:
            value[field], rests[field] = numbers[:1], numbers[1:]
    text = text_format.MessageToString(_ScaleOffsetRecord(record=[entry]))
    pieces, done = [], 0
    for field, rest in rests.items():
        start = f"    {field}: "
        line = text.index("\n", text.index("\n" + start) + 1) + 1
        pieces += [text[done:line], _lines(field, start, rest)]
        done = line
    return [*pieces, text[done:]]


def _lines(field: str, start: str, rest: list[Any]) -> str:
    if field in OFFSETS:
        return "".join(f"{start}{number}\n" for number in rest) if any(rest) else f"{start}0\n" * len(rest)

    def by_protobuf(numbers: list[float]) -> str:
        message = _SingleLayerRecord(**{field: numbers})
        return text_format.MessageToString(message).replace(f"{field}: ", start)

    # NumPy takes a while to load, and a record with short lists does without it.
    import numpy as np  # noqa: PLC0415

    from amct_lightning.record.float_lines import float_lines  # noqa: PLC0415

    return float_lines(start, np.frombuffer(array("f", rest), np.float32), by_protobuf)


def _entry(name: str, layer: LayerRecord) -> dict[str, Any]:
    # The fields carry the names of the schema; protobuf leaves out what is None or an empty list.
    value, cache = dict(vars(layer)), layer.kv_cache
    del value["kv_cache"]
    return {"key": name, "value": value, "kv_cache_value": None if cache is None else vars(cache)}
