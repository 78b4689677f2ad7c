"""When and what the callback converts, and from which input it learns the data flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amct_lightning import QuantRecord, QuantRetrainCallback, RetrainConfig, quantized_layers
from tests.callbacks.conftest import Net, TrainerFactory, loader


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.filterwarnings("ignore:The model is evaluated before")
def test_every_stage_converts(make_trainer: TrainerFactory, stage: str) -> None:
    model = Net()
    getattr(make_trainer(callbacks=[QuantRetrainCallback()]), stage)(model, loader())
    assert list(quantized_layers(model)) == ["net.0", "net.4"]


def test_fit_then_test_then_fit_keeps_the_layers_and_their_calibration(make_trainer: TrainerFactory) -> None:
    model, callback = Net(), QuantRetrainCallback()
    make_trainer(callbacks=[callback]).fit(model, loader())
    first = model.net[0].input_quantizer
    learned = first.clip_max.detach().clone()
    make_trainer(callbacks=[callback]).test(model, loader(), verbose=False)
    assert model.net[0].input_quantizer is first
    assert torch.equal(first.clip_max, learned)
    make_trainer(callbacks=[QuantRetrainCallback()], max_steps=1, max_epochs=-1).fit(model, loader())
    assert model.net[0].input_quantizer is first
    assert not torch.equal(first.clip_max, learned)
    assert torch.allclose(first.clip_max, learned, atol=0.05)


class ConfiguredLate(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))


def test_layers_made_in_configure_model_are_converted(make_trainer: TrainerFactory) -> None:
    model = ConfiguredLate()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert list(quantized_layers(model)) == ["net.1"]


def test_submodule_converts_only_that_part_with_names_relative_to_it(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    model = Net()
    callback = QuantRetrainCallback(record_file=tmp_path / "r.txt", submodule="net")
    make_trainer(callbacks=[callback]).fit(model, loader())
    assert list(QuantRecord.load(tmp_path / "r.txt")) == ["0", "4"]


def test_unknown_submodule_names_the_children(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ValueError, match=r"submodule='nett'.*has no such module.*'net'"):
        make_trainer(callbacks=[QuantRetrainCallback(submodule="nett")]).fit(Net(), loader())


class WithoutForward(pl.LightningModule):
    """Its layers are its own children, and only training_step calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(32, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_submodule_of_a_module_without_forward_runs_on_its_own_input(make_trainer: TrainerFactory) -> None:
    model = WithoutForward()
    callback = QuantRetrainCallback(submodule="head", input_data=torch.zeros(1, 32))
    make_trainer(callbacks=[callback]).fit(model, loader())
    assert not model.head[0].input_quantizer.calibrating


class DictBatches(Net):
    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(pixels * scale)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["pixels"]), batch["labels"])


def _as_dicts(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = zip(*samples, strict=True)
    return {"pixels": torch.stack(x), "labels": torch.stack(y)}


def test_mapping_batches_give_the_arguments_that_forward_names(make_trainer: TrainerFactory) -> None:
    model = DictBatches()
    data = DataLoader(loader().dataset, 8, collate_fn=_as_dicts)
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, data)
    assert len(quantized_layers(model)) == 2


def test_batch_to_input_handles_other_batches(make_trainer: TrainerFactory) -> None:
    class Odd(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        batch = _as_dicts(samples)
        return {"x": batch["pixels"], "y": batch["labels"]}

    data = DataLoader(loader().dataset, 8, collate_fn=collate)

    class NoMatch(Odd):
        def forward(self, image: Tensor) -> Tensor:
            return self.net(image)

    with pytest.raises(ValueError, match=r"forward\(image\) cannot be told.*batch_to_input"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(NoMatch(), data)
    model = NoMatch()
    make_trainer(callbacks=[QuantRetrainCallback(batch_to_input=lambda batch: batch["x"])]).fit(model, data)
    assert len(quantized_layers(model)) == 2


def test_batch_hooks_apply_before_the_data_flow_is_observed(make_trainer: TrainerFactory) -> None:
    class Hooked(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["pixels"], batch["labels"]

    model = Hooked()
    data = DataLoader(loader().dataset, 8, collate_fn=_as_dicts)
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, data)
    assert len(quantized_layers(model)) == 2


def test_drawing_the_first_batch_does_not_change_the_order_of_training(make_trainer: TrainerFactory) -> None:
    def orders(input_data: Tensor | None) -> list[Tensor]:
        seen: list[Tensor] = []

        class Watching(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                seen.append(batch[1].clone())
                return super().training_step(batch, batch_idx)

        pl.seed_everything(3, verbose=False)
        data = DataLoader(loader().dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(5))
        make_trainer(callbacks=[QuantRetrainCallback(input_data=input_data)]).fit(Watching(), data)
        return seen

    for drawn, given in zip(orders(None), orders(torch.zeros(1, 2, 4, 4)), strict=True):
        assert torch.equal(drawn, given)


@pytest.mark.filterwarnings("ignore:The model is evaluated before")
def test_the_sanity_check_calibrates_nothing(make_trainer: TrainerFactory) -> None:
    states = []

    class Watch(pl.Callback):
        def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            quantizer = pl_module.net[0].input_quantizer
            states.append((quantizer.calibrating, quantizer.clip_max.item()))

    make_trainer(callbacks=[QuantRetrainCallback(), Watch()]).fit(Net(), loader(), loader(1))
    assert states == [(True, 1.0)]


def test_two_callbacks_are_refused(make_trainer: TrainerFactory) -> None:
    callbacks = [QuantRetrainCallback(submodule="net"), QuantRetrainCallback()]
    with pytest.raises(ValueError, match="two QuantRetrainCallbacks"):
        make_trainer(callbacks=callbacks).fit(Net(), loader())


class TestBadInput:
    """Refused before any training, with the culprit's name, existing files untouched."""

    @pytest.fixture
    def record(self, tmp_path: Path) -> Path:
        path = tmp_path / "record.txt"
        path.write_text("old content")
        return path

    def refuse(self, make_trainer: TrainerFactory, error: type[Exception], match: str, **kwargs: Any) -> None:
        class NeverTrains(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                raise AssertionError("training has begun")

        model = kwargs.pop("model", None) or NeverTrains()
        with pytest.raises(error, match=match):
            make_trainer(callbacks=[QuantRetrainCallback(**kwargs)]).fit(model, loader())

    def test_missing_config(self, make_trainer: TrainerFactory, record: Path, tmp_path: Path) -> None:
        self.refuse(make_trainer, FileNotFoundError, r"none\.json", config=tmp_path / "none.json", record_file=record)
        assert record.read_text() == "old content"

    @pytest.mark.parametrize(
        ("edit", "error", "match"),
        [
            (lambda c: "{ not json", json.JSONDecodeError, "c.json"),
            (lambda c: c.replace('"batch_num":1,', '"batch_num":1, "batch_num":2,'), ValueError, "batch_num"),
            (lambda c: c.replace('"net.0"', '"net.00"'), ValueError, r"net\.00.*net\.0"),
            (lambda c: c.replace("true", "1", 1), TypeError, "retrain_enable"),
            (lambda c: c.replace('"INT8"', '"INT16"'), ValueError, "INT16"),
            (lambda c: c.replace("true", "false"), ValueError, "enable"),
        ],
        ids=["not json", "duplicate key", "unknown layer", "wrong type", "combination", "nothing enabled"],
    )
    def test_bad_config(
        self, make_trainer: TrainerFactory, record: Path, tmp_path: Path, edit: Any, error: Any, match: str
    ) -> None:
        path = tmp_path / "c.json"
        text = edit(RetrainConfig.default(Net(), torch.zeros(1, 2, 4, 4)).to_text())
        path.write_text(text)
        self.refuse(make_trainer, error, match, config=str(path), record_file=record)
        assert record.read_text() == "old content"
        assert path.read_text() == text

    def test_nothing_to_quantize(self, make_trainer: TrainerFactory, record: Path) -> None:
        class Bare(Net):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Flatten(), nn.PReLU())

        self.refuse(make_trainer, ValueError, "No supported layers", model=Bare(), record_file=record)
        assert record.read_text() == "old content"

    def test_input_that_the_model_rejects(self, make_trainer: TrainerFactory, record: Path) -> None:
        match = r"failed on the given input_data.*\(1, 5, 4, 4\)"
        self.refuse(make_trainer, RuntimeError, match, input_data=torch.zeros(1, 5, 4, 4), record_file=record)
        assert record.read_text() == "old content"

    def test_record_in_a_folder_that_cannot_be_written(self, make_trainer: TrainerFactory, record: Path) -> None:
        self.refuse(make_trainer, OSError, "record file .* cannot be written", record_file=record / "sub" / "r.txt")
        assert record.read_text() == "old content"

    def test_nan_in_a_weight(self, make_trainer: TrainerFactory, record: Path) -> None:
        model = Net()
        model.net[4].weight.data[0, 0] = float("nan")
        self.refuse(make_trainer, ValueError, r"'net\.4' contains NaN", model=model, record_file=record)
        assert record.read_text() == "old content"

    @pytest.mark.parametrize(
        ("kwargs", "error"),
        [
            ({"config": 3}, TypeError),
            ({"input_data": [1]}, TypeError),
            ({"quant_lr_scale": -1.0}, ValueError),
            ({"quant_lr_scale": float("nan")}, ValueError),
            ({"on_nonfinite": "stop"}, ValueError),
        ],
    )
    def test_wrong_arguments(self, kwargs: dict[str, Any], error: type[Exception]) -> None:
        with pytest.raises(error, match=next(iter(kwargs))):
            QuantRetrainCallback(**kwargs)
