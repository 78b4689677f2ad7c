"""The settings: in code, as a mapping, in YAML and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

import amct_lightning
from amct_lightning import Distill, QuantRetrainCallback
from amct_lightning.cli import QuantCLI

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 0}, ValueError, r"Distill\(temperature=0\): must be finite and > 0"),
    ({"temperature": -1.0}, ValueError, r"temperature=-1.0\): must be finite and > 0"),
    ({"temperature": float("nan")}, ValueError, r"temperature=nan\): must be finite"),
    ({"temperature": "2"}, TypeError, r"temperature='2'\): must be a number"),
    ({"weight": -0.5}, ValueError, r"Distill\(weight=-0.5\): must be finite and >= 0"),
    ({"weight": float("inf")}, ValueError, "must be finite"),
    ({"weight": True}, TypeError, "must be a number"),
    ({"weight": 0}, ValueError, "the term never counts"),
    ({"final_weight": -1}, ValueError, r"final_weight=-1\): must be finite and >= 0"),
    ({"task_weight": -1}, ValueError, "task_weight=-1"),
    ({"layer_weight": None}, TypeError, "layer_weight=None"),
    ({"start": -1}, ValueError, r"Distill\(start=-1\): epochs are counted from 0"),
    ({"start": 1.5}, ValueError, "is a share of max_epochs and must be in"),
    ({"start": "soon"}, TypeError, "must be an epoch as an integer"),
    ({"end": 3}, ValueError, "is where final_weight is reached"),
    ({"layers": "encoder.*"}, TypeError, r"layers='encoder.\*'\): must be a list of patterns"),
    ({"layers": [3]}, TypeError, "must be a list of patterns"),
    ({"output_loss": "cosine"}, ValueError, "output_loss='cosine'.: must be one of 'kl', 'mse', or None"),
    ({"output_loss": None}, ValueError, "nothing to learn from the teacher"),
    ({"dtype": "int8"}, ValueError, "must be one of 'float32', 'bfloat16', 'float16', or None"),
    ({"module": 3}, TypeError, "module=3"),
    ({"teacher": ""}, TypeError, "must be the path of a file with float weights"),
    ({"offload": 1}, TypeError, r"offload=1\): must be True or False"),
    ({"temprature": 2.0}, ValueError, "there is no field 'temprature'. Did you mean 'temperature'"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG)
def test_wrong_settings_are_refused_when_they_are_given(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        QuantRetrainCallback(distill=fields)


def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(TypeError, match=r"QuantRetrainCallback\(distill=True\): must be a Distill, a mapping"):
        QuantRetrainCallback(distill=True)  # type: ignore[arg-type]


def test_it_is_public() -> None:
    assert amct_lightning.Distill is Distill
    assert QuantRetrainCallback(distill=Distill(weight=0.5)).distill == Distill(weight=0.5)
    assert QuantRetrainCallback().distill is None


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (Distill(weight=0.5), [0.5] * 5),
        (Distill(weight=0.5, start=2), [0, 0, 0.5, 0.5, 0.5]),
        (Distill(weight=0.5, start=0.5), [0, 0, 0.5, 0.5, 0.5]),
        (Distill(weight=1.0, final_weight=0.0), [1, 0.75, 0.5, 0.25, 0]),
        (Distill(weight=0.0, final_weight=1.0, start=1, end=0.75), [0, 0, 0.5, 1, 1]),
    ],
)
def test_the_weight_is_a_function_of_the_moment(settings: Distill, weights: list[float]) -> None:
    assert [settings.weight_at(epoch, 4) for epoch in range(5)] == weights


def test_moments_need_a_training_that_has_them() -> None:
    with pytest.raises(ValueError, match=r"Distill\(end=1.0\): a share of the training needs max_epochs"):
        Distill(final_weight=0.0).weight_at(0.0)
    with pytest.raises(ValueError, match="the end is epoch 2 and must be after the start, epoch 3"):
        Distill(final_weight=0.0, start=3, end=0.5).weight_at(0.0, 4)


def test_the_command_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('quant:\n  distill: {temperature: 2.0, weight: 0.5, layers: ["encoder.*"]}\n')
    made = QuantCLI(BoringModel, run=False, args=["--config", str(path), "--quant.distill.weight=0.25"])
    assert made.trainer.callbacks[0].distill == Distill(temperature=2.0, weight=0.25, layers=["encoder.*"])
    made = QuantCLI(BoringModel, run=False, args=["--quant.distill.temperature=4"])
    assert made.trainer.callbacks[0].distill == Distill(temperature=4.0)
    assert QuantCLI(BoringModel, run=False, args=[]).trainer.callbacks[0].distill is None
