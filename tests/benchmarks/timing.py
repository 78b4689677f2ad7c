"""Timing several variants of a training step side by side in one process."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """What a step took: of the wall clock, and of the processor in all threads of the process."""

    wall: float
    cpu: float


def timed(step: Callable[[], object]) -> Seconds:
    """Run a step once and return what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[Seconds]]:
    """Return what each step took in each round; the steps take turns, so that noise hits all of them alike.

    Another one begins in every round, so that none always comes after the same one.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(-warm_up, rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            seconds = timed(steps[name])
            if number >= 0:
                times[name].append(seconds)
    return times


def medians(steps: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Return the median seconds of each step, of those that took turns."""
    times = in_turns(steps, rounds)
    return {name: statistics.median(seconds.wall for seconds in values) for name, values in times.items()}


class Turns:
    """Lets several loops that cannot be taken apart, such as those of a Trainer, take turns after each of their steps.

    Each has a thread of its own, with one thread for its arithmetic; only the one whose turn it is runs.
    """

    def __init__(self, count: int) -> None:
        self._turns = [threading.Semaphore(0) for _ in range(count)]
        self._failed: list[BaseException] = []

    def pass_on(self, number: int) -> None:
        """Let the next loop do a step, and wait for one's own turn."""
        self._turns[(number + 1) % len(self._turns)].release()
        self._turns[number].acquire()
        if self._failed:
            raise SystemExit

    def run(self, loops: Sequence[Callable[[], object]]) -> None:
        """Run loops of equally many steps to their ends."""
        threads = [threading.Thread(target=self._run, args=item) for item in enumerate(loops)]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        for thread in threads:
            thread.join()
        if self._failed:
            raise self._failed[0]

    def _run(self, number: int, loop: Callable[[], object]) -> None:
        self._turns[number].acquire()
        torch.set_num_threads(1)  # counts for the thread that says so
        try:
            loop()
        except BaseException as error:
            self._failed.append(error)
        self._turns[(number + 1) % len(self._turns)].release()
