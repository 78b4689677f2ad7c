"""``activations: {init: percentile}``: a range with a share of the values inside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from amct_lightning import RetrainConfig, calibrate, prepare_qat
from amct_lightning.config import DataConfig, LayerConfig, load_config
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.quantizers.ifmr import ifmr
from amct_lightning.quantizers.starting.percentile import percentile_range


def choices(**more: Any) -> dict[str, Any]:
    return {"activations": {"init": "percentile", **more}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    percentile=st.sampled_from([90.0, 99.0, 99.9, 99.99, 100]),
    kind=st.sampled_from(["free", "fixed_min", "symmetric"]),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
)
def test_the_share_is_inside_and_a_smaller_range_would_lose_it(
    seed: int, sizes: list[int], percentile: float, kind: str, shift: float
) -> None:
    torch.manual_seed(seed)
    batches = [torch.randn(size) + shift for size in sizes]
    if kind == "fixed_min":
        batches = [batch.abs() for batch in batches]
    settings = {} if kind == "free" else {kind: True}
    upper, lower, degenerate = percentile_range(batches, 8, percentile, **settings)
    values = torch.cat(batches)
    outside, rest = len(values) * (100 - percentile) / 100, 1e-6 * len(values)
    assert float(degenerate) == 0
    assert float(((values > upper) | (values < lower)).sum()) <= outside + rest
    if kind == "fixed_min":
        assert float(lower) == 0
        assert float((values >= upper).sum()) >= outside - rest
    elif kind == "symmetric":
        assert float(upper) == -float(lower)
    else:
        for end, beyond in ((upper, values >= upper), (lower, values <= lower)):
            assert float(end) == 0 or float(beyond.sum()) >= outside / 2 - rest


def test_the_two_ends_are_found_on_their_own() -> None:
    values = torch.linspace(-1, 9, 1001)
    upper, lower, _ = percentile_range([values], 8, 100)
    assert (float(upper), float(lower)) == (9, -1)
    result = ifmr([values], 8)
    assert float(result.clip_min) < -6  # for AMCT's search it is one range around 0


def test_values_that_are_mostly_zero_have_the_range_of_all() -> None:
    values = torch.zeros(100_000)
    values[7] = 2.5
    upper, lower, degenerate = percentile_range([values], 8, 99.9)
    assert (float(upper), float(lower), float(degenerate)) == (2.5, 0, 0)
    upper, lower, degenerate = percentile_range([torch.zeros(5)], 8, 99.9)
    assert (float(upper), float(lower), float(degenerate)) == (127, -128, 1)


def test_what_is_not_finite_counts_as_zero() -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -0.5])
    assert [float(end) for end in percentile_range([values], 8, 100)[:2]] == [1.0, -0.5]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_calibration_finds_it(symmetric: bool) -> None:
    x = torch.randn(64, 8)
    x[0, 0] = 50.0
    model: Any = prepare_qat(network(), choices(percentile=99, symmetric=symmetric), x)
    calibrate(model, [x])
    upper, lower, _ = percentile_range([x], 8, 99, symmetric=symmetric)
    quantizer = model[0].input_quantizer
    assert (quantizer.clip_max.item(), quantizer.clip_min.item()) == (upper.item(), lower.item())
    assert upper < 5
    if not symmetric:
        assert float(model[2].input_quantizer.clip_min) == 0


def test_without_a_number_it_is_one_in_ten_thousand() -> None:
    x = torch.randn(64, 8)
    ranges = []
    for more in ({}, {"percentile": 99.99}):
        model: Any = prepare_qat(network(), choices(**more), x)
        calibrate(model, [x])
        ranges.append(model[0].input_quantizer.clips)
    assert all(torch.equal(a, b) for a, b in zip(*ranges, strict=True))


def test_it_is_in_the_plan_and_a_run_is_continued_to_the_bit_while_it_calibrates() -> None:
    x = torch.randn(16, 8)
    first: Any = prepare_qat(network(), {"batch_num": 2, **choices(percentile=95)}, x).train()
    first(x)
    found = find_plan(first)
    assert found is not None
    plan = QuantPlan.from_dict(found[1].to_dict())
    assert plan == found[1]
    assert plan.config["0"].retrain_data_config == DataConfig(init="percentile", percentile=95, fixed_min="propagate")
    second: Any = copy.deepcopy(first)
    for model in (first, second):
        model(2 * x)
    assert torch.equal(first[0].input_quantizer.clip_max, second[0].input_quantizer.clip_max)
    assert torch.equal(first[0].input_quantizer.clip_max, percentile_range([x, 2 * x], 8, 95)[0])
    third: Any = prepare_qat(network(), plan.config, x)
    third.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(third.eval()(x), first.eval()(x))


def test_layers_with_different_starts_share_no_quantizer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.a(x) + self.b(x))

    x = torch.randn(4, 8)
    model: Any = prepare_qat(Two(), {"layers": {"a": choices()}}, x)
    assert model.a.input_quantizer is not model.b.input_quantizer
    model = prepare_qat(Two(), choices(), x)
    assert model.a.input_quantizer is model.b.input_quantizer


def test_at_the_top_it_is_for_the_layers_that_have_a_range_to_calibrate() -> None:
    entries: dict[str, dict[str, Any]] = {
        "a": {"clip_max": 1.0, "clip_min": -1.0},
        "b": {"algo": "per_token"},
        "c": {"init": "mse"},
        "d": {"percentile": 98},
        "e": {"init": None},
    }
    layers = {name: {"activations": entry} for name, entry in entries.items()}
    found = load_config({**choices(percentile=99), "layers": layers}).layers
    data = {name: layer.retrain_data_config for name, layer in found.items()}
    assert [data[name].init for name in "abcde"] == ["mse", "mse", "mse", "percentile", "mse"]
    assert [data[name].percentile for name in "abcde"] == [None, None, None, 98, None]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"init": "max"}, "'activations.init' must be 'mse' or 'percentile'"),
        ({"init": "percentile", "percentile": 0.9999}, "'activations.percentile' must be above 50 and at most 100"),
        ({"percentile": 99}, "'activations.percentile' is for init: percentile, and init is 'mse'"),
        ({"init": "percentile", "clip_max": 1.0, "clip_min": -1.0}, "'activations.init' says what a calibration finds"),
        ({"init": "percentile", "algo": "per_token"}, "'activations.init' is for activations with algo"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_config({"activations": given})
    with pytest.raises(TypeError, match=r"must be a number such as 99\.99"):
        load_config({"activations": {"init": "percentile", "percentile": "99"}})


@pytest.mark.parametrize("key", ["init", "percentile"])
def test_the_files_of_amct_refuse_it(key: str, tmp_path: Path) -> None:
    model, x = network(), torch.ones(1, 8)
    value = {"init": "percentile", "percentile": 99.0}[key]
    raw = {"version": 1, "batch_num": 1, "0": {"retrain_enable": True, "retrain_data_config": {key: value}}}
    with pytest.raises(ValueError, match=rf"layer '0', key 'retrain_data_config.{key}' is not expected: AMCT's files"):
        prepare_qat(model, raw, x)
    file = tmp_path / "my.cfg"
    file.write_text(f'retrain_data_quant_config: {{ ulq_quantize: {{ {key}: "1" }} }}')
    with pytest.raises(ValueError, match=rf"my\.cfg.*{key}"):
        prepare_qat(model, file, x)
    with pytest.raises(ValueError, match="a JSON configuration has no word"):
        RetrainConfig(layers={"0": LayerConfig(retrain_data_config=DataConfig(init="percentile"))}).to_text()
