"""``amct-lightning fit`` and its like, and QuantCLI in a script of one's own."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from amct_lightning import QuantRecord, QuantRetrainCallback, quantized_layers
from amct_lightning.cli import QuantCLI
from tests.cli.conftest import Folder


def trainer_with(folder: Folder, run: str, *arguments: str) -> pl.Trainer:
    """Make what the command makes, without running it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.path)
        return QuantCLI(args=["--config", run, *arguments], run=False).trainer


def quant_callbacks(trainer: pl.Trainer) -> list[QuantRetrainCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, QuantRetrainCallback)]


def test_fit_gives_the_record_of_the_same_training_in_a_script(folder: Folder) -> None:
    assert folder("fit", "--config", folder.run_yaml(), "--quant.record_file", "cli.txt").status == 0
    demo: Any = runpy.run_path(str(folder / "demo_module.py"))
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[QuantRetrainCallback(record_file="script.txt")],
    )
    trainer.fit(demo["Classifier"](), datamodule=demo["Noise"]())
    assert (folder / "cli.txt").read_bytes() == (folder / "script.txt").read_bytes()


def test_choices_come_inline_from_a_file_or_from_options(folder: Folder) -> None:
    choices = {"weights": {"dst_type": "INT4"}, "skip_layers": ["net.0"]}
    (folder / "choices.yaml").write_text(yaml.safe_dump(choices))
    runs = {
        "inline": ("fit", "--config", folder.run_yaml("a.yaml", quant={"config": choices})),
        "file": ("fit", "--config", folder.run_yaml("b.yaml"), "--quant.config", "choices.yaml"),
        "options": ("fit", "--config", "b.yaml", "--quant.config", yaml.safe_dump(choices)),
    }
    for name, arguments in runs.items():
        assert folder(*arguments, "--quant.record_file", f"{name}.txt", "--trainer.max_epochs=1").status == 0
        record = QuantRecord.load(folder / f"{name}.txt")
        assert {layer: factors.wts_type for layer, factors in record.items()} == {"net.4": "INT4"}


def test_a_preset_comes_from_yaml_and_from_an_option(folder: Folder) -> None:
    runs = {
        "yaml": ("fit", "--config", folder.run_yaml("a.yaml", quant={"config": "A4W4"})),
        "option": ("fit", "--config", folder.run_yaml("b.yaml"), "--quant.config=a4w4"),
    }
    for name, arguments in runs.items():
        assert folder(*arguments, "--quant.record_file", f"{name}.txt", "--trainer.max_epochs=1").status == 0
        assert QuantRecord.load(folder / f"{name}.txt")["net.4"].wts_type == "INT4"
    finished = folder("fit", "--config", "b.yaml", "--quant.config", "A4W5")
    assert finished.status == 2
    assert re.search(r"Neither a preset \(INT8, A8W8.*nor a config file\. Did you mean 'A4W4'", finished.err)


def test_the_schedule_comes_inline_and_from_options_which_win(folder: Folder) -> None:
    run = folder.run_yaml(quant={"schedule": {"start": 1, "freeze_bn": 0.5, "layers": {"net.4": {"freeze_data": 1}}}})
    (callback,) = quant_callbacks(trainer_with(folder, run, "--quant.schedule.freeze_weights=1"))
    schedule = callback.schedule
    assert schedule is not None
    assert (schedule.start, schedule.freeze_bn, schedule.freeze_weights) == (1, 0.5, 1)
    # 1 is epoch 1 and 1.0 all epochs; the two are equal numbers, so the types are what tells them apart
    assert isinstance(schedule.start, int)
    assert isinstance(schedule.freeze_weights, int)
    assert schedule.layers == {"net.4": {"freeze_data": 1}}
    (callback,) = quant_callbacks(trainer_with(folder, run, "--quant.schedule.start=0.5"))
    assert callback.schedule is not None
    assert callback.schedule.start == 0.5


@pytest.mark.parametrize("off", [["--quant.enabled=false"], ["--quant=false"], ["--quant", "null"], []])
def test_quantization_can_be_switched_off(folder: Folder, off: list[str]) -> None:
    run = folder.run_yaml() if off else folder.run_yaml(quant=None)
    assert quant_callbacks(trainer_with(folder, run, *off)) == []


def test_a_float_run_writes_no_record(folder: Folder) -> None:
    assert folder("fit", "--config", folder.run_yaml(quant=False)).status == 0
    assert not (folder / "record.txt").exists()


LISTED = [{"class_path": "amct_lightning.QuantRetrainCallback", "init_args": {"record_file": "listed.txt"}}]


def test_a_callback_that_the_trainer_lists_takes_the_place_of_quant(folder: Folder) -> None:
    (callback,) = quant_callbacks(trainer_with(folder, folder.run_yaml(trainer={"callbacks": LISTED})))
    assert callback.record_file == "listed.txt"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--quant.quant_lr_scale=0.1", "configured twice: quant gives quant_lr_scale, and trainer.callbacks lists"),
        ("--quant.schedule.start=1", "configured twice: quant gives schedule"),
        ("--quant.enabled=false", "quant is switched off"),
    ],
)
def test_configuring_it_twice_is_an_error(folder: Folder, option: str, message: str) -> None:
    status, _, err = folder("fit", "--config", folder.run_yaml(trainer={"callbacks": LISTED}), option)
    assert status == 2
    assert message in err


def test_the_callback_stands_before_those_that_average_weights(folder: Folder) -> None:
    averaging = [{"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}}]
    trainer = trainer_with(folder, folder.run_yaml(trainer={"callbacks": averaging}))
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names.index("QuantRetrainCallback") < names.index("StochasticWeightAveraging")


def test_a_printed_configuration_gives_the_same_run_to_the_bit(folder: Folder) -> None:
    quant = {"config": {"weights": {"algo": "ulq_retrain"}}, "quant_lr_scale": 0.01, "schedule": {"freeze_bn": 1}}
    run = folder.run_yaml(quant=quant, trainer={"enable_checkpointing": True})
    status, printed, _ = folder("fit", "--config", run, "--print_config")
    assert status == 0
    (folder / "printed.yaml").write_text(printed)
    weights = []
    for name in (run, "printed.yaml"):
        root = folder / f"of_{name}"
        assert folder("fit", "--config", name, f"--trainer.default_root_dir={root}").status == 0
        (checkpoint,) = root.rglob("*.ckpt")
        weights.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    first, second = (folder / f"of_{name}" / "record.txt" for name in (run, "printed.yaml"))
    assert first.read_bytes() == second.read_bytes()


def test_a_second_run_in_the_same_folder_keeps_the_configuration_of_the_first(folder: Folder) -> None:
    run = folder.run_yaml("config.yaml")  # without a logger, that is also where the run would save its own
    before = (folder / "config.yaml").read_text()
    for epochs in ("1", "1", "2"):
        assert folder("fit", "--config", run, f"--trainer.max_epochs={epochs}").status == 0
    assert (folder / "config.yaml").read_text() == before
    saved = {path.name: yaml.safe_load(path.read_text())["trainer"] for path in folder.path.glob("config-*.yaml")}
    assert {name: trainer["max_epochs"] for name, trainer in saved.items()} == {"config-1.yaml": 1, "config-2.yaml": 2}


def test_a_checkpoint_is_tested_without_saying_again_how_it_is_quantized(folder: Folder) -> None:
    quant = {"config": {"skip_layers": ["net.0"]}}
    run = folder.run_yaml(quant=quant, trainer={"enable_checkpointing": True, "max_epochs": 1})
    assert folder("fit", "--config", run).status == 0
    (checkpoint,) = folder.path.rglob("*.ckpt")
    for command in ("test", "validate", "predict"):
        finished = folder(command, "--config", folder.run_yaml("bare.yaml"), f"--ckpt_path={checkpoint}")
        assert finished.status == 0, finished.err


def test_an_error_in_the_users_code_says_where_and_keeps_the_traceback(folder: Folder) -> None:
    status, _, err = folder("fit", "--config", folder.run_yaml(model="demo_module.Broken"))
    assert status == 2
    assert "amct-lightning fit: error: ValueError: a bad batch\nIt was raised in training_step, line " in err
    assert "Traceback" not in err
    found = re.search(r"The traceback is in '(.*)'", err)
    assert found is not None
    kept = Path(found[1])
    try:
        assert 'raise ValueError("a bad batch")' in kept.read_text()
    finally:
        kept.unlink()


def test_ctrl_c_is_status_130(folder: Folder) -> None:
    assert folder("fit", "--config", folder.run_yaml(model="demo_module.Interrupted")).status == 130


def test_a_script_of_ones_own_has_the_same_options(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder.path)
    (folder / "script.py").write_text(
        "from demo_module import Classifier, Noise\n"
        "from amct_lightning.cli import QuantCLI\n"
        "cli = QuantCLI(Classifier, Noise, save_config_callback=None)\n"
    )
    options = (
        "--trainer.max_epochs=1 --trainer.accelerator=cpu --trainer.logger=false --model.width=2 --quant.submodule=net"
    )
    monkeypatch.setattr(sys, "argv", ["script.py", "fit", *options.split()])
    cli = runpy.run_path("script.py")["cli"]
    assert list(quantized_layers(cli.model.net)) == ["0", "4"]
    assert len(QuantRecord.load(folder / "record.txt")["0"].scale_w) == 2
    assert not (folder / "config.yaml").exists()


def test_whole_numbers_stay_whole_whatever_was_imported_first(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """``limit_train_batches=1`` is one batch, ``1.0`` all of them."""
    # As it is if rich was imported before Lightning: Python gives out the union of the same types that it has already.
    monkeypatch.setitem(pl.Trainer.__init__.__annotations__, "limit_train_batches", float | int | None)
    run = folder.run_yaml(quant={"schedule": {"freeze_bn": 1, "freeze_data": 1.0}})
    status, printed, _ = folder("fit", "--config", run, "--trainer.limit_train_batches=1", "--print_config")
    assert status == 0
    config = yaml.safe_load(printed)
    assert repr(config["trainer"]["limit_train_batches"]) == "1"
    assert (repr(config["quant"]["schedule"]["freeze_bn"]), repr(config["quant"]["schedule"]["freeze_data"])) == (
        "1",
        "1.0",
    )
