"""The scores of the float phase, and those of the quantized network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint

from amct_lightning import QuantRetrainCallback, QuantSchedule, load_qat_checkpoint
from amct_lightning.checkpoint_file import CHECKPOINT_KEY
from tests.callbacks.conftest import Net, TrainerFactory, loader

SAVED_IN_FLOAT = "was saved before quantization had begun everywhere"


class Scored(Net):
    """Its score is given for each epoch: the best ones come first, as those of a float phase."""

    SCORES = (1.0, 0.9, 3.0, 2.0, 2.5)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.SCORES[self.current_epoch])


def fit(
    make_trainer: TrainerFactory, folder: Path, schedule: dict[str, Any], *callbacks: pl.Callback, **arguments: Any
) -> tuple[pl.Trainer, ModelCheckpoint]:
    ckpt_path, mode = arguments.pop("ckpt_path", None), arguments.pop("mode", "min")
    keep = ModelCheckpoint(folder, "{epoch}", monitor="score", mode=mode, save_top_k=1)
    settings = {"max_epochs": 5, "enable_checkpointing": True, "num_sanity_val_steps": 0, **arguments}
    trainer = make_trainer(callbacks=[QuantRetrainCallback(schedule=schedule), keep, *callbacks], **settings)
    trainer.fit(Scored(), loader(), loader(1), ckpt_path=ckpt_path)
    return trainer, keep


def saved_in_float(found: Any) -> list[str]:
    return [str(warning.message) for warning in found if SAVED_IN_FLOAT in str(warning.message)]


@pytest.mark.parametrize("restart", [False, True])
def test_the_best_checkpoint_is_a_quantized_one_if_scores_start_anew(
    make_trainer: TrainerFactory, tmp_path: Path, restart: bool
) -> None:
    _, keep = fit(make_trainer, tmp_path, {"start": 2, "restart_scores": restart})
    assert Path(keep.best_model_path).name == ("epoch=3.ckpt" if restart else "epoch=1.ckpt")
    assert keep.best_model_score == pytest.approx(2.0 if restart else 0.9)
    assert list(keep.best_k_models) == [keep.best_model_path]
    assert (tmp_path / "epoch=1.ckpt").exists()


def test_scores_that_are_to_rise_start_anew_as_well(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    _, keep = fit(make_trainer, tmp_path, {"start": 3, "restart_scores": True}, mode="max")
    assert keep.best_model_score == pytest.approx(2.5)


def test_early_stopping_waits_from_the_start_on(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    epochs = {}
    for restart in (False, True):
        stop = EarlyStopping("score", patience=2)
        trainer, _ = fit(make_trainer, tmp_path, {"start": 2, "restart_scores": restart}, stop)
        epochs[restart] = trainer.current_epoch
    assert epochs == {False: 4, True: 5}


def test_a_run_that_goes_on_at_the_start_begins_with_new_scores(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    schedule = {"start": 2, "restart_scores": True}
    _, before = fit(make_trainer, tmp_path, schedule, max_epochs=2)
    assert Path(before.best_model_path).name == "epoch=1.ckpt"
    _, keep = fit(make_trainer, tmp_path, schedule, ckpt_path=before.best_model_path)
    assert Path(keep.best_model_path).name == "epoch=3.ckpt"


def test_a_run_that_goes_on_later_keeps_its_scores(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    schedule = {"start": 2, "restart_scores": True}
    _, before = fit(make_trainer, tmp_path, schedule, max_epochs=4)
    _, keep = fit(make_trainer, tmp_path, schedule, ckpt_path=before.best_model_path)
    assert Path(keep.best_model_path).name == "epoch=3.ckpt"
    assert len(list(tmp_path.glob("epoch=[34]*.ckpt"))) == 1


def test_every_start_of_a_layer_counts(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    layers = {"net.4": {"start": 4, "calibrate": 4}}
    _, keep = fit(make_trainer, tmp_path, {"start": 1, "restart_scores": True, "layers": layers})
    assert Path(keep.best_model_path).name == "epoch=4.ckpt"


def test_it_must_be_true_or_false() -> None:
    with pytest.raises(TypeError, match=r"restart_scores='yes'.*True or False"):
        QuantSchedule(restart_scores="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no field 'restart_scores'"):
        QuantSchedule(layers={"net.0": {"restart_scores": True}})


@pytest.mark.parametrize("calibrate", [2, 0])
@pytest.mark.parametrize("use", ["fit", "validate", "test", "load", "load a part"])
def test_a_checkpoint_of_the_float_phase_is_called_one(
    make_trainer: TrainerFactory, tmp_path: Path, use: str, calibrate: int
) -> None:
    schedule = {"start": 2, "calibrate": calibrate}
    _, keep = fit(make_trainer, tmp_path, schedule)
    best = keep.best_model_path
    module = Scored()
    with pytest.warns(UserWarning, match=rf"epoch=1\.ckpt' {SAVED_IN_FLOAT}: all 2 layers .*restart_scores=True"):
        if use == "load":
            load_qat_checkpoint(module, best)
        elif use == "load a part":
            load_qat_checkpoint(module.net, best)
        elif use == "fit":
            fit(make_trainer, tmp_path / "again", schedule, ckpt_path=best)
        else:
            trainer = make_trainer(callbacks=[QuantRetrainCallback()])
            getattr(trainer, use)(module, loader(1), ckpt_path=best)


def test_the_layers_that_still_run_in_float_are_named(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    layers = {"net.4": {"start": 4, "calibrate": 4}}
    _, keep = fit(make_trainer, tmp_path, {"start": 1, "layers": layers})
    with pytest.warns(UserWarning, match=rf"{SAVED_IN_FLOAT}: 1 of 2 layers \('net\.4'\)"):
        load_qat_checkpoint(Scored(), keep.best_model_path)


def test_nothing_is_said_of_a_quantized_one_or_of_an_earlier_version(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    _, keep = fit(make_trainer, tmp_path, {"start": 2, "restart_scores": True})
    old = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)
    del old[CHECKPOINT_KEY]["float_layers"]
    torch.save(old, tmp_path / "old.ckpt")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for path in (keep.best_model_path, tmp_path / "old.ckpt"):
            load_qat_checkpoint(Scored(), path)
            make_trainer(callbacks=[QuantRetrainCallback()]).test(Scored(), loader(1), ckpt_path=path)
    assert saved_in_float(found) == []


def test_nothing_is_said_of_what_a_search_puts_back(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(make_trainer, tmp_path, {"start": 2}, LearningRateFinder(num_training_steps=3, update_attr=False))
    assert saved_in_float(found) == []
