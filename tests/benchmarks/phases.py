"""Training and evaluation steps under a Trainer, quantized against float, for each network and phase of a schedule.

python -m tests.benchmarks.phases [--compile] [--rounds 12] [resnet mobilenet mlp vit lstm]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from amct_lightning import QuantRetrainCallback, QuantSchedule
from tests.benchmarks.networks import CLASSES, Network, networks
from tests.benchmarks.timing import Turns
from tests.operators import Operators

BATCHES, EVALUATED, WARM_UP = 3, 2, 2
PHASES = ("calibrating", "training", "bn frozen", "all frozen", "evaluation")


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The same batch again and again."""

    def __init__(self, x: Tensor, length: int) -> None:
        self.batch, self.length = (x, torch.arange(len(x)) % CLASSES), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batch


class Classifier(pl.LightningModule):
    """A network, cross entropy and AdamW."""

    def __init__(self, network: Network, compiled: bool) -> None:
        super().__init__()
        self.net, self.example_input_array = copy.deepcopy(network.model), network.x
        self.compiled = compiled

    def on_fit_start(self) -> None:
        if self.compiled:
            self.net.compile()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Clock:
    """Seconds and operators of the steps of one variant, by phase; between two steps the other variants have theirs.

    Args:
        turns: Whose turn it is.
        number: The variant's place among those that take turns.
        rounds: Epochs of every phase that are timed, after those that warm up.
        counts: Whether operators are counted meanwhile; what is compiled has none to count.
    """

    def __init__(self, turns: Turns, number: int, rounds: int, counts: bool) -> None:
        self.turns, self.number, self.epochs, self.counts = turns, number, rounds + WARM_UP, counts
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.operators: dict[str, int] = {}
        self._count = Operators()

    def start(self, epoch: int) -> None:
        self.warming_up = epoch % self.epochs < WARM_UP
        if self.warming_up and self.counts:
            self._count.__enter__()
        self._begun = time.perf_counter()

    def stop(self, phase: str) -> None:
        seconds = time.perf_counter() - self._begun
        if not self.warming_up:
            self.seconds[phase].append(seconds)
        elif self.counts:
            self._count.__exit__(None, None, None)
            self.operators[phase] = sum(self._count.counts.values())
            self._count.counts.clear()
        self.turns.pass_on(self.number)

    def phase(self, epoch: int, batch: int) -> str:
        kind = epoch // self.epochs
        return "calibrating" if kind == 0 and batch == 0 else PHASES[1 + kind]


class Before(pl.Callback):
    """The first of all callbacks: a step begins."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.clock.start(trainer.current_epoch)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.clock.start(trainer.current_epoch)


class After(pl.Callback):
    """The last of all callbacks: a step ends."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.clock.stop(self.clock.phase(trainer.current_epoch, args[-1]))

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.clock.stop("evaluation")


def train(network: Network, clock: Clock, quantized: bool, compiled: bool, folder: str) -> None:
    """Go through all phases, one step whenever it is this variant's turn."""
    epochs = clock.epochs
    # Compiled code would be made anew for every calibration, until torch gives up.
    schedule = QuantSchedule(
        calibrate=0 if compiled else list(range(epochs)),
        freeze_bn=epochs,
        freeze_data=2 * epochs,
        freeze_weights=2 * epochs,
    )
    trainer = pl.Trainer(
        max_epochs=3 * epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[Before(clock), *([QuantRetrainCallback(schedule=schedule)] if quantized else []), After(clock)],
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loaders = (DataLoader(Batches(network.x, count), batch_size=None) for count in (BATCHES, EVALUATED))
    trainer.fit(Classifier(network, compiled), *loaders)


def measure(network: Network, variants: dict[str, tuple[bool, bool]], rounds: int) -> dict[str, Clock]:
    """Train all variants at once, one step of one of them at a time."""
    turns = Turns(len(variants))
    clocks = {
        name: Clock(turns, number, rounds, counts=not compiled)
        for number, (name, (_, compiled)) in enumerate(variants.items())
    }
    with tempfile.TemporaryDirectory() as folder:
        turns.run(
            [partial(train, network, clocks[name], *variant, folder=folder) for name, variant in variants.items()]
        )
    return clocks


def cells(network: Network, variant: str, clock: Clock, base: Clock) -> Iterator[str]:
    """Yield what stands in a line of the table: for each phase the median ratio of neighbours and the quartiles."""
    yield network.title
    yield variant
    has_norm = any(isinstance(module, nn.BatchNorm2d) for module in network.model.modules())
    for phase in PHASES:
        if (phase == "bn frozen" and not has_norm) or (phase == "calibrating" and not clock.counts):
            yield "-"
            continue
        ratios = [a / b for a, b in zip(clock.seconds[phase], base.seconds[phase], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        yield f"{middle:.2f} ({low:.2f} to {high:.2f})"
    yield str(clock.operators.get("training", "-"))
    yield f"{1000 * statistics.median(clock.seconds['training']):.0f} ms"


def main() -> None:
    """Print one line per network and variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="some of them; all by default")
    parser.add_argument("--compile", action="store_true", help="each once more, compiled")
    parser.add_argument("--rounds", type=int, default=12, help="timed epochs per phase")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "amct_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    known = networks()
    variants = {"float": (False, False), "quantized": (True, False)}
    if args.compile:
        variants |= {"float, compiled": (False, True), "quantized, compiled": (True, True)}
        torch._dynamo.config.allow_rnn = True  # PyTorch refuses to compile recurrent layers otherwise
    for line in (["network", "variant", *PHASES, "operators", "training"], ["---"] * (len(PHASES) + 4)):
        print("| " + " | ".join(line) + " |", flush=True)
    for name in args.networks or known:
        clocks = measure(known[name], variants, args.rounds)
        for variant, clock in clocks.items():
            print("| " + " | ".join(cells(known[name], variant, clock, clocks["float"])) + " |", flush=True)


if __name__ == "__main__":
    main()
