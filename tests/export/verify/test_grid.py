"""Models that compute with what the device computes with: all their files give the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import calibrate, export_onnx, prepare_qat, verify_export
from amct_lightning.modules import quantized_layers


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0])


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
    )


def files_of(model: nn.Module, x: Tensor, folder: Path) -> dict[str, Path]:
    forms: Any = {form: folder / f"{form}.onnx" for form in ("deploy", "fake_quant", "qdq")}
    for form, path in forms.items():
        export_onnx(model, path, x, form)
    return forms


@pytest.mark.parametrize("config", ["INT8", "A8W4", "A4W4"])
def test_every_code_of_a_deployed_network_is_that_of_the_model(tmp_path: Path, config: str) -> None:
    """Also of values at the ties of rounding, where a division and a product with the reciprocal may differ."""
    torch.manual_seed(0)
    x = torch.randn(64, 2, 6, 6)
    model = prepare_qat(network(), config, x, deploy_grid=True)
    calibrate(model, [x])
    first = next(iter(quantized_layers(model).values())).input_quantizer
    ties = (torch.randint(-128, 128, x.shape) + 0.5) * first.scale
    codes = torch.round(ties / first.scale) != torch.round(ties * (1 / first.scale))
    assert codes.any() or config != "INT8"
    report = verify_export(model.eval(), files_of(model, x, tmp_path), [x, ties])
    assert report.ok, report
    for layer in report.forms[0].layers:
        assert (layer.codes_flipped, layer.codes_at_ties, layer.largest_difference) == (0, 0, 0.0), layer
    assert [output.largest for output in report.forms[0].outputs] == [0.0]


def test_the_bias_of_a_qdq_file_has_the_scale_of_input_times_weight(tmp_path: Path) -> None:
    """That is 19 bits of a float, which the scales of input and weight in the record do not make."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    model = prepare_qat(nn.Sequential(nn.Linear(16, 4)), "INT8", x, deploy_grid=True)
    calibrate(model, [x])
    report = verify_export(model.eval(), {"qdq": files_of(model, x, tmp_path)["qdq"]}, [x])
    assert report.ok, report
    assert report.forms[0].layers[0].largest_difference < 1e-6


def test_recurrent_layers(tmp_path: Path) -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 5, 8)
    model = prepare_qat(Recurrent(), "INT8", x, deploy_grid=True)
    calibrate(model, [x])
    report = verify_export(model.eval(), files_of(model, x, tmp_path), [x])
    assert report.ok, report
