"""Layers whose weight is computed before each call: configurations that AMCT wrote list them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import amct_lightning as amct
from amct_lightning import RetrainConfig, conversion_report, prepare_qat
from amct_lightning.config import LayerConfig, QuantChoices
from amct_lightning.conversion.make_plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")

KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "old_weight_norm": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


def network(kind: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), KINDS[kind](nn.Linear(4, 4)), nn.Linear(4, 2))


def listing(enabled: bool = True) -> RetrainConfig:
    return RetrainConfig(layers={"0": LayerConfig(), "1": LayerConfig(enabled), "2": LayerConfig()})


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_a_configuration_lists_stays_in_float_and_trains(kind: str, tmp_path: Path) -> None:
    model, x, file = network(kind), torch.randn(2, 4), tmp_path / "config.json"
    listing().to_json(file)
    with pytest.warns(UserWarning, match=r"config\.json: '1' stays in float: 'weight' is .*computed"):
        converted: Any = amct.create_quant_retrain_model(str(file), model, str(tmp_path / "record.txt"), x)
    (row,) = [row for row in conversion_report(converted).rows if not row.quantized]
    assert (row.name, "computed" in (row.reason or "")) == ("1", True)
    for _ in range(3):
        converted.train()(x).sum().backward()


def test_one_that_is_disabled_there_is_no_news(recwarn: pytest.WarningsRecorder) -> None:
    plan = make_plan(network("weight_norm"), listing(enabled=False), torch.randn(2, 4))
    assert list(plan.config) == ["0", "2"]
    assert not [w for w in recwarn if "stays in float" in str(w.message)]


@pytest.mark.parametrize("field", ["skip_layers", "quant_skip_layers"])
def test_a_cfg_file_may_skip_it(field: str, tmp_path: Path) -> None:
    file, x = tmp_path / "simple.cfg", torch.randn(2, 4)
    file.write_text(f'{field}: "1"')
    model = network("old_weight_norm")
    assert list(RetrainConfig.from_simple_config(file, model, x)) == ["0", "2"]
    assert len(amct.quantized_layers(prepare_qat(model, str(file), x))) == 2


def test_choices_may_give_it_settings() -> None:
    choices = QuantChoices(layers={"1": LayerConfig()})
    with pytest.warns(UserWarning, match="'1' stays in float"):
        plan = make_plan(network("weight_norm"), choices, torch.randn(2, 4))
    assert list(plan.config) == ["0", "2"]


@pytest.mark.filterwarnings("ignore:.*stays in float")
def test_nothing_else_to_quantize_is_an_error() -> None:
    with pytest.raises(ValueError, match="No layer retrain enabled"):
        make_plan(network("weight_norm"), RetrainConfig(layers={"1": LayerConfig()}), torch.randn(2, 4))
