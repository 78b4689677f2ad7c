"""Timing several variants of a training step side by side in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def medians(steps: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Return the median seconds of each step; the steps take turns, so that noise hits all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2):
        for step in steps.values():
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[rounds // 2] for name, values in times.items()}


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
