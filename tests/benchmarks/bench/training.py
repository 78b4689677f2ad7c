"""A network that is trained in one of the ways: a step of it, and what it takes to get there."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.bench.variants import Variant
from tests.benchmarks.timing import Seconds, timed


class Training:
    """A network, its optimizer and its batch.

    Args:
        model: The network.
        x: The batch; the classes it is to be given are the same in every step.
        compiled: Whether the network goes through ``torch.compile``.
    """

    def __init__(self, model: nn.Module, x: Tensor, compiled: bool = False) -> None:
        self.model, self.x = model.train(), x
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.y = torch.arange(len(x)) % 2
        self._run = torch.compile(model, fullgraph=True) if compiled else model

    def loss(self) -> Tensor:
        return functional.cross_entropy(self._run(self.x), self.y)

    def backward(self) -> None:
        """Do a step but for the optimizer's part."""
        self.loss().backward()

    def step(self) -> None:
        """Do a whole step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()
        self.optimizer.step()


class Stages:
    """Times what comes before and after training; each of them once per preparation."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[Seconds]] = defaultdict(list)

    def prepare(self, variant: Variant, model: nn.Module, x: Tensor) -> Training:
        """Make a training of a float network; what others print meanwhile is kept to themselves."""
        made: list[nn.Module] = []
        with contextlib.redirect_stdout(io.StringIO()):
            self.seconds["conversion"].append(timed(lambda: made.append(variant.convert(model, x))))
            quantized = made[0].train()
            if variant.calibrate is not None:
                calibrate = variant.calibrate
                self.seconds["calibration"].append(timed(lambda: calibrate(quantized, x)))
            if variant.record is not None:
                record = variant.record
                self.seconds["record"].append(timed(lambda: record(quantized)))
        training = Training(quantized, x, variant.compiled)
        if variant.compiled:
            self.seconds["compilation"].append(timed(training.step))
        return training
