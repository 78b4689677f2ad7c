"""What ``fixed_min`` may be in which form, and how AMCT's files say what its rules find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import RetrainConfig, create_quant_retrain_config
from amct_lightning.config import DataConfig, LayerConfig, QuantChoices
from amct_lightning.config.friendly import parse_choices

PROPAGATE = {"activations": {"fixed_min": "propagate"}}
WORDS = r"true or false, or 'propagate' or 'after_relu'"
X = torch.ones(2, 8)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def given(config: RetrainConfig) -> list[Any]:
    return [layer.retrain_data_config.fixed_min for layer in config.values()]


@pytest.mark.parametrize("word", ["propagate", "after_relu", True, False])
def test_choices_have_words_for_the_rules(word: str | bool) -> None:
    assert parse_choices({"activations": {"fixed_min": word}}).defaults.retrain_data_config.fixed_min == word


@pytest.mark.parametrize(
    ("value", "kind", "found"), [("always", ValueError, r"'always' \(str\)"), (1, TypeError, r"1 \(int\)")]
)
def test_other_words_are_refused(value: Any, kind: type[Exception], found: str) -> None:
    with pytest.raises(kind, match=rf"^config: key 'activations\.fixed_min' must be {WORDS}, found {found}\.$"):
        parse_choices({"activations": {"fixed_min": value}})


def test_amct_s_json_has_no_words() -> None:
    raw = RetrainConfig(layers={"fc": LayerConfig()}).to_dict()
    raw["fc"]["retrain_data_config"]["fixed_min"] = "propagate"  # type: ignore[index]
    with pytest.raises(
        TypeError, match=r"layer 'fc', key 'retrain_data_config.fixed_min' must be true or false, found"
    ):
        RetrainConfig.from_dict(raw)


def test_a_word_that_a_json_file_has_not_is_not_written(tmp_path: Path) -> None:
    config = RetrainConfig(layers={"fc": LayerConfig(retrain_data_config=DataConfig(fixed_min="propagate"))})
    with pytest.raises(ValueError, match=r"fixed_min is 'propagate' for 'fc', .*RetrainConfig\.from_choices"):
        config.to_json(tmp_path / "config.json")
    config["fc"] = LayerConfig(retrain_data_config=DataConfig(fixed_min="after_relu"))
    assert "fixed_min" not in config.to_text()


def test_a_configuration_for_a_model_says_what_was_found() -> None:
    config = RetrainConfig.from_choices(PROPAGATE, network(), X)
    assert given(config) == [None, True, None]  # the last one AMCT's rule finds
    assert json.loads(config.to_text())["2"]["retrain_data_config"]["fixed_min"] is True


@pytest.mark.parametrize("choices", [None, {}, "INT8", QuantChoices(), {"activations": {"fixed_min": "after_relu"}}])
def test_amct_s_configuration_is_as_ever_where_nothing_is_asked_for(choices: Any, tmp_path: Path) -> None:
    create_quant_retrain_config(str(tmp_path / "amct.json"), network(), X)
    assert RetrainConfig.from_choices(choices, network(), X).to_text() == (tmp_path / "amct.json").read_text()


def test_a_recurrent_layer_is_left_to_amct_s_rule() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(torch.sigmoid(x))

    with pytest.warns(UserWarning, match="the input of layer 'rnn' is never negative, but AMCT's format has one"):
        config = RetrainConfig.from_choices(PROPAGATE, Net(), torch.ones(2, 3, 4))
    assert given(config) == [None]
