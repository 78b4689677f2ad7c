"""The files that hold results, and the tables made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.bench.machine import Machine
from tests.benchmarks.bench.reports import as_markdown, notes, tables
from tests.benchmarks.bench.results import (
    Clocks,
    Facts,
    Measured,
    NetworkResults,
    Results,
    Spread,
    Timing,
    load,
    save,
)

MACHINE = Machine("A CPU", 2, "AVX2", [0.5, 0.7], "2.13.0", "3.11.7", "0123456789", "2026-11-30 12:00")


def clocks(value: float) -> Clocks:
    return Clocks(Spread(value, value, value), Spread(value, value, value))


@pytest.fixture
def results() -> Results:
    network = NetworkResults("net", "A network", 4)
    network.measured = [
        Measured("fp32", "FP32", "", Facts(100, 0, 1000, 2000, 1000, 4000), {}, [Timing(1, clocks(0.1), {})]),
        Measured(
            "own",
            "Own",
            "",
            Facts(180, 3, 1500, 2500, 2000, 5000),
            {"conversion": clocks(2.0), "calibration": clocks(0.3)},
            [Timing(1, clocks(0.15), {"fp32": clocks(1.5)})],
        ),
        Measured("other", "Other", "ValueError: it cannot"),
    ]
    return Results(MACHINE, 15, {"absent": "it is not installed"}, [network])


def test_results_come_back_from_their_file(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path / "bench.json")
    assert load(Results, tmp_path / "bench.json") == results


def test_a_file_names_the_machine(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path / "bench.json")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["machine"]["capability"] == "AVX2"
    assert content["machine"]["load"] == [0.5, 0.7]
    assert content["networks"][0]["measured"][1]["timings"][0]["threads"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(form=0), "is no result of this benchmark, or one of another version"),
        (lambda content: content.pop("rounds"), "'rounds' missing or unknown"),
        (lambda content: content["machine"].update(cpus="A CPU"), r"machine: 'cpus' missing or unknown.*mean 'cpu'"),
        (lambda content: content.update(rounds="many"), "rounds: 'many' is no int"),
        (lambda content: content["networks"][0].update(measured=None), r"networks\[0\]: measured: None is no list"),
        (lambda content: content["networks"][0].update(quantized_layers=True), "True is no int"),
    ],
)
def test_an_error_names_the_key(results: Results, tmp_path: Path, change: object, message: str) -> None:
    file = tmp_path / "bench.json"
    save(results, file)
    content = json.loads(file.read_text())
    change(content)  # type: ignore[operator]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        load(Results, file)
    assert str(raised.value).startswith(str(file))


def test_tables_have_ratios_to_float_and_extra_operators_per_layer(results: Results) -> None:
    times, costs, failed = tables(results.networks[0])
    assert times[1:] == (
        ["variant", "threads", "step", "wall / FP32", "CPU / FP32"],
        [
            ["FP32", "1", "100.0 ms", "-", "-"],
            ["Own", "1", "150.0 ms", "1.50 (1.50-1.50)", "1.50 (1.50-1.50)"],
        ],
    )
    assert costs[2] == [
        ["FP32", "100", "0.0", "0", "1.00", "1.00", "1.00", "1.00", "-", "-", "-"],
        ["Own", "180", "20.0", "3", "1.50", "1.25", "2.00", "1.25", "2.00 s", "300.0 ms, 2.0 steps", "-"],
    ]
    assert failed[2] == [["Other", "ValueError: it cannot"]]


def test_a_table_as_markdown() -> None:
    assert as_markdown("Head", ["a", "b"], [["1", "2"]]) == "### Head\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_notes_name_machine_load_and_what_is_left_out(results: Results) -> None:
    text = "\n".join(notes(results))
    assert "absent is left out: it is not installed." in text
    assert "A CPU, 2 cores, AVX2, torch 2.13.0" in text
    assert "load 0.5 to 0.7" in text


def test_this_machine_is_named() -> None:
    machine = Machine.this()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.load
