"""One of two commits that take turns: answers with the time of a few steps whenever it is asked.

Questions come as lines of JSON from the standard input, answers go as such lines to the standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import torch

import amct_lightning
from tests.benchmarks.bench.__main__ import quiet
from tests.benchmarks.bench.facts import facts
from tests.benchmarks.bench.measuring import reason
from tests.benchmarks.bench.training import Stages, Training
from tests.benchmarks.bench.variants import OWN, variants
from tests.benchmarks.bench.workloads import TINY, WORKLOADS
from tests.benchmarks.timing import timed


class Trainings:
    """What is trained at the moment: several variants of one network."""

    def __init__(self) -> None:
        self.network = ""
        self.by_variant: dict[str, Training] = {}

    def answer(self, network: str, variant: str, threads: int, steps: int) -> Any:
        """Return what can be counted of a step if none is to be timed, else the seconds of steps after a first one."""
        if network != self.network:
            self.network, self.by_variant = network, {}
        torch.set_num_threads(threads)
        if variant not in self.by_variant:
            self.by_variant[variant] = self._prepare(variant)
        training = self.by_variant[variant]
        if not steps:
            return dataclasses.asdict(facts(training))
        training.step()
        return [timed(training.step) for _ in range(steps)]

    def _prepare(self, variant: str) -> Training:
        """Make the training of a variant; a commit that does not have the executor yet shows what it had instead."""
        torch.manual_seed(0)
        workload, ways = (WORKLOADS | TINY)[self.network], variants()
        model, x = workload.model(), workload.batch()
        return Stages().prepare(ways.get(variant, ways[OWN]), model, x)


def main() -> None:
    """Answer until the questions end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    quiet()
    trainings = Trainings()
    print(json.dumps(amct_lightning.__file__), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = {"ok": trainings.answer(**json.loads(line))}
        except Exception as error:
            answer = {"failed": reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
