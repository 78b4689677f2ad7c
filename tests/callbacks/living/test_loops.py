"""Loops of other shapes: several optimizers, manual optimization, compiled modules, precisions, checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from amct_lightning import QuantRecord, QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.modules import activation_quantizers
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader
from tests.callbacks.schedule.test_freezing import Half, factors
from tests.callbacks.schedule.test_phases import Notes, per_epoch

DUE = {"start": 1, "freeze_data": 3, "freeze_weights": 3, "freeze_bn": 3}
ULQ = {"weights": {"algo": "ulq_retrain"}}


class Adversaries(pl.LightningModule):
    """A generator and a discriminator that are trained in turn, each with an optimizer of its own."""

    def __init__(self, toggle: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.toggle = toggle
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 32))
        self.discriminator = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.discriminator(self.generator(x.flatten(1)[:, :4]))

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.generator.parameters(), lr=1e-3, weight_decay=0.1),
            torch.optim.SGD(self.discriminator.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0].flatten(1)
        one, two = self.optimizers()
        fake = self._step(one, lambda: self.generator(real[:, :4]), fooled=True)
        self._step(two, lambda: torch.cat([fake.detach(), real]), fooled=False)

    def _step(self, optimizer: Any, make: Any, fooled: bool) -> Tensor:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        data = make()
        target = torch.ones(len(data), 1)
        if not fooled:
            target[: len(data) // 2] = 0
        optimizer.zero_grad()
        self.manual_backward(functional.binary_cross_entropy_with_logits(self.discriminator(data), target))
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)
        return data


def clips(model: nn.Module) -> dict[str, tuple[float, float]]:
    return {name: (q.clip_max.item(), q.clip_min.item()) for name, q in activation_quantizers(model).items()}


class History(pl.Callback):
    def __init__(self) -> None:
        self.clips: list[dict[str, tuple[float, float]]] = []
        self.phases: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.clips.append(clips(pl_module))
        self.phases.append(int(trainer.callback_metrics["quant_phase"]))


class TestSeveralOptimizers:
    @pytest.mark.parametrize("config", [None, ULQ], ids=["arq", "ulq"])
    @pytest.mark.parametrize("toggle", [True, False])
    def test_each_network_is_calibrated_learned_and_frozen(
        self, make_trainer: TrainerFactory, tmp_path: Path, toggle: bool, config: Any
    ) -> None:
        model, history = Adversaries(toggle), History()
        schedule = DUE | {"layers": {"discriminator.*": {"freeze_data": None, "freeze_weights": None}}}
        callback = QuantRetrainCallback(config, schedule=schedule, quant_lr_scale=0.5)
        checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = make_trainer(callbacks=[callback, history, checkpoints], max_epochs=5, enable_checkpointing=True)
        trainer.fit(model, loader())
        assert per_epoch(history.phases) == [[0] * 4, [1, 2, 2, 2], *[[2] * 4] * 3]
        after, last = history.clips[3 * BATCHES], history.clips[-1]
        for name in after:
            assert (after[name] == last[name]) == name.startswith("generator")
            assert history.clips[BATCHES][name] != after[name]
        for optimizer, factor in zip(trainer.optimizers, (1e-3, 1e-2), strict=True):
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0]
            assert optimizer.param_groups[1]["lr"] == factor / 2
        assert all(p.requires_grad for p in model.parameters())
        loaded = load_qat_checkpoint(Adversaries(), tmp_path / "epoch=4.ckpt")
        assert QuantRecord.load(tmp_path / "record.txt") == QuantRecord.from_model(loaded)

    def test_one_part_quantized_only(self, make_trainer: TrainerFactory) -> None:
        model, history = Adversaries(), History()
        callback = QuantRetrainCallback(submodule="generator", input_data=torch.randn(2, 4), schedule=DUE)
        make_trainer(callbacks=[callback, history], max_epochs=4).fit(model, loader())
        assert set(history.clips[-1]) == {"generator.0", "generator.2"}
        assert history.phases[-1] == 3

    def test_manual_accumulation_of_gradients(self, make_trainer: TrainerFactory) -> None:
        class Accumulating(Net):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:
                self.manual_backward(super().training_step(batch, batch_idx))
                if batch_idx % 2:
                    self.optimizers().step()
                    self.optimizers().zero_grad()

        notes = Notes()
        callback = QuantRetrainCallback(schedule={"update_every_n_steps": 2, "freeze_data": 3})
        make_trainer(callbacks=[callback, notes], max_epochs=4).fit(Accumulating(), loader())
        assert [i for i in range(1, 16) if notes.clips[i] != notes.clips[i - 1]] == [1, 5, 9]


class TestCompiled:
    """With a backend that does not generate code: what is guarded and when it is traced again is the same."""

    def test_a_compiled_module_goes_through_the_phases_as_any(
        self, make_trainer: TrainerFactory, tmp_path: Path
    ) -> None:
        config = {"layers": {"net.4": {"weights": {"algo": "ulq_retrain"}}}}
        schedule = {"start": 1, "freeze_data": 2, "freeze_weights": 2, "freeze_bn": 2, "calibrate_batches": 2}

        def train(compiled: bool) -> tuple[Net, Notes]:
            model, notes = Net(), Notes()
            trainer = make_trainer(
                callbacks=[QuantRetrainCallback(config, tmp_path / "r.txt", schedule=schedule), notes], max_epochs=3
            )
            trainer.fit(torch.compile(model, backend="eager") if compiled else model, loader())
            return model, notes

        (model, notes), (expected, other) = train(True), train(False)
        assert notes.phases == other.phases
        assert notes.clips == pytest.approx(other.clips, rel=1e-4)
        assert len(set(notes.clips[2 * BATCHES :])) == 1
        assert QuantRecord.load(tmp_path / "r.txt") == QuantRecord.from_model(expected)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-6)

    @pytest.mark.usefixtures("every_execution")
    def test_after_the_calibration_a_step_is_one_graph_again(self, make_trainer: TrainerFactory) -> None:
        graphs: list[int] = []

        def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
            def run(*args: Any) -> Any:
                graphs[-1] += 1
                return module(*args)

            return run

        class Count(pl.Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                graphs.append(0)

        callbacks = [QuantRetrainCallback(), Count()]
        make_trainer(callbacks=callbacks, max_epochs=1).fit(torch.compile(Net(), backend=backend), loader())
        assert graphs[0] > 1
        assert graphs[1:] == [1] * (BATCHES - 1)

    def test_a_layer_compiled_alone(self, make_trainer: TrainerFactory) -> None:
        class Partly(Net):
            def on_fit_start(self) -> None:
                self.net.compile(backend="eager")

        notes = Notes()
        callback = QuantRetrainCallback(schedule=DUE)
        make_trainer(callbacks=[callback, notes], max_epochs=4).fit(Partly(), loader(), loader(1))
        assert [epoch[-1] for epoch in per_epoch(notes.phases)] == [0, 2, 2, 3]
        assert len(set(notes.clips[3 * BATCHES :])) == 1


def test_a_synchronized_batch_norm_is_frozen_and_folded(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """Lightning replaces the batch normalizations (``sync_batchnorm=True``) after the layers were converted."""

    class Synchronizes(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            nn.SyncBatchNorm.convert_sync_batchnorm(pl_module)

    model, notes = Net(), Notes()
    callbacks = [Synchronizes(), QuantRetrainCallback(schedule={"freeze_bn": 1}), notes]
    make_trainer(callbacks=callbacks, max_epochs=3).fit(model, loader(), loader(1))
    norm = model.net[1]
    assert type(norm) is nn.SyncBatchNorm
    assert per_epoch(notes.norm_training) == [[True] * 4, [False] * 4, [False] * 4]
    assert torch.equal(norm.running_mean, notes.norm_means[BATCHES - 1])
    scale = model.net[0].weight_quantizer.compute_scale(model.net[0].weight)
    expected = scale * norm.weight.detach().abs() * torch.rsqrt(norm.running_var + norm.eps)
    assert QuantRecord.load(tmp_path / "record.txt")["net.0"].scale_w == pytest.approx(expected.tolist())


PRECISIONS = ["32", "bf16-mixed", "bf16-true", "16-true", "64-true"]


class TestPrecisions:
    @pytest.mark.parametrize("config", [None, ULQ], ids=["arq", "ulq"])
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_factors_are_float32_and_learned_in_each(
        self, make_trainer: TrainerFactory, tmp_path: Path, precision: Any, config: Any
    ) -> None:
        model, notes = Half("sgd"), Notes()
        checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = make_trainer(
            callbacks=[QuantRetrainCallback(config, schedule=DUE), notes, checkpoints],
            precision=precision,
            max_epochs=4,
            enable_checkpointing=True,
        )
        trainer.fit(model, loader(), loader(1))
        assert all(value.dtype == torch.float32 for name, value in factors(model).items() if "quantizer" in name)
        assert per_epoch(notes.phases) == [[0] * 4, [1, 2, 2, 2], [2] * 4, [3] * 4]
        assert len(set(notes.clips[BATCHES : 3 * BATCHES])) > BATCHES
        assert len(set(notes.clips[3 * BATCHES :])) == 1
        record = QuantRecord.load(tmp_path / "record.txt")
        assert record == QuantRecord.from_model(model)
        loaded = load_qat_checkpoint(Half().to(model.dtype), tmp_path / "epoch=3.ckpt")
        assert record == QuantRecord.from_model(loaded)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_the_ranges_are_about_those_of_float32(self, make_trainer: TrainerFactory, precision: Any) -> None:
        def calibrated(precision: Any) -> list[float]:
            model = Half("sgd")
            callback = QuantRetrainCallback(schedule={"freeze_data": 0})
            make_trainer(callbacks=[callback], precision=precision, max_epochs=1).fit(model, loader())
            return [value for pair in clips(model).values() for value in pair]

        assert calibrated(precision) == pytest.approx(calibrated("32"), rel=5e-2, abs=1e-6)


class Checkpointed(Net):
    """Computes its activations a second time in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.net[:3], x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        return checkpoint(self.net[3:], hidden, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
@pytest.mark.parametrize(
    "schedule", [DUE, {"calibrate": 0, "start": 1, "calibrate_batches": 3}], ids=["float", "observe"]
)
@pytest.mark.usefixtures("every_execution")
def test_gradient_checkpointing(make_trainer: TrainerFactory, kind: type[Net], schedule: Any) -> None:
    def train(model: Net) -> Net:
        make_trainer(callbacks=[QuantRetrainCallback(ULQ, schedule=schedule)], max_epochs=3).fit(model, loader())
        return model

    expected = train(Net()).net.state_dict()
    trained = train(kind()).net.state_dict()
    for name, value in expected.items():
        if not name.startswith("1."):  # the batch normalization sees each batch twice
            assert torch.equal(trained[name], value), name
