"""Records in the usual layout are read without protobuf's reader, and as it reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amct_lightning.record import QuantRecord, proto_text
from amct_lightning.record.proto_text import read

COMMENT = "# what is not plain goes to protobuf\n"
LAYER = """record {
  key: "net.0"
  value {
    scale_d: 0.5
    offset_d: -3
    scale_w: 0.25
    scale_w: 1e-05
    offset_w: 0
    offset_w: 0
    shift_bit: 3
    act_type: "INT16"
  }
}
"""
RECURRENT = LAYER.replace("net.0", "lstm").replace(
    "    act_type",
    "    skip_fusion: true\n    scale_h: 0.1\n    offset_h: 1\n    scale_r: 2\n    offset_r: 0\n    act_type",
)


def is_plain(text: str) -> bool:
    return proto_text._plain(text) is not None


@pytest.mark.parametrize(
    "text", [LAYER, LAYER + RECURRENT, LAYER.replace("    scale_w: 0.25\n", "    scale_w: 0.25\n" * 50)]
)
def test_what_is_plain_is_read_as_protobuf_reads_it(text: str) -> None:
    assert is_plain(text)
    assert not is_plain(COMMENT + text)
    assert read(text) == read(COMMENT + text)


@given(
    place=st.integers(0, len(LAYER)),
    gone=st.integers(0, 12),
    new=st.text("0123456789.e-+:\" \n{}#'INTscale_w\\", max_size=4),
)
def test_any_change_of_it_is_read_or_refused_as_protobuf_does(place: int, gone: int, new: str) -> None:
    text = RECURRENT + LAYER[:place] + new + LAYER[place + gone :]

    def outcome(text: str) -> object:
        try:
            return read(text)
        except ValueError:
            return ValueError

    assert outcome(text) == outcome(COMMENT + text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5", "1e39"),
        ("0.5", "nan"),
        ("-3", "99999999999"),
        ('"net.0"', r'"net\n"'),
        ("    offset_d: -3\n", "    offset_d: -3\n    offset_d: -3\n"),
        ("    scale_d: 0.5\n", ""),
        ("value", "kv_cache_value"),
    ],
)
def test_what_is_unusual_is_left_to_protobuf(old: str, new: str) -> None:
    assert not is_plain(LAYER.replace(old, new))


def test_a_name_that_comes_twice_is_refused_as_before() -> None:
    with pytest.raises(ValueError, match=r"layer 'net\.0': two records have this key"):
        QuantRecord.from_text(LAYER + LAYER)


def test_a_large_text_in_another_layout_is_refused_at_once() -> None:
    text = LAYER + "#" + " " * proto_text.MOST_CHARACTERS
    with pytest.raises(ValueError, match=r"r\.txt: larger than 32 million characters, and not laid out as"):
        QuantRecord.from_text(text, "r.txt")
