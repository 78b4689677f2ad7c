"""From any batch that the module itself understands, and in any precision, the data flow is seen."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from amct_lightning import QuantRetrainCallback, quantized_layers
from tests.callbacks.conftest import Net, TrainerFactory, loader


def dicts() -> DataLoader[Any]:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in samples]), "labels": torch.stack([y for _, y in samples])}

    return DataLoader(loader().dataset, 8, collate_fn=collate)


class KeywordsOnly(Net):
    """As models of Hugging Face are called."""

    def forward(self, **inputs: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(inputs["x"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(**batch), batch["labels"])


class WholeMapping(KeywordsOnly):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.net(batch["x"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch), batch["labels"])


class WholeTuple(Net):
    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        x, _ = batch
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch), batch[1])


class TeacherForced(Net):
    """Takes the targets as well, as sequence models do."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(x) + functional.one_hot(y, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(*batch), batch[1])


@pytest.mark.parametrize("kind", [KeywordsOnly, WholeMapping, WholeTuple, TeacherForced])
def test_batches_of_all_kinds(make_trainer: TrainerFactory, kind: type[Net]) -> None:
    model = kind()
    data = dicts() if issubclass(kind, KeywordsOnly) else loader()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, data)
    assert list(quantized_layers(model)) == ["net.0", "net.4"]


class NoForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("input_data", [None, torch.randn(2, 2, 4, 4)])
def test_a_module_without_forward_is_seen_in_its_step(make_trainer: TrainerFactory, input_data: Tensor | None) -> None:
    model = NoForward()
    make_trainer(callbacks=[QuantRetrainCallback(input_data=input_data)]).fit(model, loader())
    assert list(quantized_layers(model)) == ["net.1"]


def test_a_part_runs_on_its_input_also_in_a_module_without_forward(make_trainer: TrainerFactory) -> None:
    model = NoForward()
    callback = QuantRetrainCallback(submodule="net", input_data=torch.randn(2, 2, 4, 4))
    make_trainer(callbacks=[callback]).fit(model, loader())
    assert list(quantized_layers(model)) == ["net.1"]


@pytest.mark.filterwarnings("ignore:The model is evaluated before")
def test_several_loaders_are_evaluated_one_after_another(make_trainer: TrainerFactory) -> None:
    model = NoForward()
    make_trainer(callbacks=[QuantRetrainCallback()]).test(model, [loader(), loader(1)], verbose=False)
    assert list(quantized_layers(model)) == ["net.1"]


class HalfEncoder(Net):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(2, 2, 1).bfloat16().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.encoder(x))


def test_a_part_in_low_precision_runs_under_autocast(make_trainer: TrainerFactory) -> None:
    model = HalfEncoder()
    make_trainer(callbacks=[QuantRetrainCallback()], precision="bf16-mixed").fit(model, loader())
    assert list(quantized_layers(model)) == ["net.0", "net.4", "encoder"]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_a_model_made_in_another_precision_gets_its_input_in_it(
    make_trainer: TrainerFactory, precision: Any, dtype: torch.dtype
) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback()], precision=precision)
    with trainer.init_module():
        model = Net()
    assert model.net[0].weight.dtype is dtype
    trainer.fit(model, loader())
    assert list(quantized_layers(model)) == ["net.0", "net.4"]
    assert model.net[0].input_quantizer.clip_max.dtype is torch.float32


def test_gradients_taken_inside_forward(make_trainer: TrainerFactory) -> None:
    class Saliency(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.net(x).sum(), x)
            return self.net(x + 0.1 * slope)

    model, data = Saliency(), loader()
    callback = QuantRetrainCallback(allow_reuse=True)
    make_trainer(callbacks=[callback]).fit(model, data)
    assert list(quantized_layers(model)) == ["net.0", "net.4"]
