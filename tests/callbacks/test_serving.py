"""``target="serving"`` under a Trainer: the arithmetic goes with precision and checkpoint, and not into ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import QuantRecord, QuantRetrainCallback, conversion_report, load_qat_checkpoint, quantized_layers
from amct_lightning.modules.grid.serving import serving_factors
from tests.callbacks.conftest import TrainerFactory


class Text(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0].to(next(self.parameters()).dtype)).float().square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def batches() -> Any:
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 8)), batch_size=4)


def serving_of(model: nn.Module) -> set[Any]:
    return {layer.serving for layer in quantized_layers(model).values()}


@pytest.mark.parametrize(
    ("precision", "target", "expected"),
    [
        ("32-true", "serving", torch.bfloat16),
        ("32-true", "serving_float16", torch.float16),
        ("bf16-mixed", "serving", torch.bfloat16),
        ("bf16-true", "serving", torch.bfloat16),
        ("16-true", "serving", torch.float16),
        ("64-true", "serving", torch.bfloat16),
    ],
)
def test_the_dtype_is_that_of_the_precision(
    make_trainer: TrainerFactory, tmp_path: Path, precision: Any, target: Any, expected: torch.dtype
) -> None:
    module = Text()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(target=target)], max_epochs=2, precision=precision)
    trainer.fit(module, batches())
    assert serving_of(module) == {expected}
    name = str(expected).removeprefix("torch.")
    assert f"compute with what servers compute with, in {name} (target serving)" in str(conversion_report(module))
    record = QuantRecord.from_model(module)
    for name, layer in quantized_layers(module).items():
        factors = serving_factors(layer)  # type: ignore[arg-type]
        scale = torch.tensor(record[name].scale_d)
        assert scale == factors.input_scale == scale.to(expected).float()
        assert record[name].offset_d == int(factors.input_offset)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_qat_checkpoint(Text(), tmp_path / "last.ckpt").eval()
    assert serving_of(loaded) == {expected}
    x = torch.randn(3, 8).to(next(module.parameters()).dtype)
    assert torch.equal(loaded.to(x.dtype)(x), module.eval()(x))


def trained(make_trainer: TrainerFactory, tmp_path: Path, **options: Any) -> Path:
    trainer = make_trainer(callbacks=[QuantRetrainCallback(**options)], max_epochs=1)
    trainer.fit(Text(), batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("target", ["serving_float16", "serving", None])
@pytest.mark.parametrize("config", [None, "INT8"])
def test_a_run_goes_on_as_in_its_checkpoint(
    make_trainer: TrainerFactory, tmp_path: Path, target: Any, config: Any
) -> None:
    path = trained(make_trainer, tmp_path, target="serving_float16")
    module = Text()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(config, target=target)], max_epochs=2)
    trainer.fit(module, batches(), ckpt_path=path)
    assert serving_of(module) == {torch.float16}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("serving", "serving_float16", "serving is bfloat16 there and float16 here"),
        (None, "serving", "serving is None there and bfloat16 here"),
    ],
)
def test_another_arithmetic_than_that_of_the_checkpoint_is_refused(
    make_trainer: TrainerFactory, tmp_path: Path, before: Any, after: Any, message: str
) -> None:
    config = {"weights": {"channel_wise": True}}
    path = trained(make_trainer, tmp_path, target=before, config=config)
    trainer = make_trainer(callbacks=[QuantRetrainCallback(config, target=after)], max_epochs=2)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Text(), batches(), ckpt_path=path)


def test_onnx_files_are_refused_before_the_training(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback(target="serving", export="qdq")])
    with pytest.raises(ValueError, match=r"converted for servers .* in bfloat16, which no ONNX file has: qdq\."):
        trainer.fit(Text(), batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deploy_grid": True}, "deploy_grid=True computes as a network that ATC compiled.*Use one of the two"),
        (
            {"config": {"fakequant_precision_mode": "FORCE_FP16_QUANT"}},
            "target serving could not train with",
        ),
    ],
)
def test_what_contradicts_it_is_refused(make_trainer: TrainerFactory, options: dict[str, Any], message: str) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback(**options, target="serving")])
    with pytest.raises(ValueError, match=message):
        trainer.fit(Text(), batches())
