"""With Lightning: between two logging intervals the callbacks add no wait for the device to the float training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from amct_lightning import QuantMonitor, QuantRetrainCallback, QuantSchedule
from tests.ascend.operators.tracing import DeviceTrace, Wait
from tests.ascend.training import NPU, Net, loader, make_trainer

pytestmark = pytest.mark.npu

BATCHES, EPOCHS, LOG_EVERY = 7, 4, 5
# Calibrated in the float epoch 0 and again in epoch 2, everything frozen in epoch 3.
SCHEDULE = {"start": 1, "calibrate": [0, 2], "calibrate_batches": 2} | dict.fromkeys(
    ("freeze_data", "freeze_weights", "freeze_bn"), 3
)
CALIBRATION_ENDS = {1, 2 * BATCHES + 1}
PHASE_CHANGES = {end + 1 for end in CALIBRATION_ENDS}

# The documented places (docs/ascend-operators.md): function -> how often in one batch.
NAN_FLAGS = {"amct_lightning/callbacks/nonfinite.py:check": 1}
MONITOR = {"amct_lightning/callbacks/monitor/sampling.py:collect": 1}
SCALARS_OF_THE_MODEL = {"lightning/pytorch/core/module.py:__to_tensor": 7}
QUANT_PHASE = {"lightning/pytorch/core/module.py:__to_tensor": 1}
LOGGED_TO_THE_LOGGER = {"lightning/fabric/utilities/apply_func.py:to_item": 1}


class Mark(pl.Callback):
    """Tells a trace which batch is running; the first callback, so that all others are in the batch."""

    def __init__(self, trace: DeviceTrace) -> None:
        self.trace = trace
        self.batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.trace.phase = str(self.batches)
        self.batches += 1

    def on_validation_start(self, *args: Any) -> None:
        self.trace.phase = "validation"

    def on_validation_end(self, *args: Any) -> None:
        self.trace.phase = "epoch end"

    def on_train_end(self, *args: Any) -> None:
        self.trace.phase = "end"


def trace_training(folder: Path, callbacks: list[pl.Callback], precision: Any) -> DeviceTrace:
    trace = DeviceTrace("setup")
    mark = Mark(trace)
    trainer = make_trainer(
        folder,
        callbacks=[mark, *callbacks, ModelCheckpoint(folder, save_last=True)],
        enable_checkpointing=True,
        max_epochs=EPOCHS,
        log_every_n_steps=LOG_EVERY,
        logger=CSVLogger(folder),
        gradient_clip_val=1.0,
        precision=precision,
        **NPU,
    )
    with trace:
        trainer.fit(Net(), loader(BATCHES), loader(2))
    assert mark.batches == BATCHES * EPOCHS == trainer.global_step
    return trace


def quantized_training(folder: Path, precision: Any) -> DeviceTrace:
    retrain = QuantRetrainCallback(record_file=folder / "r.txt", schedule=QuantSchedule(**SCHEDULE), search_n=True)
    trace = trace_training(folder, [retrain, QuantMonitor(LOG_EVERY, verbose=False)], precision)
    assert (folder / "r.txt").exists()
    return trace


def batches_with(waits: list[Wait]) -> dict[int, Counter[str]]:
    found: dict[int, Counter[str]] = {}
    for wait in waits:
        if wait.phase.isdigit():
            found.setdefault(int(wait.phase), Counter())[wait.where] += 1
    return found


def allowed(batch: int) -> Counter[str]:
    """What the callbacks may read in a batch."""
    counts: Counter[str] = Counter()
    is_interval = (batch + 1) % LOG_EVERY == 0
    if is_interval or batch in CALIBRATION_ENDS:
        counts.update(NAN_FLAGS)
    if is_interval:
        for read in (MONITOR, SCALARS_OF_THE_MODEL, LOGGED_TO_THE_LOGGER):
            counts.update(read)
    if batch % BATCHES == 0 or batch in PHASE_CHANGES:
        counts.update(QUANT_PHASE)
    return counts


@pytest.fixture(scope="module", params=["32-true", "bf16-mixed", "16-mixed"])
def trainings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeviceTrace, ...]:
    """The same training in float and quantized."""
    folders = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("quantized")
    return trace_training(folders[0], [], request.param), quantized_training(folders[1], request.param)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_batches_wait_at_the_documented_places_only(trainings: tuple[DeviceTrace, ...]) -> None:
    floating, quantized = (batches_with(trace.waits) for trace in trainings)
    assert len({str(counts) for counts in floating.values()}) <= 1  # Lightning's own: none, or that of the loss scaler
    for batch in range(BATCHES * EPOCHS):
        added = quantized.get(batch, Counter()) - floating.get(batch, Counter())
        assert added - allowed(batch) == Counter(), f"batch {batch}"


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_batches_between_them_do_not_wait_at_all(trainings: tuple[DeviceTrace, ...]) -> None:
    floating, quantized = (batches_with(trace.waits) for trace in trainings)
    quiet = [batch for batch in range(BATCHES * EPOCHS) if not allowed(batch)]
    assert len(quiet) > BATCHES * EPOCHS / 2
    assert {batch: quantized.get(batch) for batch in quiet} == {batch: floating.get(batch) for batch in quiet}


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_validation_waits_no_more_than_that_of_the_float_model(trainings: tuple[DeviceTrace, ...]) -> None:
    floating, quantized = (Counter(w.where for w in t.waits if w.phase == "validation") for t in trainings)
    assert quantized == floating


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_no_operator_of_the_trainings_falls_back_to_the_host(trainings: tuple[DeviceTrace, ...]) -> None:
    for trace in trainings:
        assert trace.operators("fallbacks") == set()
