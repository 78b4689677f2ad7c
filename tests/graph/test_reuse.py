"""Layers that are called several times in one forward, quantized with ``allow_reuse=True``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import QuantRecord, calibrate, prepare_qat, quantized_layers
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.plan import LayerPlan
from amct_lightning.quantizers.ifmr import ifmr
from tests.graph.models import Model


def data() -> Tensor:
    return torch.randn(2, 4)


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.relu(m.b(torch.relu(m.a(x)))))


def plan_of(forward: Callable[..., Any]) -> dict[str, LayerPlan]:
    plan = make_plan(Model(forward), None, data(), allow_reuse=True)
    return {layer.name: layer for layer in plan.layers}


def test_it_is_one_layer_of_the_plan_that_notes_its_calls() -> None:
    plan = plan_of(recurrent)
    assert list(plan) == ["a", "b"]
    assert (plan["a"].calls, plan["b"].calls) == (1, 2)


@pytest.mark.parametrize(
    ("forward", "fixed_min"),
    [
        (recurrent, True),
        (lambda m, x: m.b(m.b(torch.relu(m.a(x)))), False),
        (lambda m, x: m.b(torch.relu(m.b(m.a(x)))), False),
    ],
    ids=["relu_before_all_calls", "relu_before_the_first", "relu_before_the_last"],
)
def test_its_range_starts_at_zero_only_if_a_relu_made_every_input(forward: Any, fixed_min: bool) -> None:
    assert plan_of(forward)["b"].fixed_min is fixed_min


def test_it_shares_its_quantizer_with_no_other_layer() -> None:
    plan = plan_of(lambda m, x: m.a(x) + m.b(x) + m.b(x))
    assert (plan["a"].shares_input_of, plan["b"].shares_input_of) == ("a", "b")


def test_a_batch_norm_behind_one_of_its_calls_is_not_folded() -> None:
    model = Model(lambda m, x: m.bn(m.conv(m.conv(x))))
    (layer,) = make_plan(model, None, torch.randn(2, 2, 4, 4), allow_reuse=True).layers
    assert layer.batch_norm is None


@pytest.mark.parametrize("batch_num", [1, 3])
def test_it_calibrates_on_all_calls_of_batch_num_forwards(batch_num: int) -> None:
    torch.manual_seed(0)
    model, batches = Model(recurrent), [data() for _ in range(batch_num)]
    converted = prepare_qat(model, {"batch_num": batch_num}, data(), allow_reuse=True).train()
    seen: list[Tensor] = []
    converted.b.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for batch in batches:
        assert converted.b.input_quantizer.calibrating
        converted(batch)
    assert not converted.b.input_quantizer.calibrating
    assert len(seen) == 2 * batch_num
    assert torch.equal(converted.b.input_quantizer.clip_max, ifmr(seen, 8).clip_max)


def test_calibrate_needs_no_more_than_batch_num_batches() -> None:
    converted = prepare_qat(Model(recurrent), {"batch_num": 2}, data(), allow_reuse=True)
    calibrate(converted, [data(), data()])
    assert not converted.b.input_quantizer.calibrating


def test_gradients_of_all_calls_add_up_and_it_has_one_record_entry(tmp_path: Path) -> None:
    converted = prepare_qat(Model(recurrent), None, data(), allow_reuse=True).train()
    converted(data()).sum().backward()
    assert converted.b.weight.grad is not None
    assert converted.b.input_quantizer.clip_max.grad is not None
    record = QuantRecord.from_model(converted)
    record.save(tmp_path / "record.txt")
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["a", "b"]


def test_one_module_under_two_names_is_quantized_under_the_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    converted = prepare_qat(model, None, data(), allow_reuse=True).train()
    converted(data())
    assert list(quantized_layers(converted)) == ["0"]
    assert converted[2] is converted[0]
    assert list(QuantRecord.from_model(converted)) == ["0"]


def test_a_number_of_calls_that_changes_with_the_data() -> None:
    """Calibration counts the calls of the example; a forward with more calls ends it earlier."""

    def loop(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        for _ in range(x.shape[0]):
            x = m.b(x)
        return x

    converted = prepare_qat(Model(loop), None, torch.randn(3, 4), allow_reuse=True).train()
    converted(torch.randn(2, 4))
    assert converted.b.input_quantizer.calibrating
    converted(torch.randn(2, 4))
    assert not converted.b.input_quantizer.calibrating


def test_a_recurrent_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y, state = self.rnn(x)
            return self.rnn(y, state)[0]

    converted = prepare_qat(Twice(), None, torch.randn(3, 2, 4), allow_reuse=True).train()
    converted(torch.randn(3, 2, 4)).sum().backward()
    assert list(QuantRecord.from_model(converted)) == ["rnn"]
