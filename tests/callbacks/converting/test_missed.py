"""A layer that forward runs and no training_step does: the record is written without it, and a warning names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import (
    QuantRecord,
    QuantRetrainCallback,
    QuantSchedule,
    conversion_report,
    create_quant_retrain_config,
    create_quant_retrain_model,
    load_qat_checkpoint,
)
from amct_lightning.run_report.checkpoint import read_facts
from tests.callbacks.conftest import Net, TrainerFactory, loader
from tests.operators import Operators

LACKS = "The record lacks"
ALL = ["net.0", "net.4"]


class OwnPath(Net):
    """Trains ``net`` and evaluates ``decode`` as well, which training reaches from a batch on."""

    def __init__(self, reached_from: int | None = None) -> None:
        super().__init__()
        self.decode = nn.Linear(3, 3)
        self.reached_from = reached_from
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        y = self.net(batch[0])
        if self.reached_from is not None and self.seen > self.reached_from:
            y = self.decode(y)
        return functional.cross_entropy(y, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))


def fit(trainer: pl.Trainer, model: pl.LightningModule, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(), loader(1), **kwargs)
    return [str(warning.message) for warning in caught]


class Keep(pl.Callback):
    """Saves a checkpoint after some batches, and notes the loss of the validation."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")


def test_the_record_of_all_others_is_written_and_the_layer_is_named_once(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    model = OwnPath()
    told = fit(make_trainer(callbacks=[QuantRetrainCallback(), Keep(1, 5, 8)]), model)
    (message,) = [text for text in told if LACKS in text]
    assert "1 of 3 layers" in message and "'decode'" in message and "skip_layers" in message
    assert not any("No record was written" in text or "before its activation" in text for text in told)
    for name in ("record.txt", "1.record.txt", "8.record.txt"):
        assert list(QuantRecord.load(tmp_path / name)) == ALL
    assert list(QuantRecord.from_model(model)) == ALL
    rows = {row.name: row for row in conversion_report(model).rows}
    assert not rows["decode"].quantized and "no training batch has reached it" in str(rows["decode"].reason)
    assert "never reached in training" in str(conversion_report(model))


def test_the_phase_goes_on_and_the_layer_is_evaluated_in_float(make_trainer: TrainerFactory) -> None:
    model = OwnPath()
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    fit(trainer, model)
    assert trainer.callback_metrics["quant_phase"] == 2
    x = torch.randn(4, 3)
    model.eval()
    assert torch.equal(model.decode(x), functional.linear(x, model.decode.weight, model.decode.bias))


@pytest.mark.parametrize("batch_num", [1, 2])
def test_a_layer_that_is_reached_later_calibrates_and_enters_the_record(
    make_trainer: TrainerFactory, tmp_path: Path, batch_num: int
) -> None:
    model = OwnPath(reached_from=4)
    told = fit(make_trainer(callbacks=[QuantRetrainCallback({"batch_num": batch_num}), Keep(4, 5, 6)]), model)
    assert len([text for text in told if LACKS in text]) == 1
    assert list(QuantRecord.load(tmp_path / "4.record.txt")) == ALL
    assert ("decode" in QuantRecord.load(tmp_path / "5.record.txt")) == (batch_num == 1)
    assert list(QuantRecord.load(tmp_path / "6.record.txt")) == list(QuantRecord.load(tmp_path / "record.txt"))
    assert list(QuantRecord.load(tmp_path / "record.txt")) == [*ALL, "decode"]
    assert not model.decode.is_missed and model.decode.input_quantizer.settled
    assert all(row.quantized for row in conversion_report(model).rows)


def test_nobody_is_warned_of_a_layer_that_is_reached_before_the_record_is_written(make_trainer: TrainerFactory) -> None:
    told = fit(make_trainer(callbacks=[QuantRetrainCallback()]), OwnPath(reached_from=2))
    assert not [text for text in told if LACKS in text]


def test_a_run_that_is_resumed_goes_on_without_the_layer(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    config = {"batch_num": 3}
    fit(make_trainer(callbacks=[QuantRetrainCallback(config), Keep(5)]), OwnPath())
    resumed = make_trainer(callbacks=[QuantRetrainCallback(config), Keep(6)])
    told = fit(resumed, OwnPath(), ckpt_path=tmp_path / "5.ckpt")
    assert len([text for text in told if "has no range for the inputs of 1 of 3 layers ('decode')" in text]) == 1
    assert list(QuantRecord.load(tmp_path / "6.record.txt")) == ALL  # three batches later it would be known anew
    assert len([text for text in told if LACKS in text]) == 1
    later = OwnPath(reached_from=0)
    fit(make_trainer(callbacks=[QuantRetrainCallback(config)]), later, ckpt_path=tmp_path / "5.ckpt")
    assert list(QuantRecord.load(tmp_path / "record.txt")) == [*ALL, "decode"]


def test_a_checkpoint_says_what_its_record_lacks(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    fit(make_trainer(callbacks=[QuantRetrainCallback(), Keep(8)]), OwnPath())
    with pytest.warns(UserWarning, match=r"8.ckpt' has no range for .*1 of 3 layers \('decode'\)"):
        model = load_qat_checkpoint(OwnPath, tmp_path / "8.ckpt")
    assert QuantRecord.from_model(model) == QuantRecord.load(tmp_path / "8.record.txt")
    rows = {row.name: row.quantized for row in read_facts(tmp_path / "8.ckpt", []).rows}
    assert rows == {"net.0": True, "net.4": True, "decode": False}


def test_a_layer_that_shares_its_quantizer_with_one_that_is_missed_calibrates_it(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Flatten()
            self.a, self.b = nn.Linear(32, 3), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(x)
            return self.a(x) + self.b(x) + self.net(x.view(-1, 2, 4, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0]
            return functional.cross_entropy(self.b(self.flat(x)) + self.net(x), batch[1])

    model = Shared()
    fit(make_trainer(callbacks=[QuantRetrainCallback()]), model)
    assert model.a.input_quantizer is model.b.input_quantizer and model.a.calibrates_input
    assert set(QuantRecord.load(tmp_path / "record.txt")) == {"net.0", "net.4", "a", "b"}


@pytest.mark.parametrize("reached_from", [5, None])  # the second batch of its calibration
def test_layers_that_begin_later_by_the_schedule_have_their_own_time(
    make_trainer: TrainerFactory, tmp_path: Path, reached_from: int | None
) -> None:
    class Two(OwnPath):
        def __init__(self) -> None:
            super().__init__(reached_from)
            self.never = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.never(super().forward(x))

    schedule = QuantSchedule(calibrate_batches=2, layers={"decode": {"start": 1}})
    told = fit(make_trainer(callbacks=[QuantRetrainCallback(schedule=schedule), Keep(5, 6, 7)]), Two())
    assert not (tmp_path / "5.record.txt").exists()
    assert (tmp_path / "6.record.txt").exists() == (reached_from is None)
    assert list(QuantRecord.load(tmp_path / "7.record.txt")) == [*ALL, *(["decode"] if reached_from else [])]
    assert len([text for text in told if LACKS in text]) == 1


def test_a_range_that_no_later_calibration_reaches_stays_and_is_waited_for_no_longer(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    class Left(OwnPath):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.reached_from = None if self.current_epoch else 0
            return super().training_step(batch, batch_idx)

    model = Left()
    callback = QuantRetrainCallback(schedule=QuantSchedule(calibrate=[0, 1]))
    told = fit(make_trainer(callbacks=[callback]), model)
    assert callback._calibration.done and model.decode.input_quantizer.settled
    assert not [text for text in told if LACKS in text]
    assert list(QuantRecord.load(tmp_path / "record.txt")) == [*ALL, "decode"]


class Plain(nn.Module):
    """A layer that training runs, and one for evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return y if self.training else self.other(y)


def test_in_plain_pytorch_the_record_is_written_as_well(tmp_path: Path) -> None:
    x, record = torch.randn(8, 4), str(tmp_path / "record.txt")
    config = str(tmp_path / "config.json")
    create_quant_retrain_config(config, Plain(), x)
    model = create_quant_retrain_model(config, Plain(), record, x)
    model.train()(x)
    with pytest.warns(UserWarning, match=f"{LACKS} 1 of 2 layers.*'other'"):
        model.eval()(x)
    assert list(QuantRecord.load(record)) == ["main"]
    model.train()
    model.other(model(x))
    model(x)  # the hook of the model takes note
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(x)
    assert list(QuantRecord.load(record)) == ["main", "other"]


class Begin(pl.Callback):
    """Counts what is read on the host in each batch, between two callbacks."""

    def __init__(self) -> None:
        self.reads: list[dict[str, int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.operators = Operators()
        self.operators.__enter__()


class End(pl.Callback):
    def __init__(self, begin: Begin) -> None:
        self.begin = begin

    def on_train_batch_end(self, *_: Any) -> None:
        self.begin.operators.__exit__(None, None, None)
        self.begin.reads.append(dict(self.begin.operators.host_reads))


def test_a_step_with_a_layer_that_is_missed_reads_no_more_on_the_host(make_trainer: TrainerFactory) -> None:
    reads = []
    for model in (Net(), OwnPath()):
        begin = Begin()
        callbacks = [begin, QuantRetrainCallback(), End(begin)]
        fit(make_trainer(callbacks=callbacks, log_every_n_steps=100), model)
        reads.append(begin.reads)
    assert len(reads[0]) == 8
    assert reads[0] == reads[1]


SCRIPT = """
import json, sys, warnings
from pathlib import Path
import lightning.pytorch as pl
import torch.distributed as dist
from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks import calibration_count
from amct_lightning.modules import calibration
from tests.callbacks.conftest import loader
from tests.callbacks.converting.test_missed import RUNS, Keep, OwnPath

out = Path(sys.argv[1])
reduce = calibration.dist.all_reduce

class Watch(pl.Callback):
    def __init__(self):
        self.missed, self.clips, self.collectives = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        quantizer = pl_module.decode.input_quantizer
        self.missed.append(quantizer.missed)
        self.clips.append(quantizer.clip_max.item())

    def all_reduce(self, tensor, *args, **kwargs):
        if list(tensor.shape) == [3, 5]:
            self.collectives.append(len(self.missed))
        return reduce(tensor, *args, **kwargs)

results = {}
for name, (reached_from, patience, *_) in RUNS.items():
    watch = Watch()
    calibration_count._PATIENCE, calibration.dist.all_reduce = patience, watch.all_reduce
    (out / name).mkdir(exist_ok=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=out / name,
        callbacks=[QuantRetrainCallback(), watch, Keep(3)],
    )
    pl.seed_everything(0)
    model = OwnPath(reached_from if trainer.global_rank else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(batches=8))
    told = sum("The record lacks" in str(warning.message) for warning in caught)
    results[name] = {"missed": watch.missed, "clips": watch.clips, "collectives": watch.collectives, "told": told}
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps(results))
"""

# From which batch on the second process reaches the layer; the patience; after which batches they come together, and
# once more when the training ends; from which one on they know the range.
RUNS: dict[str, tuple[int, int, list[int], int]] = {
    "never": (100, 1024, [0, 1, 2, 3, 4, 7, 8], 8),
    "later": (3, 1024, [0, 1, 2, 3], 3),
    "late": (5, 0, [0, 3, 7], 7),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("ddp")
    script = out / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("run", list(RUNS))
def test_two_processes_give_up_alike_and_agree_on_what_one_of_them_reaches_later(ranks: Any, run: str) -> None:
    out, results = ranks
    _, _, collectives, missed = RUNS[run]
    first, second = (result[run] for result in results)
    for result in (first, second):
        assert result["missed"] == [True] * missed + [False] * (8 - missed)
        assert result["collectives"] == collectives
    assert first["clips"][missed:] == second["clips"][missed:]
    assert (first["told"], second["told"]) == (1, 0)
    assert list(QuantRecord.load(out / run / "3.record.txt")) == ALL
    assert list(QuantRecord.load(out / run / "record.txt")) == (ALL if missed == 8 else [*ALL, "decode"])
