from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from amct_lightning import prepare_qat
from amct_lightning.record import QuantRecord
from tests.record.conftest import full_layer, make_layer, records

FACTORS = "scale_d: 1 offset_d: 0 scale_w: 1 offset_w: 0"
RECORD = f'record {{ key: "fc" value {{ {FACTORS} }} }}'
PRUNE = (
    'prune_record { producer { name: "conv1" attr { name: "type" type: STRING s: "Conv2d" } '
    'attr { name: "end" type: INT i: 64 } } consumer { name: "bn" } }'
    'prune_record { selective_prune { name: "conv1" attr { name: "mask" type: INTS ints: 3 ints: 32 } } }'
)
KV_ONLY = 'record { key: "attention" kv_cache_value { scale: 0.5 offset: -3 } }'


def test_golden_texts_round_trip_byte_for_byte(golden_texts: dict[str, str]) -> None:
    again = {case: QuantRecord.from_text(text).to_text() for case, text in golden_texts.items()}
    assert again == golden_texts


def test_golden_files_round_trip_byte_for_byte(golden_texts: dict[str, str], tmp_path: Path) -> None:
    for case, text in golden_texts.items():
        path = tmp_path / f"{case}.txt"
        QuantRecord.from_text(text).save(path)
        assert path.read_bytes() == text.encode()


@given(records)
def test_any_valid_record_round_trips_exactly(record: QuantRecord) -> None:
    again = QuantRecord.from_text(record.to_text())
    assert again == record
    assert list(again) == list(record)
    assert again.to_text() == record.to_text()


def test_record_with_every_field_set_round_trips(tmp_path: Path) -> None:
    record = QuantRecord({"lstm": full_layer(), "fc": make_layer()})
    record.save(tmp_path / "record.txt")
    assert QuantRecord.load(tmp_path / "record.txt") == record


@given(st.text() | st.text(alphabet='record{}:value key"scale_d1.-\n#<>[]/,\\x', max_size=80))
@example("\ud800")
@example('record { key: "\ud800" }')
@example('record { key: "\\377" }')
@example("record { value { scale_d: 1e999 offset_d: 99999999999999 } }")
@example("record: [{}, {}]")
@example("record {" * 500)
def test_any_text_gives_a_record_or_a_value_error(text: str) -> None:
    try:
        QuantRecord.from_text(text)
    except ValueError as error:
        assert str(error).startswith("record text: ")


@given(content=st.binary())
@example(content=b"\xff")
def test_any_file_gives_a_record_or_a_value_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any_record.txt"
    path.write_bytes(content)
    try:
        QuantRecord.load(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


@given(data=st.data())
def test_any_damaged_golden_text_gives_a_record_or_a_value_error(
    data: st.DataObject, golden_texts: dict[str, str]
) -> None:
    text = min(golden_texts.values(), key=len)
    start = data.draw(st.integers(0, len(text)))
    damaged = text[:start] + data.draw(st.text(max_size=3)) + text[start + data.draw(st.integers(0, 30)) :]
    try:
        QuantRecord.from_text(damaged).to_text()
    except ValueError as error:
        assert str(error)


def test_empty_file_is_a_record_without_layers(tmp_path: Path) -> None:
    (tmp_path / "record.txt").touch()
    assert len(QuantRecord.load(tmp_path / "record.txt")) == 0


def test_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no record file '.*gone\.txt'.*QuantRecord\.from_model"):
        QuantRecord.load(tmp_path / "gone.txt")


def test_garbage_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "record.txt"
    path.write_text("record {\n  key: fc\n}\n")
    with pytest.raises(ValueError, match=r"record\.txt: line 2: not a record in protobuf text format"):
        QuantRecord.load(path)


def test_bytes_that_are_no_text_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "record.txt"
    path.write_bytes(b"# one\n# two\n\xff")
    with pytest.raises(ValueError, match=r"record\.txt: line 3: .*byte 0xff is not UTF-8"):
        QuantRecord.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"record {{ value {{ {FACTORS} }} }}", "record number 1 has no key"),
        (f'record {{ key: "" value {{ {FACTORS} }} }}', "record number 1 has no key"),
        (RECORD + RECORD, "layer 'fc': two records have this key"),
        (RECORD.replace("scale_d: 1", ""), "layer 'fc': scale_d is missing"),
        (RECORD.replace("offset_d: 0", ""), "layer 'fc': offset_d is missing"),
        (RECORD.replace("scale_w: 1", ""), "layer 'fc': scale_w has 0 values and offset_w has 1"),
        ('record { key: "fc" }', "layer 'fc': value is missing"),
        (RECORD.replace("offset_d: 0", "offset_d: 300"), "layer 'fc': offset_d is 300"),
        (RECORD.replace("scale_d: 1", "scale_d: nan"), "layer 'fc': scale_d is nan"),
        ("prune_record { producer { } }", "a node of a prune_record has no name"),
    ],
)
def test_load_refuses_naming_file_layer_and_field(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"record\.txt: {message}"):
        QuantRecord.load(path)


def test_failing_validation_leaves_the_old_file_untouched(tmp_path: Path) -> None:
    path = tmp_path / "record.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="layer 'fc': scale_d"):
        QuantRecord({"fc": make_layer(scale_d=-1.0)}).save(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("record.txt", "old")]


def test_save_creates_missing_folders_as_the_umask_says(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.txt"
    QuantRecord({"fc": make_layer()}).save(path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    assert (path.stat().st_mode, path.parent.stat().st_mode) == (
        (tmp_path / "file").stat().st_mode,
        (tmp_path / "plain").stat().st_mode,
    )


@pytest.mark.parametrize("name", ["", 5, "\ud800"])
def test_layer_names_that_no_file_can_hold_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="layer"):
        QuantRecord({name: make_layer()}).validate()


def test_prune_records_and_kv_cache_entries_survive_a_load_and_a_save(tmp_path: Path) -> None:
    record = QuantRecord.from_text(RECORD + PRUNE + KV_ONLY)
    record.save(tmp_path / "record.txt")
    text = (tmp_path / "record.txt").read_text()
    assert list(record) == ["fc"]
    assert [text.count(word) for word in ("producer", "selective_prune", "ints: ", "kv_cache_value")] == [
        1,
        1,
        2,
        1,
    ]
    assert QuantRecord.load(tmp_path / "record.txt") == record


def test_record_is_a_mapping_in_the_order_it_was_given() -> None:
    record = QuantRecord({"b": make_layer(), "a": full_layer()})
    assert list(record.items()) == [("b", make_layer()), ("a", full_layer())]


def test_record_does_not_follow_later_changes_of_its_source() -> None:
    source = {"fc": make_layer()}
    record = QuantRecord(source)
    source.clear()
    assert list(record) == ["fc"]


def test_equality_is_exact_and_ignores_the_order() -> None:
    a, b = make_layer(scale_d=1.0), make_layer(scale_d=1.0 + 2.0**-23)
    assert QuantRecord({"a": a, "b": b}) == QuantRecord({"b": b, "a": a})
    assert QuantRecord({"a": a}) != QuantRecord({"a": b})


def test_allclose_takes_floats_within_the_tolerance() -> None:
    a, b = (QuantRecord({"fc": make_layer(scale_d=scale)}) for scale in (1.0, 1.001))
    assert not a.allclose(b)
    assert a.allclose(b, rtol=1e-2)


def test_differences_name_layers_and_fields() -> None:
    here = QuantRecord({"a": make_layer(), "b": make_layer()})
    there = QuantRecord({"b": make_layer(offset_d=1), "c": make_layer()})
    assert here.differences(there) == ["a: only here", "b: offset_d: -3 here, 1 there", "c: only there"]


def test_differences_notice_the_entries_of_other_features() -> None:
    assert len(QuantRecord.from_text(RECORD + PRUNE).differences(QuantRecord.from_text(RECORD))) == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_copies_of_a_record_are_equal(clone: object) -> None:
    record = QuantRecord.from_text(RECORD + PRUNE)
    assert clone(record) == record  # type: ignore[operator]


def test_negative_learned_scales_are_told_with_the_layer() -> None:
    """AMCT trains with them as they are, and records 1."""
    x = torch.randn(4, 4)
    config = {"weights": {"algo": "ulq_retrain"}}
    model = prepare_qat(torch.nn.Sequential(torch.nn.Linear(4, 2)), config, x).train()
    model(x)
    with torch.no_grad():
        model[0].weight_quantizer.scale.neg_()
    with pytest.warns(UserWarning, match=r"negative or zero in '0' \(1\).*quant_lr_scale"):
        assert QuantRecord.from_model(model)["0"].scale_w == [1.0]
