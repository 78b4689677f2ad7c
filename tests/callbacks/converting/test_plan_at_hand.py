"""With a plan at hand, in a checkpoint or in the model, the model need not run to be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import (
    QuantRecord,
    QuantRetrainCallback,
    conversion_report,
    load_qat_checkpoint,
    quantized_layers,
)
from amct_lightning.conversion.convert import revert_layers
from tests.callbacks.conftest import Net, TrainerFactory, loader


@pytest.fixture
def checkpoint(make_trainer: TrainerFactory, tmp_path: Path) -> Path:
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_brings_the_plan(
    make_trainer: TrainerFactory, checkpoint: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran to be converted")

    monkeypatch.setattr("amct_lightning.graph.eligibility.observe", forbidden)
    model = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=3)
    getattr(trainer, stage)(model, loader(), ckpt_path=checkpoint)
    assert list(quantized_layers(model)) == ["net.0", "net.4"]


def test_empty_weights_that_a_checkpoint_fills(make_trainer: TrainerFactory, checkpoint: Path) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=3)
    with trainer.init_module(empty_init=True):
        model = Net()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    trainer.fit(model, loader(), ckpt_path=checkpoint)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_a_configuration_that_is_another_one_is_refused_as_ever(make_trainer: TrainerFactory, checkpoint: Path) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback({"skip_layers": ["net.4"]})], max_epochs=3)
    with pytest.raises(ValueError, match=r"quantized differently from the model.*'net.4'"):
        trainer.fit(Net(), loader(), ckpt_path=checkpoint)


def test_a_replaced_head_is_quantized_and_calibrates(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = Net()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    kept = model.net[0].input_quantizer
    before = kept.clip_max.item()
    model.net[4] = nn.Linear(64, 3)
    with pytest.warns(UserWarning, match=r"Replaced in Net since its conversion: 'net.4'"):
        make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=1, limit_train_batches=1).fit(model, loader())
    assert model.net[0].input_quantizer is kept
    assert kept.clip_max.item() == pytest.approx(before, abs=0.05)
    assert model.net[4].input_quantizer.has_range
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.0", "net.4"]


def test_a_replaced_layer_of_another_kind_is_refused_with_the_remedy(make_trainer: TrainerFactory) -> None:
    model = Net()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    model.net[4] = nn.Sequential(nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"'net.4'.*Sequential"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    model.net[4] = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match=r"'net.4' was a Linear .* is a Conv2d now.*revert_layers"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())


def test_a_part_that_was_reverted_stays_in_float(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = Net()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    revert_layers(model.net[4])
    assert list(quantized_layers(model)) == ["net.0"]
    assert [row.name for row in conversion_report(model).rows if row.quantized] == ["net.0"]
    assert list(QuantRecord.from_model(model)) == ["net.0"]
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.0"]


def test_a_model_that_was_reverted_part_by_part_is_refused_until_the_whole_is(make_trainer: TrainerFactory) -> None:
    model = Net()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    revert_layers(model.net)
    with pytest.raises(ValueError, match=r"reverted part by part.*revert_layers on the whole"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    revert_layers(model)
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert list(quantized_layers(model)) == ["net.0", "net.4"]


def test_a_part_that_owned_a_shared_quantizer_leaves_it_to_the_others(make_trainer: TrainerFactory) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Flatten()
            self.a, self.b, self.c = nn.Linear(32, 3), nn.Linear(32, 3), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(x)
            return self.a(x) + self.b(x) + self.c(x)

    class Lit(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = Twins()  # type: ignore[assignment]

    model = Lit()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    whole = QuantRecord.from_model(model)
    revert_layers(model.net.a)
    part = QuantRecord.from_model(model)
    assert list(part) == ["net.b", "net.c"]
    assert part["net.b"].scale_d == whole["net.b"].scale_d == part["net.c"].scale_d


def test_two_parts_converted_in_two_runs_make_a_checkpoint_that_can_be_loaded(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    class TwoParts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(2, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.first(x))

    model = TwoParts()
    make_trainer(callbacks=[QuantRetrainCallback(submodule="first")]).fit(model, loader())
    trainer = make_trainer(callbacks=[QuantRetrainCallback(submodule="net")])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    x = torch.randn(2, 2, 4, 4)
    loaded = load_qat_checkpoint(TwoParts(), tmp_path / "last.ckpt")
    assert list(quantized_layers(loaded)) == ["net.0", "net.4", "first.0"]
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    again = TwoParts()
    make_trainer(callbacks=[QuantRetrainCallback(submodule="net")], max_epochs=3).fit(
        again, loader(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert list(quantized_layers(again)) == ["net.0", "net.4", "first.0"]
