"""Settings of the whole suite: reproducible arithmetic, and for every test a fresh seed, compiler and terminal."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# What no test says otherwise runs on the reference, in processes that tests start as well.
os.environ.setdefault("AMCT_LIGHTNING_EXECUTION", "composite")
# Kernels are compiled once for all test processes and later runs.
os.environ.setdefault("AMCT_LIGHTNING_CACHE", str(Path(__file__).parents[1] / ".cache" / "kernels"))

pytest_plugins = ["tests.ascend_sim.plugin"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The golden data was recorded with one thread; sums depend on how they are split."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """A million objects of libraries and tests live as long as the process; no collection looks at them once more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """torch counts how often a function was compiled, for all tests of a process together, and gives up after eight."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(params=["composite", "compiled", "integer"])
def every_execution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test under each executor, where it says nothing else; for the tests that tell most in little time."""
    from amct_lightning.modules.fused import forward
    from amct_lightning.quantizers.executors import executor_for

    def forget() -> None:
        executor_for.cache_clear()
        forward._in_integers.cache_clear()

    monkeypatch.setenv("AMCT_LIGHTNING_EXECUTION", request.param)
    forget()
    yield request.param
    forget()


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables fit the terminal; how they are folded must not depend on where the tests run."""
    monkeypatch.setenv("COLUMNS", "120")
