"""``amct-lightning fit`` on NPUs, as it is typed in a shell."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from amct_lightning import QuantRecord
from amct_lightning.cli import main
from tests.ascend.processes.launching import Ended, run_job
from tests.cli.conftest import MODULE

COMMAND = [str(Path(sys.executable).with_name("amct-lightning"))]
MODULE_COMMAND = [sys.executable, "-m", "amct_lightning"]
DEMO = ["fit", "--model=demo_module.Classifier", "--data=demo_module.Noise"]
OPTIONS = ["--trainer.accelerator=npu", "--trainer.devices=2", "--trainer.strategy=ascend"]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
STRATEGY = {
    "class_path": "amct_lightning.AscendStrategy",
    "init_args": {"hccl_connect_timeout": 300, "hccl_deterministic": True, "start_method": "popen"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "demo_module.py").write_text(MODULE)
    trainer = {**QUIET, "accelerator": "npu", "devices": 2, "strategy": STRATEGY}
    run = {"model": "demo_module.Classifier", "data": "demo_module.Noise", "trainer": trainer}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def test_two_devices_by_options_and_by_yaml(npu_run: Any, folder: Path) -> None:
    quiet = [f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items()]

    def run(command: list[str]) -> Ended:
        return run_job(command, cwd=folder)

    commands = [
        [*COMMAND, *DEMO, *OPTIONS, *quiet, "--quant.record_file=options.txt"],
        [*MODULE_COMMAND, "fit", "--config=run.yaml", "--quant.record_file=yaml.txt"],
    ]
    with ThreadPoolExecutor(2) as pool:
        for job in pool.map(run, commands):
            assert (job.returncode, job.left) == (0, []), job.output
            assert "2 processes are connected over hccl" in job.output
            assert job.output.count("`Trainer.fit` stopped: `max_epochs=2` reached.") == 1
    assert (folder / "options.txt").read_bytes() == (folder / "yaml.txt").read_bytes()
    assert list(QuantRecord.load(folder / "yaml.txt")) == ["net.0", "net.4"]
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["trainer"]["accelerator"] == "npu"


def test_without_torch_npu_there_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "torch_npu" not in sys.modules
    monkeypatch.chdir(folder)
    assert main(["fit", "--config=run.yaml"]) == 2
    printed = capfd.readouterr().err
    assert (
        "fit: error: accelerator='npu' cannot be used. torch_npu, PyTorch's backend for Ascend NPUs, is not installed"
        in printed
    )
    assert "pip install torch_npu==" in printed
    assert "Traceback" not in printed
    assert not list(folder.glob("*.txt"))
