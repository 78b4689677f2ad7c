"""What the phases of a schedule do to a model in training."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor, nn

from amct_lightning import QuantRetrainCallback, QuantSchedule, prepare_qat, quantized_layers
from amct_lightning.callbacks.schedule.schedule import Part, Position
from amct_lightning.modules import activation_quantizers, learned_factors
from amct_lightning.quantizers import ChannelLayout
from amct_lightning.quantizers.functions.weight import arq_scale
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader


class Notes(pl.Callback):
    """Notes, per batch, the phase, the clips of ``net.4``, the scale of ``net.0`` and whether the output is float."""

    def __init__(self) -> None:
        self.phases: list[int] = []
        self.clips: list[float] = []
        self.scales: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.norm_training: list[bool] = []
        self.norm_means: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.phases.append(int(trainer.callback_metrics["quant_phase"]))
        self.clips.append(pl_module.net[4].input_quantizer.clip_max.item())
        self.scales.append(pl_module.net[0].weight_quantizer.scale.detach().clone())
        self.weights.append(pl_module.net[0].weight.detach().clone())
        self.norm_training.append(pl_module.net[1].training)
        self.norm_means.append(pl_module.net[1].running_mean.clone())


def train(make_trainer: TrainerFactory, schedule: Any, epochs: int, model: Net | None = None, **settings: Any) -> Notes:
    notes = Notes()
    callback = QuantRetrainCallback(settings.pop("config", None), schedule=schedule)
    trainer = make_trainer(max_epochs=epochs, callbacks=[callback, notes], **settings)
    trainer.fit(model or Net(), loader(), loader(1))
    return notes


def per_epoch(values: list[Any]) -> list[list[Any]]:
    return [values[i : i + BATCHES] for i in range(0, len(values), BATCHES)]


class TestStart:
    @pytest.mark.usefixtures("every_execution")
    def test_before_it_the_training_is_that_of_the_float_model_to_the_bit(self, make_trainer: TrainerFactory) -> None:
        float_model, model = Net(), Net()
        make_trainer(max_epochs=2).fit(float_model, loader())
        notes = train(make_trainer, {"start": 2}, 2, model, config={"weights": {"algo": "ulq_retrain"}})
        assert notes.phases == [0] * 8
        trained = model.state_dict()
        assert all(torch.equal(trained[name], value) for name, value in float_model.state_dict().items())
        assert all(q.calibrating for q in activation_quantizers(model).values())

    def test_after_it_layers_calibrate_and_are_quantized(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, {"start": 1, "calibrate_batches": 3}, 3)
        assert per_epoch(notes.phases) == [[0] * 4, [1, 1, 1, 2], [2] * 4]

    def test_a_calibration_before_it_sees_the_float_activations(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        notes = train(make_trainer, QuantSchedule(calibrate=0, start=1, calibrate_batches=2), 1, model)
        assert notes.phases == [1, 1, 0, 0]
        twin = copy.deepcopy(Net())
        seen: list[Tensor] = []
        twin.net[4].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
        make_trainer(max_epochs=1).fit(twin, loader())
        quantizer = model.net[4].input_quantizer
        alone = type(quantizer)(num_bits=8, fixed_min=quantizer.fixed_min, batch_num=2)
        for batch in seen[:2]:
            alone(batch)
        assert torch.equal(alone.clip_max, quantizer.clip_max)
        assert set(notes.clips[1:]) == {alone.clip_max.item()}  # and nothing changes it before the start

    def test_factors_of_a_layer_in_float_have_a_gradient_of_zero(self) -> None:
        """Without one DDP would wait for them in vain."""
        x = torch.randn(4, 2, 4, 4)
        model = prepare_qat(Net().net, {"weights": {"algo": "ulq_retrain"}}, x)
        for layer in quantized_layers(model).values():
            layer.quant_mode = "float"
        model.train()(x).sum().backward()
        assert [float(p.grad) for p in learned_factors(model) if p.dim() == 0] == [0.0] * 4
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in learned_factors(model))


class TestRecalibration:
    @pytest.mark.usefixtures("every_execution")
    def test_it_is_due_at_the_given_epochs_and_gives_the_range_of_then(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, QuantSchedule(calibrate=[0, 2], calibrate_batches=2), 3)
        assert per_epoch(notes.phases) == [[1, 1, 2, 2], [2] * 4, [1, 1, 2, 2]]
        steps = [abs(b - a) for a, b in zip(notes.clips[2:], notes.clips[3:], strict=False)]
        learned, jump = steps[:6] + steps[8:], max(steps[6:8])
        assert jump > 3 * max(learned)

    @pytest.mark.usefixtures("every_execution")
    def test_meanwhile_the_old_range_serves_for_evaluation(self, make_trainer: TrainerFactory) -> None:
        with pytest.warns(UserWarning) as caught:
            train(make_trainer, QuantSchedule(calibrate=[0, 1], calibrate_batches=4), 2, val_check_interval=1)
        early = [w for w in caught if "before its activation quantizers are calibrated" in str(w.message)]
        assert len(early) == 3 * BATCHES * 2  # both layers, while there is no range yet

    def test_frozen_and_given_ranges_are_left_alone(self, make_trainer: TrainerFactory) -> None:
        given = {"layers": {"net.4": {"activations": {"clip_max": 3.0, "clip_min": -3.0}}}}
        schedule = QuantSchedule(calibrate=[0, 1], calibrate_batches=1, freeze_data=1)
        notes = train(make_trainer, schedule, 2, config=given)
        assert len(set(notes.clips[BATCHES:])) == 1


class BeforeStep(pl.Callback):
    """Notes the clip of ``net.4`` just before each optimizer step."""

    def __init__(self) -> None:
        self.clips: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.clips.append(pl_module.net[4].input_quantizer.clip_max.item())


class TestFreezing:
    @pytest.mark.usefixtures("every_execution")
    def test_ranges_frozen_from_the_start_are_those_of_the_calibration(self, make_trainer: TrainerFactory) -> None:
        before, notes = BeforeStep(), Notes()
        callback = QuantRetrainCallback(schedule=QuantSchedule(freeze_data=0, calibrate_batches=2))
        make_trainer(max_epochs=2, callbacks=[callback, before, notes]).fit(Net(), loader())
        assert set(notes.clips[1:]) == {before.clips[1]}
        assert notes.phases == [1, 1, *[2] * 6]

    @pytest.mark.usefixtures("every_execution")
    def test_optimizer_state_and_gradients_of_frozen_factors_stand_still(self, make_trainer: TrainerFactory) -> None:
        counts: list[float] = []

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
                clip = pl_module.net[4].input_quantizer.clip_max
                counts.append(float(trainer.optimizers[0].state[clip]["step"]))
                assert (clip.grad is None) == (trainer.current_epoch >= 1)

        callback = QuantRetrainCallback(schedule=QuantSchedule(freeze_data=1))
        make_trainer(max_epochs=3, callbacks=[callback, Look()]).fit(Net(), loader())
        assert counts == [1, 2, 3, *[4] * 9]

    @pytest.mark.usefixtures("every_execution")
    def test_max_abs_scales_are_those_of_the_weight_at_the_moment(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        notes = train(make_trainer, QuantSchedule(freeze_weights=1), 3, model)
        expected = arq_scale(notes.weights[BATCHES - 1], ChannelLayout(), 8, True).flatten()
        assert all(torch.equal(scale, expected) for scale in notes.scales[BATCHES:])
        assert not torch.equal(notes.weights[-1], notes.weights[BATCHES])
        assert torch.equal(model.net[0].weight_quantizer.compute_scale(model.net[0].weight), expected)

    def test_all_frozen_is_phase_three(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, QuantSchedule(freeze_data=1, freeze_weights=2), 3)
        assert [epoch[-1] for epoch in per_epoch(notes.phases)] == [2, 2, 3]

    def test_batch_norm_uses_and_keeps_its_running_statistics(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        notes = train(make_trainer, QuantSchedule(freeze_bn=1), 3, model)
        assert per_epoch(notes.norm_training) == [[True] * 4, [False] * 4, [False] * 4]
        assert all(torch.equal(mean, notes.norm_means[BATCHES - 1]) for mean in notes.norm_means[BATCHES:])
        assert model.net[1].training  # given back as it was

    @pytest.mark.parametrize("pattern", ["net.0", "net.1"])
    def test_batch_norm_follows_its_own_pattern_or_its_layer(self, make_trainer: TrainerFactory, pattern: str) -> None:
        notes = train(make_trainer, QuantSchedule(freeze_bn=0, layers={pattern: {"freeze_bn": None}}), 1)
        assert notes.norm_training == [True] * 4

    def test_a_second_fit_without_a_schedule_learns_again(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        train(make_trainer, QuantSchedule(freeze_data=0, freeze_weights=0), 1, model)
        notes = train(make_trainer, None, 1, model)
        assert len(set(notes.clips)) == 4
        assert not torch.equal(notes.scales[0], notes.scales[1])


class TestUpdates:
    @pytest.mark.usefixtures("every_execution")
    @pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
    def test_every_n_steps(self, make_trainer: TrainerFactory, algo: str) -> None:
        notes = train(make_trainer, QuantSchedule(update_every_n_steps=4), 4, config={"weights": {"algo": algo}})
        changed = [i for i in range(1, 16) if notes.clips[i] != notes.clips[i - 1]]
        assert changed == [4, 8, 12]
        scales = [i for i in range(1, 16) if not torch.equal(notes.scales[i], notes.scales[i - 1])]
        assert scales == [4, 8, 12]

    def test_every_n_epochs(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, QuantSchedule(update_every_n_epochs=3), 5)
        assert [len(set(epoch)) > 1 for epoch in per_epoch(notes.clips)] == [True, False, False, True, False]

    def test_with_accumulated_gradients_optimizer_steps_count(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, QuantSchedule(update_every_n_steps=2), 4, accumulate_grad_batches=2)
        assert [i for i in range(1, 16) if notes.clips[i] != notes.clips[i - 1]] == [1, 5, 9, 13]


class Alternating(QuantSchedule):
    """Freezes the ranges in every other batch."""

    def should_freeze(self, part: Part, layer: str, at: Position) -> bool:
        return part == "data" and at.batch % 2 == 1


def test_rules_of_ones_own_may_go_by_the_batch(make_trainer: TrainerFactory) -> None:
    notes = train(make_trainer, Alternating(), 2)
    assert [notes.clips[i] != notes.clips[i - 1] for i in range(1, 8)] == [False, True] * 3 + [False]


@pytest.mark.usefixtures("every_execution")
def test_layers_that_share_a_range_follow_the_first(make_trainer: TrainerFactory) -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), Both(), nn.Identity(), nn.Identity(), nn.Linear(6, 3))
            self.automatic_optimization = True

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 3), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.a(x), self.b(x)), 1)

    model = Shared()
    callback = QuantRetrainCallback(schedule={"layers": {"net.1.b": {"start": 1}, "net.4": {"start": 1}}})
    make_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader())
    modes = {name: layer.quant_mode for name, layer in model.named_modules() if hasattr(layer, "quant_mode")}
    assert modes == {"net.1.a": "quantized", "net.1.b": "quantized", "net.4": "float"}


class TestWhatIsShown:
    def test_the_plan_and_the_changes(self, make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO"):
            train(make_trainer, {"start": 1, "freeze_data": 2, "freeze_weights": 3}, 4)
        assert "calibrated, then updated" in caplog.text
        changes = [r.getMessage().rpartition("Callback: ")[2] for r in caplog.records if "batch 0:" in r.getMessage()]
        assert changes == [
            "epoch 0, batch 0: float",
            "epoch 1, batch 0: calibrating",
            "epoch 2, batch 0: learning, ranges frozen",
            "epoch 3, batch 0: frozen",
        ]

    @pytest.mark.parametrize(
        ("schedule", "words"),
        [
            ({"freeze_bn": 0}, "learning, bn frozen"),
            ({"freeze_bn": 0, "start": 9}, "float, bn frozen"),
            ({"freeze_bn": 0, "freeze_data": 0, "freeze_weights": 0}, "frozen, bn frozen"),
            ({"freeze_data": 0, "layers": {"net.1": {"freeze_bn": 0}}}, "learning, ranges and 1 of 2 bn frozen"),
            ({"freeze_data": 0, "layers": {"net.0": {"freeze_bn": 0}}}, "learning, ranges and 1 of 2 bn frozen"),
        ],
    )
    def test_batch_norms_that_are_frozen_and_no_others(
        self, make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture, schedule: Any, words: str
    ) -> None:
        model = Net()
        model.net.append(nn.BatchNorm1d(3))
        with caplog.at_level("INFO"):
            make_trainer(callbacks=[QuantRetrainCallback(schedule=schedule)], max_epochs=1).fit(model, loader())
        told = [r.getMessage() for r in caplog.records if "batch" in r.getMessage()][-1]
        assert told.endswith(f": {words}")

    def test_a_model_without_batch_norm_has_none_frozen(
        self, make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = Net()
        model.net[1] = nn.Identity()
        with caplog.at_level("INFO"):
            make_trainer(callbacks=[QuantRetrainCallback(schedule={"freeze_bn": 0})]).fit(model, loader())
        assert "bn frozen" not in caplog.text

    @pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
    def test_the_progress_bar(self, make_trainer: TrainerFactory, bar: Any, capfd: pytest.CaptureFixture[str]) -> None:
        progress = bar(refresh_rate=1)
        trainer = make_trainer(
            callbacks=[QuantRetrainCallback(schedule={"start": 1}), progress], enable_progress_bar=True
        )
        trainer.fit(Net(), loader())
        shown = "".join(capfd.readouterr())
        if bar is TQDMProgressBar:  # rich draws nothing where there is no terminal
            assert "quant=float" in shown and "quant=learning" in shown
        assert "quant" not in progress.get_metrics(trainer, trainer.lightning_module)

    def test_contradictions_are_told_before_the_training(self, make_trainer: TrainerFactory) -> None:
        with pytest.raises(ValueError, match=r"start=0.*calibrate=1"):
            train(make_trainer, {"start": 0, "calibrate": 1}, 2)

    def test_a_pattern_for_no_layer_is_told_before_the_training(self, make_trainer: TrainerFactory) -> None:
        with pytest.raises(ValueError, match=r"'net\.44' fits no quantized layer"):
            train(make_trainer, {"layers": {"net.44": {}}}, 2)
