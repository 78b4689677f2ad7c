"""Training step of the digits demo with and without QuantMonitor at its default interval, side by side in one process.

python -m tests.benchmarks.monitor
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional

from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks.monitor.monitor import QuantMonitor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from digits_data import digits
from digits_model import network

STEPS, ROUNDS, WARM_UP = 100, 21, 10


class Digits(pl.LightningModule):
    """The network of the demo."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=6e-3)


class Clock(pl.Callback):
    """Seconds of wall clock and of the processor per step, everything between two steps included."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.start = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        end = time.perf_counter(), time.process_time()
        self.wall, self.cpu = ((b - a) / (trainer.global_step - WARM_UP) for a, b in zip(self.start, end, strict=True))


def run(folder: Path, monitors: list[pl.Callback]) -> tuple[float, float]:
    """Return the seconds of wall clock and of the processor that a step takes."""
    clock = Clock()
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_steps=STEPS + WARM_UP,
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[QuantRetrainCallback(), *monitors, clock],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Digits(), digits(0)[0])
    return clock.wall, clock.cpu


def main() -> None:
    """Print the medians, and the ratios of neighbouring runs and of the fastest, which other load disturbs least."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        variants: dict[str, Any] = {"without": list, "with": lambda: [QuantMonitor(verbose=False)]}
        times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
        for number in range(ROUNDS):
            for variant in sorted(variants, reverse=number % 2 == 0):  # neither is always the first
                times[variant].append(run(Path(name), variants[variant]()))
    for index, clock in enumerate(("wall clock", "processor")):
        without, watched = ([pair[index] for pair in times[variant]] for variant in ("without", "with"))
        ratios = sorted(b / a for a, b in zip(without, watched, strict=True))
        print(
            f"{clock}: {1000 * statistics.median(without):.2f} ms without, {1000 * statistics.median(watched):.2f} ms "
            f"with QuantMonitor; ratio of the runs: median {statistics.median(ratios):.4f}, "
            f"quartiles {ratios[ROUNDS // 4]:.4f} to {ratios[-1 - ROUNDS // 4]:.4f}; of the fastest runs "
            f"{min(watched) / min(without):.4f}"
        )


if __name__ == "__main__":
    main()
