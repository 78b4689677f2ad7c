"""A layer is quantized if both training and evaluation run it; the report says why the others are not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import (
    QuantRecord,
    QuantRetrainCallback,
    RetrainConfig,
    conversion_report,
    prepare_qat,
    quantized_layers,
)
from tests.callbacks.conftest import Net, TrainerFactory, loader


class Paths(nn.Module):
    """A layer for evaluation only, one for training only, and one for both."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.evaluation = nn.Linear(32, 3)
        self.auxiliary = nn.Linear(32, 3)
        self.main = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        return self.main(x) + (self.auxiliary(x) if self.training else self.evaluation(x))


class Lit(Net):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net  # type: ignore[assignment]


def test_layers_of_one_path_only_stay_in_float_and_the_record_is_written(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    model = Lit(Paths())
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.main"]
    reasons = {row.name: row.reason or "" for row in conversion_report(model).rows}
    assert reasons["net.evaluation"].startswith("runs in evaluation only")
    assert reasons["net.auxiliary"].startswith("runs in training only")


def test_a_configuration_made_from_the_evaluation_is_accepted(make_trainer: TrainerFactory) -> None:
    model = Lit(Paths())
    config = RetrainConfig.default(model, torch.randn(2, 2, 4, 4))
    assert "net.evaluation" in config
    make_trainer(callbacks=[QuantRetrainCallback(config)]).fit(model, loader())
    assert list(quantized_layers(model)) == ["net.main"]


def test_without_a_trainer_the_path_of_evaluation_counts_as_in_amct() -> None:
    assert list(quantized_layers(prepare_qat(Paths(), None, torch.randn(2, 2, 4, 4)))) == ["evaluation", "main"]


class Dropped(nn.Module):
    """A layer that half of all training steps leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.block = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        return self.head(x if self.training and random.random() < 0.5 else x + self.block(x))


@pytest.mark.parametrize("seed", range(8))
def test_a_layer_that_training_leaves_out_at_random_is_quantized(make_trainer: TrainerFactory, seed: int) -> None:
    model = Lit(Dropped())
    random.seed(seed)
    make_trainer(callbacks=[QuantRetrainCallback()], fast_dev_run=True).fit(model, loader())
    assert "net.block" in quantized_layers(model)


def test_a_shared_quantizer_calibrates_on_the_layer_that_training_runs_first(make_trainer: TrainerFactory) -> None:
    class Order(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Flatten()
            self.a, self.b = nn.Linear(32, 3), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(x)
            return self.b(x) + self.a(x) if self.training else self.a(x) + self.b(x)

    model = Lit(Order())
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    layers = quantized_layers(model)
    assert layers["net.a"].input_quantizer is layers["net.b"].input_quantizer
    assert (layers["net.a"].calibrates_input, layers["net.b"].calibrates_input) == (False, True)


def test_an_input_is_known_to_be_positive_only_if_it_is_so_in_training_as_well(make_trainer: TrainerFactory) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Flatten()
            self.last = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(x).relu()
            return self.last(x - 1 if self.training else x)

    model = Lit(Noisy())
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert not model.net.last.input_quantizer.fixed_min


def test_a_layer_that_the_training_step_passes_by_is_named_with_the_remedy(make_trainer: TrainerFactory) -> None:
    class OwnPath(Net):
        def __init__(self) -> None:
            super().__init__()
            self.decode = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.net(x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.warns(UserWarning, match=r"No record was written: 1 of 3 .*'decode'.*no training batch.*skip_layers"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(OwnPath(), loader())
