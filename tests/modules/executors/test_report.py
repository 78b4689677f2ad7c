"""The conversion report says what runs the layers, and where and why it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from amct_lightning import conversion_report, prepare_qat
from tests.modules.executors.cases import calibrated, case_named, integer_or_skip


class Mixed(nn.Module):
    """Layers that have an integer product, and some of each kind that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 1)
        self.up, self.padded = nn.ConvTranspose2d(32, 32, 2), nn.Conv2d(32, 32, 3, padding=1)
        self.rows, self.head = nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.padded(self.up(self.wide(self.stem(x)))).flatten(2).transpose(1, 2)
        return self.head(self.rows(x)[0])


def report_of(execution: Any, **options: Any) -> str:
    config = {"layers": {"wide": {"activations": {"dst_type": "INT16"}}}}
    return str(
        conversion_report(prepare_qat(Mixed(), config, torch.randn(1, 32, 5, 5), execution=execution, **options))
    )


def test_the_reference_needs_no_words() -> None:
    assert "execution=" not in report_of("composite")
    assert "execution=" not in report_of("auto")  # which is the reference in this suite


def test_kernels_are_named() -> None:
    head = report_of("compiled").splitlines()[1]
    assert head == "Their quantizers run as compiled kernels (execution='compiled')."


def test_layers_without_integer_products_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    integer_or_skip(calibrated(case_named("conv")))
    monkeypatch.setenv("COLUMNS", "300")
    lines = report_of("integer").splitlines()
    assert lines[1] == "Their products are computed in integers in forward (execution='integer')."
    notes = [line.split("execution='integer': ")[1] for line in lines if line.startswith("Note: products in float")]
    assert notes == [
        "its activations have 16 bits, integer operators take 8 at most: 'wide'.",
        "no integer operator computes a layer of type ConvTranspose2d: 'up'.",
        "no integer operator computes a layer of type LSTM: 'rows'.",
    ]


def test_on_the_grid_of_the_device_there_are_none() -> None:
    text = " ".join(report_of("integer", deploy_grid=True).split())
    assert "deploy_grid=True computes with its integers already: 'stem', 'wide', 'up', 'padded'" in text


def test_it_tells_of_a_cpu_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from amct_lightning.modules.integer import onednn

    monkeypatch.setattr(onednn, "obstacle", lambda *_: "this CPU has none")
    monkeypatch.setenv("COLUMNS", "300")
    assert "execution='integer': this CPU has none: 'stem', 'padded', 'head'." in report_of("integer")
