"""What the hooks of QuantRetrainCallback take of a training step of the digits demo.

python -m tests.benchmarks.callback

The hooks are timed where they are called, by the processor's clock; with ``--profile`` cProfile tells what they call.
"""

from __future__ import annotations

import cProfile
import logging
import pstats
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger

from amct_lightning import QuantRetrainCallback
from tests.benchmarks.monitor import STEPS, WARM_UP, Digits, digits

ROUNDS = 5
HOOKS = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")


class Timed(QuantRetrainCallback):
    """The callback with a clock around its hooks, and at the ends of the steps."""

    profile: cProfile.Profile | None = None

    def measure(self) -> None:
        """Begin: put the clock around the hooks, on this object."""
        self.steps: list[float] = []
        self.hooks: dict[str, list[float]] = {}
        for name in HOOKS:
            setattr(self, name, self._timed(name, getattr(self, name)))

    def _timed(self, name: str, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
            empty = time.process_time()
            nothing(trainer, *args, **kwargs)
            start = time.process_time()
            if name == HOOKS[0]:
                self.steps.append(start)
            if self.profile is not None and trainer.global_step >= WARM_UP:
                self.profile.enable()
            hook(trainer, *args, **kwargs)
            if self.profile is not None:
                self.profile.disable()
            self.hooks.setdefault(name, []).append(time.process_time() - start - (start - empty))

        return timed


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: what calling this takes, with the clock, is not the callback's."""


def run(folder: Path, profile: cProfile.Profile | None) -> tuple[float, dict[str, float]]:
    """Return the milliseconds of a step, and those of each hook in it; means, for the rare costs are to count."""
    callback = Timed()
    callback.profile = profile
    callback.measure()
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_steps=STEPS + WARM_UP + 1,
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[callback],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Digits(), digits(0)[0])
    step = 1000 * (callback.steps[WARM_UP + STEPS] - callback.steps[WARM_UP]) / STEPS
    return step, {
        name: 1000 * statistics.mean(times[WARM_UP : WARM_UP + STEPS]) for name, times in callback.hooks.items()
    }


def main() -> None:
    """Print the share of the hooks, median and quartiles of the rounds."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    profile = cProfile.Profile(time.process_time) if "--profile" in sys.argv else None
    with tempfile.TemporaryDirectory() as name:
        rounds = [run(Path(name), profile) for _ in range(1 if profile else ROUNDS)]
    if profile is not None:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(40)
    shares = sorted(sum(hooks.values()) / step for step, hooks in rounds)
    print(f"step {statistics.median(step for step, _ in rounds):.2f} ms of processor time")
    for hook in HOOKS:
        print(f"  {hook:26} {statistics.median(hooks[hook] for _, hooks in rounds):.3f} ms")
    count = len(shares)
    print(
        f"all hooks: {statistics.median(shares):.2%} of it ({shares[count // 4]:.2%} to {shares[-1 - count // 4]:.2%})"
    )


if __name__ == "__main__":
    main()
