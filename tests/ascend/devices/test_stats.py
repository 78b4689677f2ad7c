"""Reading what ``npu-smi info`` prints; the tables have the layouts of several generations of devices and drivers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amct_lightning.ascend.stats import NPUSmi, parse_npu_smi, physical_position

A2 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 91.6        48                0    / 0             |
| 0                         | 0000:C1:00.0  | 7           0    / 0          4152 / 65536         |
+===========================+===============+====================================================+
| 4     910B3               | Warning       | 305.2       61                0    / 0             |
| 0                         | 0000:01:00.0  | 98          0    / 0          60011/ 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 4       0                 | 1234          | python                   | 55000                   |
+===========================+===============+====================================================+
"""
A3 = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 172.3       37                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 1           0    / 0          3105 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 2           0    / 0          2894 / 65536         |
+===========================+===============+====================================================+
"""
INFERENCE = """\
| NPU     Name              | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device            | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===========================+=================+======================================================+
| 8       310P3             | OK              | NA           41                0     / 0             |
| 0       0                 | 0000:08:00.0    | 0            1500 / 21534                            |
"""
OLDER = """\
+-------------------------------------------------------------------------------------------+
| NPU     Name                    | Health          | Power(W)          Temp(C)             |
| Chip                            | Bus-Id          | AICore(%)         Memory-Usage(MB)    HBM-Usage(MB) |
+=================================+=================+=======================================+
| 2       910A                    | OK              | 68.9              39                  |
| 0                               | 0000:C1:00.0    | 3                 1131 / 15137        2 / 32768 |
"""
SMALL = """\
| NPU     Name       | Health     | Power(W)   Temp(C)        Hugepages-Usage(page) |
| Chip    Device     | Bus-Id     | AICore(%)  Memory-Usage(MB)                     |
| 0       310        | OK         | 12.8       47             0    / 970            |
| 0       0          | 0000:07:00.0 | 0        457  / 8192                          |
| 0       310        | OK         | 12.8       51             0    / 970            |
| 1       1          | 0000:08:00.0 | 4        458  / 8192                          |
| No running processes found in NPU 0                                              |
"""
LOST = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 0     910B3               | Critical      | NA          NA                NA   / NA            |
| 0                         | NA            | NA          NA   / NA         NA   / NA            |
| 1     910B3               | OK            | 90.1        44                0    / 0             |
| 0                         | 0000:01:00.0  | 5           0    / 0          3300 / 65536         |
"""
KEYS = ("npu.utilization (%)", "npu.temperature (°C)", "npu.power (W)", "npu.hbm_used (MB)", "npu.hbm_total (MB)")


def test_one_chip_per_card() -> None:
    assert parse_npu_smi(A2) == [
        dict(zip(KEYS, (7.0, 48.0, 91.6, 4152.0, 65536.0), strict=True)),
        dict(zip(KEYS, (98.0, 61.0, 305.2, 60011.0, 65536.0), strict=True)),
    ]


def test_two_chips_per_card_and_a_value_that_is_not_known() -> None:
    first, second = parse_npu_smi(A3)
    assert (first["npu.utilization (%)"], first["npu.hbm_used (MB)"]) == (1.0, 3105.0)
    assert (second["npu.utilization (%)"], second["npu.hbm_used (MB)"]) == (2.0, 2894.0)
    assert "npu.power (W)" not in second


def test_a_card_without_hbm_reports_its_memory() -> None:
    (chip,) = parse_npu_smi(INFERENCE)
    assert chip == {
        "npu.utilization (%)": 0.0,
        "npu.temperature (°C)": 41.0,
        "npu.hbm_used (MB)": 1500.0,
        "npu.hbm_total (MB)": 21534.0,
    }


def test_older_drivers_have_other_columns() -> None:
    (chip,) = parse_npu_smi(OLDER)
    assert chip == dict(zip(KEYS, (3.0, 39.0, 68.9, 2.0, 32768.0), strict=True))


def test_a_name_of_digits_is_no_bus_address_and_a_message_is_no_device() -> None:
    assert [chip["npu.temperature (°C)"] for chip in parse_npu_smi(SMALL)] == [47.0, 51.0]
    assert [chip["npu.hbm_used (MB)"] for chip in parse_npu_smi(SMALL)] == [457.0, 458.0]


def test_a_device_that_does_not_answer_keeps_its_place() -> None:
    lost, present = parse_npu_smi(LOST)
    assert lost == {}
    assert present["npu.temperature (°C)"] == 44.0


@pytest.mark.parametrize("text", ["", "dcmi model initialized failed, because the device is used.\n", "| 0 | 1 |"])
def test_what_is_no_table_gives_nothing(text: str) -> None:
    assert parse_npu_smi(text) == []


@given(st.one_of(st.text(), st.lists(st.sampled_from((A2 + A3 + OLDER + SMALL + LOST).splitlines())).map("\n".join)))
def test_no_output_is_an_error(text: str) -> None:
    for chip in parse_npu_smi(text):
        assert set(chip) <= set(KEYS)
        assert all(math.isfinite(value) for value in chip.values())


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [(3, None, 3), (0, "", 0), (0, "4,6", 4), (1, "4, 6", 6), (2, "4,6", -1), (0, "x", -1)],
)
def test_hidden_devices_are_counted_in_the_table(device: int, visible: str | None, expected: int) -> None:
    assert physical_position(device, visible) == expected


def test_the_program_is_asked_once_per_interval(tmp_path: Path) -> None:
    smi = NPUSmi(interval=3600, command=[fake_npu_smi(tmp_path, A2), "info"])
    assert smi.chip(1)["npu.utilization (%)"] == 98.0
    assert smi.chip(0)["npu.utilization (%)"] == 7.0
    assert smi.chip(2) == smi.chip(-1) == {}
    assert (tmp_path / "calls").read_text() == "info\n"


def test_a_program_that_fails_or_is_missing_gives_nothing_and_is_not_asked_again(tmp_path: Path) -> None:
    failing = NPUSmi(interval=0, command=[fake_npu_smi(tmp_path, A2, code=1), "info"])
    assert failing.chip(0) == failing.chip(0) == {}
    assert (tmp_path / "calls").read_text() == "info\n"
    assert NPUSmi(command=[str(tmp_path / "missing")]).chip(0) == {}


def test_a_program_that_hangs_is_given_up(tmp_path: Path) -> None:
    program = tmp_path / "npu-smi"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    assert NPUSmi(timeout=0.2, command=[str(program)]).chip(0) == {}


def fake_npu_smi(folder: Path, table: str, code: int = 0) -> str:
    """A program that prints ``table`` and notes that it was called."""
    (folder / "table").write_text(table)
    program = folder / "npu-smi"
    program.write_text(f"#!/bin/sh\necho $* >> {folder}/calls\ncat {folder}/table\nexit {code}\n")
    program.chmod(0o755)
    return str(program)
