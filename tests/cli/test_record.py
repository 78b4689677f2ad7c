"""``amct-lightning record``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from amct_lightning import QuantRecord
from amct_lightning.record import LayerRecord
from tests.cli.conftest import Folder

CONV = LayerRecord(scale_d=0.5, offset_d=-3, scale_w=[0.25, 0.125, 0.5], offset_w=[0, 0, 0])
LSTM = LayerRecord(
    scale_d=0.1, offset_d=1, scale_w=[0.5], offset_w=[0], scale_h=0.01, offset_h=2, scale_r=[0.2], offset_r=[0]
)


def save(path: Path, **layers: LayerRecord) -> str:
    QuantRecord(layers).save(path)
    return path.name


def checkpoint(path: Path, **entry: Any) -> str:
    torch.save({"state_dict": {}, "amct_lightning": entry}, path)
    return path.name


def cells(line: str) -> list[str]:
    return line.split()


def test_show_is_a_table_with_the_range_of_the_input(folder: Folder) -> None:
    out = folder("record", "show", save(folder / "r.txt", conv=CONV, lstm=LSTM)).out.splitlines()
    # by hand: 0.5 * (-128 + 3) and 0.5 * (127 + 3); the table in a pipe has no frame
    assert cells(out[1]) == ["conv", "INT8", "0.5", "-3", "-62.5", "65", "INT8", "3", "0.125", "0.5"]
    assert cells(out[3]) == ["lstm", "(hidden)", "INT8", "0.01", "2", "-1.3", "1.25", "INT8", "1", "0.2", "0.2"]


def test_show_cuts_no_long_name_in_a_pipe(folder: Folder) -> None:
    name = "encoder." * 40 + "fc"
    assert name in folder("record", "show", save(folder / "r.txt", **{name: CONV})).out


def test_show_json_has_every_factor(folder: Folder) -> None:
    content = json.loads(folder("record", "show", save(folder / "r.txt", conv=CONV, lstm=LSTM), "--json").out)
    assert {name: LayerRecord(**layer) for name, layer in content.items()} == {"conv": CONV, "lstm": LSTM}


def test_show_tells_of_a_record_that_is_still_empty(folder: Folder) -> None:
    (folder / "r.txt").touch()
    assert folder("record", "show", "r.txt").out.startswith("'r.txt' holds no layers. A record file is empty until")


def test_check_is_status_0_for_valid_and_1_for_others_and_names_every_layer_with_a_problem(folder: Folder) -> None:
    good = save(folder / "good.txt", conv=CONV)
    text = QuantRecord({"a": CONV, "b": CONV, "c": CONV}).to_text()
    bad = text.replace("offset_d: -3", "offset_d: 300", 1)
    bad = bad[: bad.index('key: "c"')] + bad[bad.index('key: "c"') :].replace("scale_w: 0.25", "scale_w: -1")
    (folder / "bad.txt").write_text(bad)
    (folder / "torn.txt").write_text(text[:100])
    assert folder("record", "check", good) == (0, "good.txt: valid, 1 layer(s).\n", "")
    status, out, _ = folder("record", "check", "bad.txt", good)
    assert status == 1
    assert out.splitlines() == [
        "bad.txt: layer 'a': offset_d is 300; with act_type INT8 it must be in -128..127.",
        "bad.txt: layer 'c': scale_w[0] is -1.0; a scale must be finite and greater than 0 in float32.",
        "good.txt: valid, 1 layer(s).",
    ]
    assert folder("record", "check", "torn.txt").status == 1
    assert folder("record", "check", "missing.txt").status == 2


def test_diff_is_status_0_for_equal_and_1_for_different(folder: Folder) -> None:
    one = save(folder / "one.txt", conv=CONV, lstm=LSTM)
    same = save(folder / "same.txt", lstm=LSTM, conv=CONV)  # the order does not count
    changed = LayerRecord(scale_d=0.5, offset_d=-4, scale_w=[0.25, 0.126, 0.51], offset_w=[0, 0, 0])
    other = save(folder / "other.txt", conv=changed, gru=LSTM)
    assert folder("record", "diff", one, same) == (0, "", "")
    status, out, _ = folder("record", "diff", one, other)
    assert status == 1
    rows = {tuple(cells(line)[:2]): cells(line) for line in out.splitlines()[1:]}
    assert rows["conv", "offset_d"][2:] == ["-3", "-4"]
    assert rows["conv", "scale_w[2]"][2:6] == ["0.5", "0.50999999", "0.02", "relative,"]  # 2 differ, by 0.8 % and 2 %
    assert "(2 of 3 values" in out
    assert cells(out.splitlines()[-2]) == ["lstm", "present", "missing"]
    assert cells(out.splitlines()[-1]) == ["gru", "missing", "present"]


@pytest.mark.parametrize(
    ("tolerance", "status"),
    [([], 1), (["--rtol=0.009"], 1), (["--rtol=0.011"], 0), (["--atol=0.004"], 1), (["--atol=0.006"], 0)],
)
def test_diff_allows_what_the_tolerances_say(folder: Folder, tolerance: list[str], status: int) -> None:
    one = save(folder / "one.txt", conv=CONV)  # 0.5 against 0.505: 1 % or 0.005
    other = save(folder / "other.txt", conv=LayerRecord(0.505, -3, CONV.scale_w, CONV.offset_w))
    assert folder("record", "diff", one, other, *tolerance).status == status


def test_diff_sees_the_entries_of_other_features(folder: Folder) -> None:
    save(folder / "one.txt", conv=CONV)
    pruned = (folder / "one.txt").read_text() + 'prune_record { producer { name: "conv" } }\n'
    (folder / "other.txt").write_text(pruned)
    status, out, _ = folder("record", "diff", "one.txt", "other.txt")
    assert status == 1
    assert "the entries of these features differ" in out


def test_extract_gives_the_text_in_the_checkpoint(folder: Folder) -> None:
    text = QuantRecord({"conv": CONV}).to_text()
    last = checkpoint(folder / "last.ckpt", record=text)
    assert folder("record", "extract", last).out == text
    assert folder("record", "extract", last, "-o", "new/record.txt").status == 0
    assert (folder / "new/record.txt").read_text() == text
    assert folder("record", "extract", last, "-o", "new/record.txt").status == 2
    save(folder / "r.txt", conv=CONV)
    assert folder("record", "diff", last, "r.txt").status == 0
    assert folder("record", "check", last).status == 0


def test_extract_says_why_there_is_no_record(folder: Folder) -> None:
    torch.save({"state_dict": {}}, folder / "float.ckpt")
    assert "was not written in training with QuantRetrainCallback" in folder("record", "extract", "float.ckpt").err
    early = checkpoint(folder / "early.ckpt", record=None)
    assert "saved before the calibration was complete" in folder("record", "extract", early).err
    damaged = checkpoint(folder / "damaged.ckpt", record="record {")
    assert folder("record", "extract", damaged, "-o", "r.txt").status == 2
    assert not (folder / "r.txt").exists()


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_checkpoint_is_read_without_running_code_from_it(folder: Folder) -> None:
    checkpoint(folder / "bad.ckpt", record=QuantRecord({"conv": CONV}).to_text(), more=Hostile())
    for command in ("extract", "show", "check"):
        status, _, err = folder("record", command, "bad.ckpt")
        assert status == 2
        assert "cannot be read without running code from it" in err
    assert not (folder / "executed").exists()
