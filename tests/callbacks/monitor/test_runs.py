"""QuantMonitor over several runs, and what it tells people when one ends."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks.monitor.monitor import QuantMonitor
from amct_lightning.callbacks.monitor.table import MonitorSummary
from amct_lightning.monitor_format import FILE_NAME, LayerReading
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader
from tests.callbacks.monitor.test_monitor import monitor, rows_of, steps_of


@pytest.mark.parametrize("cut", [False, True])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(
    make_trainer: TrainerFactory, tmp_path: Path, cut: bool
) -> None:
    def fit(folder: Path, epochs: int, ckpt: Path | None = None) -> QuantMonitor:
        watch = monitor(every_n_steps=3, worst_k=1)
        save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        callbacks = [watch, QuantRetrainCallback(record_file=folder / "r.txt"), save]
        trainer = make_trainer(
            callbacks=callbacks, max_epochs=epochs, default_root_dir=folder, enable_checkpointing=True
        )
        trainer.fit(Net(), loader(), ckpt_path=ckpt)
        return watch

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "cut", 3)
    file = tmp_path / "cut" / FILE_NAME
    if cut:  # what a kill in the middle of a write can leave
        file.write_bytes(file.read_bytes()[:-20])
    resumed = fit(tmp_path / "cut", 4, tmp_path / "cut" / "epoch=0.ckpt")
    assert steps_of(rows_of(tmp_path / "cut")) == [3, 6, 9, 12, 15]
    assert file.read_text() == (tmp_path / "whole" / FILE_NAME).read_text()
    assert resumed.state_dict()["shown"] == whole.state_dict()["shown"]


def test_fitting_again_goes_on(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    config = {"activations": {"fixed_min": "after_relu"}}  # so that both ends of net.4 are learned
    model, callbacks = Net(), [QuantRetrainCallback(config), monitor()]
    trainer = make_trainer(callbacks=callbacks, max_epochs=1)
    trainer.fit(model, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    rows = rows_of(tmp_path)
    assert steps_of(rows) == [2, 4, 6, 8]
    drifts = [float(row["clip_drift"]) for row in rows if row["layer"] == "net.4"]
    assert all(before < after for before, after in pairwise(drifts))  # from where the first calibration ended


def test_another_model_begins_anew(make_trainer: TrainerFactory) -> None:
    watch = monitor(every_n_steps=1)
    for _ in range(2):
        make_trainer(callbacks=[QuantRetrainCallback(), watch], max_epochs=1).fit(Net(), loader())
        first = dict(watch.state_dict()["clips"])
    watch_once = monitor(every_n_steps=1)
    make_trainer(callbacks=[QuantRetrainCallback(), watch_once], max_epochs=1).fit(Net(), loader())
    assert all(torch.equal(value, first[name]) for name, value in watch_once.state_dict()["clips"].items())


def _printed(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(message for message in caplog.messages if message.startswith("QuantMonitor"))


def test_the_worst_layers_are_printed_at_the_end(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    watch = monitor(verbose=True, worst_k=1)
    with caplog.at_level("INFO"):
        make_trainer(callbacks=[QuantRetrainCallback(), watch]).fit(Net(), loader())
    worst = min(watch.summary().readings, key=lambda reading: reading.sqnr_input_db or 0)
    text = _printed(caplog)
    assert "step 8, the worst 1 of 2 layers" in text
    assert str(tmp_path / FILE_NAME) in text
    lines = [line for line in text.splitlines() if line.startswith("net.")]
    assert len(lines) == 1
    assert lines[0].split()[:3] == [worst.layer, f"{worst.sqnr_input_db:.1f}", "dB"]


def test_a_training_shorter_than_an_interval_says_so(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        make_trainer(callbacks=[QuantRetrainCallback(), monitor(every_n_steps=9, verbose=True)]).fit(Net(), loader())
    assert "before the 9 steps of an interval" in _printed(caplog)


def test_what_is_not_known_has_a_place_in_the_table() -> None:
    readings = (LayerReading("known", sqnr_input_db=math.inf, clip_max=1.0, clip_min=-2.0), LayerReading("un.known"))
    lines = str(MonitorSummary(7, readings)).splitlines()
    assert lines[-2].split() == ["known", "exact", "-", "-2", "..", "1", "-", "-", "-", "-"]
    assert lines[-1].split() == ["un.known", *["-"] * 7]


def test_watched_layers_can_be_read_as_objects(make_trainer: TrainerFactory) -> None:
    watch = monitor()
    make_trainer(callbacks=[QuantRetrainCallback(), watch]).fit(Net(), loader())
    readings: Iterable[Any] = watch.summary().readings
    assert [reading.layer for reading in readings] == ["net.0", "net.4"]
    assert watch.summary().step == 2 * BATCHES


def test_at_a_prompt_and_in_a_notebook_the_summary_shows_the_table() -> None:
    readings = (
        LayerReading("<b>", sqnr_input_db=20.0),
        LayerReading("a", sqnr_input_db=9.0, saturation_low=0.0, saturation_high=0.01),
    )
    summary = MonitorSummary(7, readings, limit=1)
    assert repr(summary) == str(summary)
    head, table = ElementTree.fromstring(f"<body>{summary._repr_html_()}</body>")
    assert (head.text or "").startswith("Quantization at step 7, the worst 1 of 2 layers (SQNR: ")
    titles, row = ([cell.text for cell in line] for line in table.iter("tr"))
    assert dict(zip(titles, row, strict=True))["Clipped"] == "1.00%"
    assert (titles[:2], row[:2]) == (["Layer", "Input SQNR"], ["a", "9.0 dB"])
    assert "&lt;b&gt;" in MonitorSummary(7, readings)._repr_html_()
