"""The benchmark as a command, on networks that take no time, and the ways of training it knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import quantized_layers
from tests.benchmarks.bench.__main__ import main, run, select
from tests.benchmarks.bench.measuring import measure
from tests.benchmarks.bench.results import Results, load
from tests.benchmarks.bench.variants import COMPILED, FP32, LOOP, OWN, Variant, amct, executors, usual, variants
from tests.benchmarks.bench.workloads import TINY, WORKLOADS

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    main(["--networks", "tiny", "tiny-lstm", "--variants", OWN, "torch.ao", "--rounds", "1", "--out", str(out)])
    return out


def test_a_run_writes_tables_json_and_chart(folder: Path) -> None:
    results = load(Results, folder / "bench.json")
    assert [network.network for network in results.networks] == ["tiny", "tiny-lstm"]
    assert [each.variant for each in results.networks[0].measured] == [FP32, OWN, "torch.ao"]
    assert results.networks[0].measured[1].stages.keys() == {"conversion", "calibration", "record"}
    assert len(results.machine.load) == 2
    assert (folder / "bench.png").read_bytes().startswith(PNG)
    assert results.machine.cpu in (folder / "bench.md").read_text()


def test_an_lstm_is_compared_with_a_float_loop_as_well(folder: Path) -> None:
    network = load(Results, folder / "bench.json").networks[1]
    ways = {each.variant: each for each in network.measured}
    assert list(ways) == [FP32, LOOP, OWN, "torch.ao"]
    assert ways[OWN].timings[0].ratios.keys() == {FP32, LOOP}
    assert ways["torch.ao"].failed == "ValueError: torch.ao would quantize 1 of 2 layers"
    assert "| wall / the float loop |" in (folder / "bench.md").read_text()


def test_results_are_shown_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--show", str(folder / "bench.json"), "--out", str(tmp_path)])
    assert (tmp_path / "bench.md").read_bytes() == (folder / "bench.md").read_bytes()
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG)
    assert "tiny-lstm: LSTM" in capsys.readouterr().out


def test_the_threads_of_the_process_stay_as_they_were() -> None:
    before = torch.get_num_threads()
    network = measure("tiny", TINY["tiny"], {FP32: variants()[FP32]}, 1, [before + 1, 1])
    assert torch.get_num_threads() == before
    assert [timing.threads for timing in network.measured[0].timings] == [before + 1, 1]


def test_a_variant_that_fails_is_told_and_the_others_go_on() -> None:
    def fail(model: nn.Module, x: Tensor) -> nn.Module:
        raise RuntimeError("no such thing\nin the second line")

    ways = {FP32: variants()[FP32], "failing": Variant("Failing", fail), OWN: variants()[OWN]}
    network = measure("tiny", TINY["tiny"], ways, 1, [1])
    assert [each.failed for each in network.measured] == ["", "RuntimeError: no such thing", ""]
    assert [len(each.timings) for each in network.measured] == [1, 0, 1]


def test_what_is_not_installed_is_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = dataclasses.replace(variants()["torchao"], needs="no_such_module")
    monkeypatch.setattr("tests.benchmarks.bench.__main__.variants", lambda: {FP32: variants()[FP32], "absent": absent})
    results = run({"tiny": TINY["tiny"]}, [], 1, [1], compiled=False, file=tmp_path / "bench.json")
    line = "no_such_module is not installed: .venv/bin/pip install --constraint constraints.txt --editable '.[bench]'"
    assert load(Results, tmp_path / "bench.json") == results
    assert results.left_out == {"absent": line}
    assert f"absent is left out: {line}." in capsys.readouterr().out


def test_the_float_network_is_always_measured_and_compiled_ones_on_demand() -> None:
    assert list(select([OWN], compiled=False)[0]) == [FP32, OWN]
    assert list(select([OWN, "torch.ao"], compiled=True)[0]) == [FP32, OWN, "torch.ao", FP32 + COMPILED, OWN + COMPILED]


def test_every_executor_is_a_variant_of_its_own() -> None:
    known = variants()
    assert [name for name, way in known.items() if way.is_own] == [OWN, *executors()]
    assert (OWN in usual(list(known))) == (not executors())


@pytest.mark.parametrize("name", [OWN, *executors()])
def test_a_variant_of_this_package_quantizes_all_layers_and_leaves_the_float_network(name: str) -> None:
    model, x, way = TINY["tiny"].model(), TINY["tiny"].batch(), variants()[name]
    quantized = way.convert(model, x)
    assert len(quantized_layers(quantized)) == 2
    assert not quantized_layers(model)


def test_amct_is_called_as_its_scripts_do() -> None:
    # This package has AMCT's functions under their own names.
    model, x = TINY["tiny"].model(), TINY["tiny"].batch()
    quantized = amct("amct_lightning", model, x)
    assert len(quantized_layers(quantized)) == 2
    assert not quantized_layers(model)
    quantized.train()(x)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_networks_are_what_they_are_called(name: str) -> None:
    workload = WORKLOADS[name]
    with torch.device("meta"):
        model, x = workload.model(), workload.batch()
        assert model(x).shape[0] == len(x)
    layers = [type(layer).__name__ for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d, nn.LSTM))]
    assert len(layers) == {"mobilenet-v2": 53, "vit": 26, "bert": 18, "mlp": 6, "lstm": 2}.get(name, 21)
