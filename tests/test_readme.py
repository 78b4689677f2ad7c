"""What the README shows is copied into an empty folder and run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from torch import nn

from amct_lightning import QuantRecord
from amct_lightning.config import load_config

README = Path(__file__).parents[1] / "README.md"
CLI = """
from lightning.pytorch.cli import LightningCLI
from script import Classifier, DataLoader, TensorDataset, torch

class Noise(Classifier):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(10, (64,))), batch_size=32)

LightningCLI(Noise, save_config_kwargs={"overwrite": True})
"""


def blocks(label: str) -> str:
    """Join the code blocks that the README marks with a label."""
    found = re.findall(rf"<!-- runs: {label} -->\n```\w+\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert found
    return "\n".join(found)


def run(folder: Path, *arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_the_lightning_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("lightning"))
    run(tmp_path, "script.py")
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.0", "net.4"]


def test_the_script_without_lightning(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("plain"))
    assert "A8W8" in run(tmp_path, "script.py")
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["0", "4"]


def test_the_yaml_choices(tmp_path: Path) -> None:
    (tmp_path / "choices.yaml").write_text(blocks("yaml"))
    layers = {
        "stem": nn.Conv2d(3, 8, 3),
        "up": nn.ConvTranspose2d(8, 8, 2),
        "blocks.0.fc1": nn.Linear(8, 8),
        "blocks.0.fc2": nn.Linear(8, 8),
        "head": nn.Linear(8, 2),
    }
    config = load_config(tmp_path / "choices.yaml").resolve(layers)
    assert config.batch_num == 2
    widths = {
        name: (layer.retrain_data_config.num_bits, layer.retrain_weight_config.num_bits)
        for name, layer in config.items()
        if layer.retrain_enable
    }
    assert widths == {"stem": (8, 8), "blocks.0.fc1": (16, 8), "blocks.0.fc2": (8, 4)}


def test_the_choices_inline_in_the_yaml_of_a_lightning_cli_run(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("lightning"))
    (tmp_path / "cli.py").write_text(CLI)
    (tmp_path / "run.yaml").write_text(blocks("cli"))
    run(tmp_path, "cli.py", "fit", "--config", "run.yaml")
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.0"]
