"""What is done once or seldom: conversion, calibrating steps, and the record of a large network.

python -m tests.benchmarks.setup [--layers 1000] [--channels 4096] [--rounds 9]
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from amct_lightning import QuantRecord, prepare_qat
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
    parts = [p for _ in range(layers) for p in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    return nn.Sequential(*parts), torch.randn(2, 4, 8, 8)


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
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"load {os.getloadavg()[0]:.1f}\n\n| calibrating step of | / float step | / training step |\n|---|---|---|")
    for network in networks().values():
        print(calibration(network, args.rounds), flush=True)
    print(f"\n| {args.layers} layers | s | s of the processor |\n|---|---|---|")
    for kind in ("linear", "convolution, BatchNorm"):
        model, x = deep(kind, args.layers)
        timed(f"{kind}: forward", lambda model=model, x=x: model(x))  # type: ignore[misc]
        timed(f"{kind}: conversion", lambda model=model, x=x: prepare_qat(model, None, x))  # type: ignore[misc]
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
