"""What is done once or seldom: conversion, calibrating steps, and the record of a large network.

python -m tests.benchmarks.setup [--layers 1000] [--channels 4096] [--rounds 9]
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amct_lightning import QuantRecord, QuantRetrainCallback, prepare_qat
from amct_lightning.modules import activation_quantizers
from amct_lightning.record import LayerRecord
from tests.benchmarks.networks import Network, networks
from tests.benchmarks.timing import medians


def timed(title: str, action: Callable[[], object]) -> None:
    """Print the seconds of an action, on the clock and on the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    action()
    print(f"| {title} | {time.perf_counter() - clock:.2f} | {time.process_time() - processor:.2f} |", flush=True)


def deep(kind: str, layers: int) -> tuple[nn.Module, Tensor]:
    """Return a network of many small layers, and its input."""
    if kind == "linear":
        parts = [part for _ in range(layers) for part in (nn.Linear(16, 16), nn.ReLU())]
        return nn.Sequential(*parts), torch.randn(2, 16)
    if kind == "linear in threes, shared":
        return Shared(layers), torch.randn(2, 16)
    parts = [p for _ in range(layers) for p in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    return nn.Sequential(*parts), torch.randn(2, 4, 8, 8)


class Shared(nn.Module):
    """Layers in threes that read one tensor and have two names each; one ReLU is called again and again."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.again, self.relu = nn.ModuleList(self.layers), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for first in range(0, len(self.layers), 3):
            x = self.relu(sum(layer(x) for layer in self.layers[first : first + 3]))
        return x


class Timed(QuantRetrainCallback):
    """Prints how long its setup takes."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        timed("the same by QuantRetrainCallback.setup", lambda: super(Timed, self).setup(*args, **kwargs))


class OneStep(pl.LightningModule):
    """A network and a loss."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net, self.example_input_array = net, x

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(net: nn.Module, x: Tensor) -> None:
    """Do one step under a Trainer with the callback."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            callbacks=[Timed()],
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(OneStep(net, x), DataLoader(list(x), len(x)))


def calibration(network: Network, rounds: int) -> str:
    """Return the line of a network: the ratios of a calibrating step."""
    floating = network.model.train()
    quantized = prepare_qat(copy.deepcopy(network.model), None, network.x).train()
    quantizers = list(activation_quantizers(quantized).values())

    def step(model: nn.Module) -> None:
        model(network.x).square().mean().backward()

    def calibrating() -> None:
        for quantizer in quantizers:
            quantizer.recalibrate()
        step(quantized)

    step(quantized)
    steps = {"float": lambda: step(floating), "training": lambda: step(quantized), "calibrating": calibrating}
    found = medians(steps, rounds)
    ratios = (found["calibrating"] / found[name] for name in ("float", "training"))
    return f"| {network.title} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9, help="of the calibrating steps; 0: none")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "amct_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"load {os.getloadavg()[0]:.1f}\n\n| calibrating step of | / float step | / training step |\n|---|---|---|")
    for network in networks().values() if args.rounds else ():
        print(calibration(network, args.rounds), flush=True)
    print(f"\n| {args.layers} layers | s | s of the processor |\n|---|---|---|")
    for kind in ("linear", "convolution, BatchNorm", "linear in threes, shared"):
        model, x = deep(kind, args.layers)
        timed(f"{kind}: forward", lambda model=model, x=x: model(x))  # type: ignore[misc]
        timed(f"{kind}: conversion", lambda model=model, x=x: prepare_qat(model, None, x))  # type: ignore[misc]
        timed(f"{kind}: training of one step", lambda model=model, x=x: train(model, x))  # type: ignore[misc]
    numbers = np.random.default_rng(0).random((args.layers, args.channels), np.float32) / 100 + 1e-5
    zeros = [0] * args.channels
    record = QuantRecord(
        {f"layer{i}": LayerRecord(0.1, -3, scales.tolist(), zeros) for i, scales in enumerate(numbers)}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.txt"
        timed(f"record of {args.channels} channels each: written", lambda: record.save(path))
        timed("the same: read", lambda: QuantRecord.load(path))


if __name__ == "__main__":
    main()
