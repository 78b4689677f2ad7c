"""QuantMonitor in training: what it watches, when, and that nothing else notices it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn

from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks.monitor.monitor import QuantMonitor
from amct_lightning.monitor_format import COLUMNS, FILE_NAME
from tests.callbacks.conftest import Net, TrainerFactory, loader

Rows = list[dict[str, str]]


def rows_of(folder: Path) -> Rows:
    with (folder / FILE_NAME).open(newline="") as file:
        return list(csv.DictReader(file))


def steps_of(rows: Rows) -> list[int]:
    return sorted({int(row["step"]) for row in rows})


def monitor(**kwargs: Any) -> QuantMonitor:
    return QuantMonitor(**{"every_n_steps": 2, "verbose": False, **kwargs})


class Dropping(Net):
    """With something random in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(4, nn.Dropout(0.3))


class HookCount(Callback):
    """Count the forward hooks on all modules while each batch runs, and when it is over."""

    def __init__(self) -> None:
        self.during: list[int] = []
        self.after: list[int] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.during.append(count_hooks(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.after.append(count_hooks(pl_module))


def count_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def _trained(make_trainer: TrainerFactory, callbacks: Sequence[Callback], **kwargs: Any) -> tuple[Net, torch.Tensor]:
    model = Dropping()
    torch.manual_seed(1)
    make_trainer(callbacks=list(callbacks), **kwargs).fit(model, loader(), loader(1))
    return model, torch.get_rng_state()


@pytest.mark.usefixtures("every_execution")
@pytest.mark.parametrize("first", [True, False])
def test_training_is_the_same_to_the_bit(make_trainer: TrainerFactory, first: bool) -> None:
    plain, plain_random = _trained(make_trainer, [QuantRetrainCallback()])
    callbacks: list[Callback] = [QuantRetrainCallback(), monitor(every_n_steps=1)]
    watched, watched_random = _trained(make_trainer, callbacks[::-1] if first else callbacks)
    assert torch.equal(plain_random, watched_random)
    expected = plain.state_dict()
    assert expected.keys() == watched.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in watched.state_dict().items())


def test_the_order_of_the_callbacks_does_not_matter(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    texts = []
    for order in (1, -1):
        callbacks: list[Callback] = [QuantRetrainCallback({"batch_num": 2}), monitor(every_n_steps=1)]
        _trained(make_trainer, callbacks[::order])
        texts.append((tmp_path / FILE_NAME).read_text())
    assert texts[0] == texts[1]


def test_layers_have_hooks_in_sampled_batches_only(make_trainer: TrainerFactory) -> None:
    count = HookCount()
    make_trainer(callbacks=[QuantRetrainCallback(), monitor(every_n_steps=3), count]).fit(Net(), loader())
    assert count.during == [0, 0, 2, 0, 0, 2, 0, 0]
    assert count.after == [0] * 8


def test_every_interval_has_a_line_per_layer(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    make_trainer(callbacks=[QuantRetrainCallback(), monitor()], max_epochs=3).fit(Net(), loader())
    rows = rows_of(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    expected = [(step, epoch, n) for step, epoch in ((2, 0), (4, 0), (6, 1), (8, 1), (10, 2), (12, 2)) for n in (0, 4)]
    assert [(row["step"], row["epoch"], row["layer"]) for row in rows] == [
        (str(step), str(epoch), f"net.{n}") for step, epoch, n in expected
    ]
    assert all(row.values() for row in rows)
    last = [float(row["clip_max"]) for row in rows if row["layer"] == "net.4"]
    assert len(set(last)) == len(last)  # it is learned


@pytest.mark.usefixtures("every_execution")
def test_factors_are_those_of_the_model_after_the_step(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = Net()
    make_trainer(callbacks=[QuantRetrainCallback(), monitor(every_n_steps=8)]).fit(model, loader())
    for row, layer in zip(rows_of(tmp_path), (model.net[0], model.net[4]), strict=True):
        assert float(row["clip_max"]) == pytest.approx(float(layer.input_quantizer.clip_max.detach()), rel=1e-6)
        assert float(row["scale"]) == pytest.approx(float(layer.input_quantizer.scale), rel=1e-6)
        assert float(row["offset"]) == float(layer.input_quantizer.offset)


def test_the_default_interval_is_that_of_the_trainer(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    callbacks = [QuantRetrainCallback(), QuantMonitor(verbose=False)]
    make_trainer(callbacks=callbacks, log_every_n_steps=3).fit(Net(), loader())
    assert steps_of(rows_of(tmp_path)) == [3, 6]


def test_a_trainer_that_logs_nothing_is_not_watched(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    callbacks = [QuantRetrainCallback(), QuantMonitor()]
    make_trainer(callbacks=callbacks, log_every_n_steps=0).fit(Net(), loader())
    assert not (tmp_path / FILE_NAME).exists()


def test_accumulated_batches_belong_to_one_step(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model, hooks = Net(), []
    step = model.training_step
    model.training_step = lambda *args: (hooks.append(count_hooks(model)), step(*args))[1]
    callbacks = [QuantRetrainCallback(), monitor()]
    make_trainer(callbacks=callbacks, accumulate_grad_batches=3, max_epochs=1).fit(model, loader(batches=8))
    assert hooks == [0, 0, 0, 2, 2, 2, 0, 0]
    assert steps_of(rows_of(tmp_path)) == [2]


class Alternating(Net):
    """Two optimizers, both stepping in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=1e-2) for layer in (self.net[0], self.net[4])]


def test_with_several_optimizers_no_interval_is_skipped(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    callbacks = [QuantRetrainCallback(), monitor(every_n_steps=5)]
    make_trainer(callbacks=callbacks).fit(Alternating(), loader(batches=8))
    assert steps_of(rows_of(tmp_path)) == [6, 10, 16, 20, 26, 30]


def test_layers_without_a_range_show_their_weights_only(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    callbacks = [QuantRetrainCallback({"batch_num": 3}), monitor(every_n_steps=1)]
    make_trainer(callbacks=callbacks, max_epochs=1).fit(Net(), loader())
    rows = [row for row in rows_of(tmp_path) if row["layer"] == "net.4"]
    unknown = [{name for name, cell in row.items() if not cell} for row in rows]
    range_and_drift = {*COLUMNS[3:11], "clip_drift", "weight_scale_drift"}
    assert unknown == [range_and_drift, range_and_drift, set(), set()]


def test_a_layer_that_waits_in_float_is_measured_with_the_range_it_has(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    callback = QuantRetrainCallback(schedule={"start": 2, "calibrate": 1})
    make_trainer(callbacks=[callback, monitor(every_n_steps=4)], max_epochs=3).fit(Net(), loader())
    cells = [row["sqnr_input_db"] for row in rows_of(tmp_path) if row["layer"] == "net.4"]
    assert cells[0] == ""
    assert all(float(cell) > 20 for cell in cells[1:])


def test_a_layer_of_a_submodule_has_its_name_in_the_record(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    make_trainer(callbacks=[QuantRetrainCallback(submodule="net"), monitor()]).fit(Net(), loader())
    assert {row["layer"] for row in rows_of(tmp_path)} == {"0", "4"}


def test_without_the_quantizing_callback_it_says_that_nothing_is_watched(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"nothing is watched.*add one: Trainer\(callbacks=\[QuantRetrainCallback"):
        make_trainer(callbacks=[monitor()]).fit(Net(), loader())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"every_n_steps": 0}, ValueError),
        ({"every_n_steps": True}, TypeError),
        ({"every_n_steps": 2.0}, TypeError),
        ({"worst_k": -1}, ValueError),
        ({"worst_k": None}, TypeError),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"QuantMonitor\({next(iter(arguments))}="):
        QuantMonitor(**arguments)


class Failing(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 1:
            raise RuntimeError("on purpose")
        return loss


def test_an_exception_leaves_no_hook(make_trainer: TrainerFactory) -> None:
    model = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(callbacks=[QuantRetrainCallback(), monitor()]).fit(model, loader())
    assert count_hooks(model) == 0


def test_an_epoch_that_is_cut_short_leaves_no_hook(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    class Short(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    class LooksInValidation(Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert count_hooks(pl_module) == 0

    model = Short()
    callbacks = [QuantRetrainCallback(), monitor(every_n_steps=4), LooksInValidation()]
    make_trainer(callbacks=callbacks).fit(model, loader(), loader(1))
    assert count_hooks(model) == 0
    assert steps_of(rows_of(tmp_path)) == [4]


@pytest.mark.parametrize(("every", "fullgraph"), [(1, True), (4, False)])
def test_of_compiled_layers_factors_and_weights_are_watched(
    make_trainer: TrainerFactory, tmp_path: Path, every: int, fullgraph: bool
) -> None:
    class Compiled(Net):
        def on_fit_start(self) -> None:
            self.net.compile(backend="eager", fullgraph=fullgraph)

    clips = {"activations": {"clip_max": 2.0, "clip_min": -2.0}}  # a calibration breaks the graph by itself
    callbacks = [QuantRetrainCallback(clips if fullgraph else None), monitor(every_n_steps=every)]
    with pytest.warns(UserWarning, match="torch.compile"):
        make_trainer(callbacks=callbacks, max_epochs=1).fit(Compiled(), loader())
    row = rows_of(tmp_path)[-1]
    assert row["clip_max"]
    assert float(row["sqnr_weight_db"]) > 30
    assert row["sqnr_input_db"] == ""


def test_a_fast_dev_run_leaves_no_file(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    watch = monitor(every_n_steps=50)
    make_trainer(callbacks=[QuantRetrainCallback(), watch], fast_dev_run=True).fit(Net(), loader())
    assert watch.summary().step == 1
    assert not (tmp_path / FILE_NAME).exists()


def test_other_callbacks_can_monitor_the_model(make_trainer: TrainerFactory) -> None:
    stop = EarlyStopping("quant/sqnr_input_db_min", mode="max", stopping_threshold=1.0, check_on_train_epoch_end=True)
    trainer = make_trainer(callbacks=[stop, QuantRetrainCallback(), monitor()], max_epochs=5)
    trainer.fit(Net(), loader())
    assert trainer.current_epoch == 1
    assert trainer.callback_metrics["quant/sqnr_weight_db_mean"] > 30
