"""What the callback does while training: parameter groups for the clips, and a watch on NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from amct_lightning import QuantRecord, QuantRetrainCallback
from amct_lightning.modules import activation_quantizers
from tests.callbacks.conftest import Net, TrainerFactory, loader


def _groups(make_trainer: TrainerFactory, model: Net, **kwargs: Any) -> list[dict[str, Any]]:
    trainer = make_trainer(callbacks=[QuantRetrainCallback(**kwargs)], max_steps=1, max_epochs=-1)
    trainer.fit(model, loader())
    return trainer.optimizers[0].param_groups


def test_clips_get_a_group_without_weight_decay(make_trainer: TrainerFactory) -> None:
    model = Net()
    weights, clips = _groups(make_trainer, model)
    expected = {id(p) for q in activation_quantizers(model).values() for p in (q.clip_max, q.clip_min)}
    assert {id(p) for p in clips["params"]} == expected
    assert not expected & {id(p) for p in weights["params"]}
    assert (weights["weight_decay"], clips["weight_decay"]) == (0.1, 0.0)
    assert clips["lr"] == weights["lr"]


def test_quant_lr_scale_and_weight_decay_can_be_told(make_trainer: TrainerFactory) -> None:
    weights, clips = _groups(make_trainer, Net(), quant_lr_scale=0.1, quant_weight_decay=None)
    assert clips["lr"] == pytest.approx(0.1 * weights["lr"])
    assert clips["weight_decay"] == 0.1


def test_with_nothing_to_change_the_optimizer_is_left_alone(make_trainer: TrainerFactory) -> None:
    assert len(_groups(make_trainer, Net(), quant_weight_decay=None)) == 1


def test_a_group_that_the_user_made_for_the_clips_is_kept(make_trainer: TrainerFactory) -> None:
    class Grouped(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            clips = [p for n, p in self.named_parameters() if "clip" in n]
            rest = [p for n, p in self.named_parameters() if "clip" not in n]
            return torch.optim.AdamW([{"params": rest}, {"params": clips, "weight_decay": 0.3}], lr=1e-2)

    groups = _groups(make_trainer, Grouped())
    assert [group["weight_decay"] for group in groups] == [0.01, 0.3]


def test_optimizers_made_from_named_parameters_keep_their_names(make_trainer: TrainerFactory) -> None:
    class Named(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.named_parameters(), lr=1e-2)

    weights, clips = _groups(make_trainer, Named())
    assert len(weights["param_names"]) == len(weights["params"])
    assert all("clip" in name for name in clips["param_names"])


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=2, cycle_momentum=False),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [1]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore")
def test_schedulers_move_the_clips_like_the_weights(make_trainer: TrainerFactory, name: str) -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            config = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}
            if name == "plateau":
                config |= {"monitor": "loss", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": config}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", 1.0)
            return loss

    rates: list[tuple[float, float]] = []

    class Watch(QuantRetrainCallback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            weights, clips = trainer.optimizers[0].param_groups
            rates.append((weights["lr"], clips["lr"]))

    make_trainer(callbacks=[Watch(quant_lr_scale=0.5)]).fit(Scheduled(), loader())
    assert len({weights for weights, _ in rates}) > 1
    assert [clips for _, clips in rates] == pytest.approx([weights / 2 for weights, _ in rates])


class Poisoned(Net):
    """The input of net.4 becomes infinite in step 5."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if self.global_step == 5:
            x = x.clone()
            x[0, 0, 0, 0] = float("inf")
        return super().training_step((x, y), batch_idx)


@pytest.mark.parametrize(("interval", "epochs"), [(4, 3), (1000, 20)])  # an interval of many batches, and its end
def test_nonfinite_activations_are_reported_with_layer_and_step(
    make_trainer: TrainerFactory, tmp_path: Path, interval: int, epochs: int
) -> None:
    callback = QuantRetrainCallback(record_file=tmp_path / "r.txt")
    with pytest.warns(UserWarning, match=r"layer 'net\.0' \(step 5\)"):
        make_trainer(callbacks=[callback], max_epochs=epochs, log_every_n_steps=interval).fit(Poisoned(), loader())
    QuantRecord.load(tmp_path / "r.txt").validate()


def test_nonfinite_activations_can_stop_the_training(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback(on_nonfinite="raise")], max_epochs=3, log_every_n_steps=4)
    with pytest.raises(RuntimeError, match=r"'net\.0' \(step 5\)"):
        trainer.fit(Poisoned(), loader())
    assert trainer.global_step == 8


@pytest.mark.filterwarnings("ignore:NaN or infinite")
def test_a_diverged_run_keeps_the_last_finite_record(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    class Diverging(Net):
        diverges = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.diverges else loss

    model, record = Diverging(), tmp_path / "r.txt"
    make_trainer(callbacks=[QuantRetrainCallback(record_file=record)]).fit(model, loader())
    good = record.read_text()
    model.diverges = True
    trainer = make_trainer(callbacks=[QuantRetrainCallback(record_file=record)])
    with pytest.warns(UserWarning, match="last good one stays"):
        trainer.fit(model, loader())
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert record.read_text() == good
    assert not (tmp_path / "bad.record.txt").exists()


def test_clips_in_no_optimizer_are_pointed_out(make_trainer: TrainerFactory) -> None:
    class Partial(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.net[4].weight], lr=0.1)

    with pytest.warns(UserWarning, match="4 of 4 learned clip values are in no optimizer"):
        make_trainer(callbacks=[QuantRetrainCallback()], max_steps=1, max_epochs=-1).fit(Partial(), loader())
