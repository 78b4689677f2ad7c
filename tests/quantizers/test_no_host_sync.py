"""A training step never waits for the device: no tensor is read on the host, whatever its value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import prepare_qat
from amct_lightning.modules import activation_quantizers
from tests.operators import Operators


class TrainingStep:
    """A converted conv-bn-relu-linear network with one optimizer step."""

    def __init__(self) -> None:
        float_model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        self.x = torch.randn(2, 2, 6, 6)
        self.model = prepare_qat(float_model, None, self.x).train()
        # foreach=False, because on the CPU the foreach implementation of SGD is the same without it.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def __call__(self, x: Tensor | None = None) -> Operators:
        with Operators() as operators:
            loss = self.model(self.x if x is None else x).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        assert operators.counts["aten::convolution"] == 1
        return operators


@pytest.fixture
def step() -> TrainingStep:
    return TrainingStep()


def test_the_calibrating_step_reads_nothing_on_the_host(step: TrainingStep) -> None:
    operators = step()
    assert not any(q.calibrating for q in activation_quantizers(step.model).values())
    assert operators.host_reads == {}


def test_a_step_after_calibration_reads_nothing_on_the_host(step: TrainingStep) -> None:
    step()
    assert step().host_reads == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_activations_are_noticed_without_reading_them(step: TrainingStep, value: float) -> None:
    step()
    bad = step.x.clone()
    bad[0, 0, 0, 0] = value
    assert step(bad).host_reads == {}
    assert step.model[0].input_quantizer.nonfinite
