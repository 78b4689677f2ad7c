"""Settings of the whole suite: reproducible arithmetic and a fresh seed for every test."""

from __future__ import annotations

import pytest
import torch

pytest_plugins = ["tests.ascend_sim.plugin"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The golden data was recorded with one thread; sums depend on how they are split."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
