"""Long lists are written and read as protobuf does it, number by number, and without its time for each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from amct_lightning.record import LayerRecord, QuantRecord
from amct_lightning.record.float_lines import read_floats
from amct_lightning.record.long_lists import LONG
from amct_lightning.record.schema import RECORD_SCHEMA
from tests.work import calls

GENERATOR = np.random.default_rng(0)
RANDOM_BITS = GENERATOR.integers(1, 0x7F800000, 20_000).astype(np.uint32).view(np.float32)
VALUES: dict[str, Any] = {
    "as trained": GENERATOR.random(20_000) / 100,
    "of any size": 10 ** GENERATOR.uniform(-15, 8, 20_000),
    "any bits": RANDOM_BITS,
    "powers of two": 2.0 ** np.arange(-126, 127),
    "short ones": np.arange(1, 5_000) / 10_000,
    "near a power of ten": np.nextafter(np.float32(10.0) ** np.arange(-20, 10), np.float32(0)),
    "powers of ten": 10.0 ** np.arange(-30, 10),
}


def record(scales: Any) -> QuantRecord:
    scales = np.asarray(scales, np.float32).tolist()
    return QuantRecord(
        {
            "a.b": LayerRecord(scale_d=0.1, offset_d=-3, scale_w=scales, offset_w=[0] * len(scales)),
            "fc": LayerRecord(scale_d=0.2, offset_d=4, scale_w=[0.5], offset_w=[0]),
        }
    )


def by_protobuf(one: QuantRecord) -> str:
    message = RECORD_SCHEMA.message_class("ScaleOffsetRecord")()
    for name, layer in one.items():
        value = {field: number for field, number in vars(layer).items() if field != "kv_cache"}
        message.record.add(key=name, value=value)
    return text_format.MessageToString(message)


@pytest.mark.parametrize("name", VALUES)
def test_a_long_list_is_written_as_protobuf_writes_it_and_read_back(name: str) -> None:
    one = record(VALUES[name])
    text = one.to_text()
    assert text == by_protobuf(one)
    assert QuantRecord.from_text(text) == one


@given(st.lists(st.floats(2.0**-40, 2.0**40, width=32), min_size=LONG, max_size=2 * LONG))
def test_any_long_list_is_written_as_protobuf_writes_it_and_read_back(scales: list[float]) -> None:
    one = record(scales)
    assert one.to_text() == by_protobuf(one)
    assert QuantRecord.from_text(one.to_text()) == one


START = b"\n    scale_w: "
NUMBERS = st.one_of(
    st.builds("{:.{}g}".format, st.floats(2.0**-149, 2.0**127, width=32), st.integers(1, 17)),
    st.builds("{:.{}f}".format, st.floats(0, 200), st.integers(0, 25)),
    st.builds("{:.{}e}".format, st.floats(0, 1e300), st.integers(0, 20)),
    st.from_regex(r"[0-9.e-]{1,20}", fullmatch=True),
    st.sampled_from(["0", "0.0", "1.", ".5", "00.5", "1e5", "5e-7", "5e-007", "1e-99", "1E-05", "0.5f", "-1.5", "nan"]),
    st.sampled_from(
        [
            "",
            "0.5e-.7",
            "0.5e-7.",
            "0.5e--7",
            "0.5e-e7",
            "0.5e-7e",
            "0.5e-J7",
            "0.5e-0;",
            "0..5",
            "0.5.",
            "0.",
            "0.5-7",
            "x.5",
            "0:5",
        ]
    ),
)


@settings(max_examples=500)
@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_what_is_read_at_once_is_what_protobuf_reads(numbers: list[str]) -> None:
    lines = b"".join(START + number.encode() for number in numbers)
    found = read_floats(lines, START)
    if found is not None:  # else protobuf reads it, or says what is wrong
        message = RECORD_SCHEMA.message_class("SingleLayerRecord")()
        assert found.tolist() == list(text_format.Parse(lines.decode(), message).scale_w)


@given(st.lists(st.builds("{:.9g}".format, st.floats(2.0**-126, 2.0**20, width=32)), min_size=1))
def test_what_protobuf_writes_of_usual_scales_is_read_at_once(numbers: list[str]) -> None:
    assert read_floats(b"".join(START + number.encode() for number in numbers), START) is not None


@given(st.binary(max_size=60))
def test_bytes_that_are_no_list_are_left_to_protobuf(noise: bytes) -> None:
    assert read_floats(START + b"0.5" + noise + START + b"0.5 ", START) is None


def test_the_work_in_python_does_not_grow_with_the_number_of_channels() -> None:
    def work(channels: int) -> int:
        scales = (GENERATOR.random(channels) / 100).astype(np.float32).tolist()
        return calls(lambda: QuantRecord.from_text(record(scales).to_text()).validate())

    assert work(20_000) < work(2_000) + 500  # a call for each of the values would be 18,000


LINE = "    scale_w: 0.25\n"
TEXT = record([0.25] * 50).to_text()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (LINE, "    scale_w: 00.25\n", "line 7: not a record in protobuf text"),
        (LINE, "    scale_w: zero\n", "line 7: not a record in protobuf text"),
        (LINE, "    scale_w: 1-5\n", "line 7: not a record in protobuf text"),
        (LINE, "    scale_w: nan\n", r"layer 'a.b': scale_w\[1\] is nan"),
        (LINE, "    scale_w: -0.25\n", r"layer 'a.b': scale_w\[1\] is -0.25"),
        (LINE, "    scale_w: 0.0\n", r"layer 'a.b': scale_w\[1\] is 0.0"),
        (LINE, "    scale_v: 0.25\n", "line 7: not a record in protobuf text"),
        (LINE, "", "layer 'a.b': scale_w has 49 values and offset_w has 50"),
        ("    offset_w: 0\n", "    offset_w: 3\n", r"layer 'a.b': offset_w\[1\] is 3"),
        ('key: "fc"', 'key: "a.b"', "layer 'a.b': two records have this key"),
        ("    offset_d: -3\n", "", "layer 'a.b': offset_d is missing"),
    ],
)
def test_what_is_wrong_in_a_long_list_is_told_as_in_a_short_one(old: str, new: str, error: str) -> None:
    place = TEXT.rindex(old) if TEXT.count(old) < 10 else TEXT.index(old) + len(old)  # the second one of the long list
    wrong = TEXT[:place] + new + TEXT[place + len(old) :]
    with pytest.raises(ValueError, match=f"^r.txt: {error}"):
        QuantRecord.from_text(wrong, source="r.txt")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LINE, "    scale_w: 0.25  # right\n"),
        (LINE, "  scale_w: 0.25\n"),
        (LINE, "    scale_w: .25f\n"),
        (LINE, "    scale_w: 0.2_5\n"),
        ("record {\n", "record: {\n"),
        ("record {\n", "# a remark\nrecord {\n"),
        ("\n", "\r\n"),
        ("    offset_d: -3\n", ""),
    ],
)
def test_texts_of_another_layout_are_read_too(old: str, new: str) -> None:
    text = TEXT.replace(old, new) if new else TEXT.replace(old, "").replace("  value {\n", f"  value {{\n{old}", 1)
    assert QuantRecord.from_text(text) == record([0.25] * 50)


def test_a_long_list_where_it_does_not_belong_is_told() -> None:
    wrong = 'record {\n  key: "kv"\n  kv_cache_value {\n' + 50 * LINE + "  }\n}\n"
    with pytest.raises(ValueError, match=r"^record text: line 4: .* has no field named"):
        QuantRecord.from_text(wrong)


def test_what_belongs_to_other_features_stays_behind_long_lists() -> None:
    extra = 'record {\n  key: "kv"\n  kv_cache_value {\n    scale: 0.5\n    offset: 1\n  }\n}\n'
    pruned = 'prune_record {\n  producer {\n    name: "a.b"\n  }\n}\n'
    assert QuantRecord.from_text(TEXT + extra + pruned).to_text() == TEXT + extra + pruned
