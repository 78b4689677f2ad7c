"""Timing several variants of a training step side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


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
