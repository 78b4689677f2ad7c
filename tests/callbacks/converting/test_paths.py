"""A layer is quantized if both training and evaluation run it; the report says why the others are not."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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


class OneExample(nn.Module):
    """A batch normalization over single values, which does not train on one example."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.evaluation = nn.Linear(32, 3)
        self.main = nn.Linear(32, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        y = self.norm(self.main(x))
        return y if self.training else y + self.evaluation(x * 2)


def told_of_training(model: Lit, make_trainer: TrainerFactory, examples: int) -> list[str]:
    callback = QuantRetrainCallback(input_data=torch.randn(examples, 2, 4, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[callback], fast_dev_run=True).fit(model, loader())
    return [str(warning.message) for warning in caught if "fails in training mode" in str(warning.message)]


def test_an_example_on_which_the_model_does_not_train_is_told_once(make_trainer: TrainerFactory) -> None:
    model = Lit(OneExample())
    (message,) = told_of_training(model, make_trainer, examples=1)
    assert "Lit fails in training mode" in message and "ValueError: Expected more than 1 value per channel" in message
    assert "Give input_data on which it also trains" in message
    assert "net.evaluation" in quantized_layers(model)


def test_nothing_is_told_where_training_was_seen_or_where_there_is_none(make_trainer: TrainerFactory) -> None:
    model = Lit(OneExample())
    assert told_of_training(model, make_trainer, examples=2) == []
    assert "net.evaluation" not in quantized_layers(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*fails in training mode")
        prepare_qat(OneExample(), None, torch.randn(1, 2, 4, 4))
        tested = make_trainer(callbacks=[QuantRetrainCallback(input_data=torch.randn(1, 2, 4, 4))], fast_dev_run=True)
        tested.test(Lit(OneExample()), loader(), verbose=False)
