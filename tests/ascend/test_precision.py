"""Precision on one simulated NPU while a model learns to be quantized."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from amct_lightning import QuantRecord, QuantRetrainCallback
from amct_lightning.ascend import AscendStrategy, NPUPrecision
from tests.ascend.training import CPU, NPU, Net, largest_difference, loader, make_trainer

pytestmark = pytest.mark.npu

STEPS = 8
BOTH_ENDS_LEARN: dict[str, Any] = {"activations": {"fixed_min": "after_relu"}}
"""So that no forward puts the lower clip of the second layer back to 0."""
PRECISIONS = ["bf16-mixed", "16-mixed", "bf16-true", "16-true"]
Optimizer = Callable[[Iterator[Tensor]], torch.optim.Optimizer]


def adamw(parameters: Iterator[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


def careful_adamw(parameters: Iterator[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, foreach=False)


def sgd(parameters: Iterator[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)


class Chosen(Net):
    """Net with an optimizer from outside, and a loss in float32."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = functional.cross_entropy(self(x).float(), y)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def fit(
    folder: Path, optimizer: Optimizer, *callbacks: pl.Callback, quantize: bool = True, **settings: Any
) -> tuple[list[float], pl.Trainer]:
    """Train for STEPS steps; the record is written to r.txt in the folder."""
    folder.mkdir(exist_ok=True)
    model = Chosen(optimizer)
    quantizing = [QuantRetrainCallback(BOTH_ENDS_LEARN, folder / "r.txt")] if quantize else []
    checkpoint = settings.pop("ckpt_path", None)
    trainer = make_trainer(folder, max_steps=STEPS, max_epochs=-1, callbacks=[*quantizing, *callbacks], **settings)
    trainer.fit(model, loader(), ckpt_path=checkpoint)
    return [loss.item() for loss in model.losses], trainer


def scales(folder: Path) -> Tensor:
    record = QuantRecord.load(folder / "r.txt")
    return torch.tensor([value for layer in record.values() for value in (layer.scale_d, *layer.scale_w)])


@pytest.mark.parametrize("optimizer", [sgd, careful_adamw])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_losses_and_record_are_those_of_the_same_precision_on_the_cpu(
    tmp_path: Path, precision: Any, optimizer: Optimizer
) -> None:
    """The optimizers go over the parameters one by one, as on the CPU: lists of them are rounded in other places.

    The loss is computed in float32: autocast on the NPU leaves ``cross_entropy`` in the dtype of its input.
    """
    on_cpu, _ = fit(tmp_path / "cpu", optimizer, precision=precision, **CPU)
    on_npu, trainer = fit(tmp_path / "npu", optimizer, precision=precision, **NPU)
    assert isinstance(trainer.precision_plugin, NPUPrecision)
    assert len(on_npu) == STEPS
    assert largest_difference(on_cpu, on_npu) <= 1e-5
    assert (tmp_path / "npu" / "r.txt").read_bytes() == (tmp_path / "cpu" / "r.txt").read_bytes()


@pytest.mark.parametrize("optimizer", [sgd, careful_adamw])
def test_mixed_float16_is_near_float32(tmp_path: Path, optimizer: Optimizer) -> None:
    """Lightning does not do ``16-mixed`` on the CPU."""
    exact, _ = fit(tmp_path / "cpu", optimizer, **CPU)
    mixed, _ = fit(tmp_path / "npu", optimizer, precision="16-mixed", **NPU)
    assert 0 < largest_difference(exact, mixed) < 0.01
    assert torch.allclose(scales(tmp_path / "npu"), scales(tmp_path / "cpu"), rtol=0.02)


def test_cross_entropy_is_not_among_the_operators_that_autocast_computes_in_float32() -> None:
    """The documentation tells users to write ``scores.float()``; if this fails, it need not any more."""
    scores = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(8) % 3
    exact = functional.cross_entropy(scores.float(), labels)
    with torch.autocast("npu", torch.bfloat16):
        on_npu = functional.cross_entropy(scores.to("npu"), labels.to("npu")).cpu()
    assert on_npu.item() != exact.item()
    assert on_npu.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_factors_are_float32_in_the_checkpoint_whatever_the_weights_are(tmp_path: Path, precision: Any) -> None:
    _, trainer = fit(tmp_path, sgd, precision=precision, **NPU)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    weights = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    assert state["net.0.weight"].dtype == weights
    factors = {name: value for name, value in state.items() if "quantizer" in name and value.is_floating_point()}
    assert any(name.endswith("clip_max") for name in factors)
    assert {value.dtype for value in factors.values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in factors.values())


@pytest.mark.parametrize("quantize", [False, True])
def test_adam_s_usual_epsilon_is_refused_by_float16_with_quantization_or_without(
    tmp_path: Path, quantize: bool
) -> None:
    """1e-8 is 0 in float16: the weights themselves become NaN, and the warning says what to write."""
    with pytest.warns(UserWarning, match=r"AdamW\(eps=1e-08\) with precision='16-true'.*Give eps=1e-4"):
        losses, trainer = fit(tmp_path, adamw, quantize=quantize, precision="16-true", **NPU)
    assert torch.isnan(torch.tensor(losses[1:])).all()
    assert torch.isnan(trainer.lightning_module.net[4].weight).any()


@pytest.mark.parametrize(("precision", "optimizer"), [("16-true", careful_adamw), ("bf16-true", adamw)])
def test_an_epsilon_that_float16_or_bfloat16_can_hold_needs_no_warning(
    tmp_path: Path, precision: Any, optimizer: Optimizer
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*eps=")
        losses, _ = fit(tmp_path, optimizer, precision=precision, **NPU)
    assert torch.isfinite(torch.tensor(losses)).all()


def test_mixed_float16_says_nothing_about_cuda(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, precision="16-mixed", **NPU)
    assert not [str(warning.message) for warning in caught if "CUDA" in str(warning.message)]


class Watch(pl.Callback):
    """The parameters, factors among them, and the scale of the loss before every step."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.states: list[dict[str, Tensor]] = []
        self.scales: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.states.append({name: value.detach().cpu().clone() for name, value in pl_module.named_parameters()})
        self.scales.append(self.scaler.get_scale())


def test_steps_whose_gradients_overflow_are_skipped_for_weights_and_factors(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("npu", init_scale=2.0**22, growth_interval=1000)
    watch = Watch(scaler)
    losses, _ = fit(tmp_path, sgd, watch, plugins=[NPUPrecision("16-mixed", scaler=scaler)], **NPU)
    learning = range(2, STEPS - 1)  # the first batch calibrates, which changes the factors
    skipped = [watch.scales[step + 1] < watch.scales[step] for step in learning]
    assert any(skipped)
    assert not all(skipped)
    for step, was_skipped in zip(learning, skipped, strict=True):
        before, after = watch.states[step], watch.states[step + 1]
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert not changed if was_skipped else {"net.4.weight", "net.4.input_quantizer.clip_max"} <= changed
    assert torch.isfinite(torch.tensor(losses)).all()
    assert torch.isfinite(scales(tmp_path)).all()


def test_gradients_are_clipped_after_they_are_unscaled(tmp_path: Path) -> None:
    exact, _ = fit(tmp_path, sgd, gradient_clip_val=0.5, **NPU)
    mixed, _ = fit(tmp_path, sgd, gradient_clip_val=0.5, precision="16-mixed", **NPU)
    free, _ = fit(tmp_path, sgd, precision="16-mixed", **NPU)
    assert largest_difference(exact, mixed) < 0.01
    assert largest_difference(exact, free) > 0.05  # the clipping does act


def test_resuming_continues_with_the_scale_of_the_checkpoint(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == STEPS // 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def plugin() -> NPUPrecision:
        return NPUPrecision("16-mixed", scaler=torch.amp.GradScaler("npu", init_scale=1024.0, growth_interval=3))

    whole, trainer = fit(tmp_path, sgd, Save(), plugins=[plugin()], **NPU)
    resumed, again = fit(tmp_path, sgd, plugins=[plugin()], ckpt_path=tmp_path / "half.ckpt", **NPU)
    assert trainer.precision_plugin.scaler.get_scale() == 4096.0
    assert again.precision_plugin.scaler.get_scale() == 4096.0
    assert resumed == whole[STEPS // 2 :]


def test_the_options_of_the_strategy_reach_torch_npu(tmp_path: Path) -> None:
    import torch_npu

    before = torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32
    try:
        for choice in (True, False):
            strategy = AscendStrategy(hf32_matmul=choice, hf32_conv=not choice, allow_internal_format=choice)
            fit(tmp_path, sgd, accelerator="npu", devices=1, strategy=strategy)
            assert (torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32) == (choice, not choice)
            option = torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT")  # it has no public reader
            assert option == (b"enable" if choice else b"disable")
    finally:
        torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32 = before
