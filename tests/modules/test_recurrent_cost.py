"""What a training step of LSTM and GRU takes against a float loop: memory for backward, operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.recurrent import FloatLoop
from tests.modules.cases import WIDTHS, Width
from tests.modules.recurrent_net import BATCH, HIDDEN, INPUTS, KINDS, STEPS, trained
from tests.operators import Operators, saved_bytes

FACTORS = 2 * 4 * 4 + 2 * 4 * HIDDEN * 4
"""Bytes of scale, offset and clips of two activations, and of the scales of two weights."""


@KINDS
@pytest.mark.parametrize("width", [WIDTHS[0], Width(algo="ulq_retrain")], ids=str)
def test_autograd_keeps_no_more_bytes_than_of_a_float_loop(kind: type[nn.RNNBase], width: Width) -> None:
    x = torch.randn(STEPS, BATCH, INPUTS)
    model, float_loop, x = trained(kind, x, width), FloatLoop(kind, INPUTS, HIDDEN), x.requires_grad_()
    kept, of_float = saved_bytes(lambda: model(x)), saved_bytes(lambda: float_loop(x))
    assert kept <= of_float + FACTORS
    if kind is nn.LSTM:  # a float loop over a GRU keeps a product of which it needs a third, and a difference
        assert kept > of_float


@KINDS
def test_longer_sequences_add_what_they_add_to_a_float_loop(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(2 * STEPS, BATCH, INPUTS)
    model, float_loop = trained(kind, x), FloatLoop(kind, INPUTS, HIDDEN)

    def added(run: Callable[[Tensor], object]) -> int:
        short, long = (t.clone().requires_grad_() for t in (x[:STEPS], x))
        return saved_bytes(lambda: run(long)) - saved_bytes(lambda: run(short))

    assert added(model) == added(float_loop) - (0 if kind is nn.LSTM else 3 * STEPS * BATCH * HIDDEN * 4)


@KINDS
def test_an_evaluation_keeps_nothing(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x).eval()
    with torch.no_grad():
        assert saved_bytes(lambda: model(x)) == 0
    model.requires_grad_(False)
    assert saved_bytes(lambda: model(x)) == 0


class Peak(TorchDispatchMode):
    """The most bytes that what operators have made takes at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self._made = 0, list[ref[Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._made += [ref(t) for t in (result if isinstance(result, (list, tuple)) else [result]) if t is not None]
        alive = [t.untyped_storage() for made in self._made if (t := made()) is not None]
        storages = {storage.data_ptr(): storage.nbytes() for storage in alive}
        self.bytes = max(self.bytes, sum(storages.values()))
        return result


@KINDS
def test_a_longer_evaluation_takes_the_memory_of_its_gates_and_outputs_only(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(2 * STEPS, BATCH, INPUTS)
    model = trained(kind, x).eval()
    peaks = []
    for steps in (STEPS, 2 * STEPS):
        with torch.no_grad(), Peak() as peak:
            model(x[:steps])
        peaks.append(peak.bytes)
    gates = 4 if kind is nn.LSTM else 3
    assert peaks[1] - peaks[0] <= STEPS * BATCH * ((gates + 2) * HIDDEN + INPUTS) * 4  # each output twice, in the end


@KINDS
def test_a_step_takes_fewer_operators_than_one_of_a_float_loop(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(2 * STEPS, BATCH, INPUTS)

    def per_step(model: Callable[[Tensor], Any]) -> float:
        counts = []
        for steps in (STEPS, 2 * STEPS):
            with Operators() as operators:
                y = model(x[:steps])
                (y if isinstance(y, Tensor) else y[0]).sum().backward()
            counts.append(sum(operators.counts.values()))
            assert not operators.host_reads
        return (counts[1] - counts[0]) / STEPS

    assert per_step(trained(kind, x)) < per_step(FloatLoop(kind, INPUTS, HIDDEN))
