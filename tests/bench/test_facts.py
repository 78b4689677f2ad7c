"""What is counted of a step: operators, waits, bytes."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.bench.facts import COMPILED, allocated, facts, kept_bytes, operators
from tests.benchmarks.bench.training import Stages, Training
from tests.benchmarks.bench.variants import FP32, OWN, variants
from tests.benchmarks.bench.workloads import TINY
from tests.operators import Operators

FLOAT = 4


def training(variant: str) -> Training:
    torch.manual_seed(0)
    return Stages().prepare(variants()[variant], TINY["tiny"].model(), TINY["tiny"].batch())


def test_an_operator_that_others_define_is_not_counted_and_they_are() -> None:
    x, linear = torch.ones(2, 3), nn.Linear(3, 4)
    with torch.no_grad():
        assert operators(lambda: linear(x)) == {"aten::t": 1, "aten::addmm": 1}


def test_what_a_kernel_calls_is_not_counted() -> None:
    x = torch.ones(2, 3)
    assert operators(lambda: x.mean(1)) == {"aten::mean": 1}


@pytest.mark.parametrize("variant", [FP32, OWN])
def test_operators_are_those_that_a_dispatch_mode_sees_but_for_detach(variant: str) -> None:
    step = training(variant)
    step.step()
    step.optimizer.zero_grad(set_to_none=True)
    with Operators() as seen:
        step.backward()
    step.optimizer.zero_grad(set_to_none=True)
    counts = operators(step.backward)
    seen.counts.pop("aten::detach", None)  # of gradients, by autograd's own code
    counts.pop("aten::detach", None)
    assert counts == seen.counts


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_graph_is_one_operator() -> None:
    x = torch.ones(8)
    compiled = torch.compile(lambda value: (value.sin() * 2).relu() + 1)
    compiled(x)
    assert operators(lambda: compiled(x))[COMPILED] == 1


def test_a_read_of_the_host_is_counted() -> None:
    x = torch.ones(3)
    assert operators(lambda: bool(x.sum() > 1)) == {"aten::sum": 1, "aten::gt": 1, "aten::_local_scalar_dense": 1}


def test_kept_bytes_are_of_distinct_storages_and_the_model_apart() -> None:
    x, weight = torch.ones(5, requires_grad=True), nn.Parameter(torch.ones(5))

    def forward() -> Tensor:
        y = x.exp()  # keeps its result
        return (y * weight + y * 2).sum()  # keeps y once more, and the weight

    assert kept_bytes(forward, [weight]) == (5 * FLOAT, 10 * FLOAT)


def test_kept_bytes_are_those_that_backward_will_read() -> None:
    x = torch.ones(1000, requires_grad=True)

    def forward() -> Tensor:
        dropped = [x.exp().sum() for _ in range(3)]
        del dropped
        return x.exp().sum() + x.tanh().sum()

    assert kept_bytes(forward, []) == (2000 * FLOAT, 2000 * FLOAT)


def test_allocated_is_what_lives_at_the_end_and_the_peak() -> None:
    def step() -> Tensor:
        first = torch.empty(4096)
        del first
        second, third = torch.empty(1024), torch.empty(2048)
        assert len(second)
        return third

    assert allocated(step) == (2048 * FLOAT, 4096 * FLOAT)


def test_facts_of_a_float_step() -> None:
    counted = facts(training(FP32))
    batch, inputs, width, classes = 4, 16, 8, 10
    # Linear keeps its input, ReLU its result, which the next layer reads; the loss keeps its result, the classes it was
    # given (int64), and how many count.
    kept = FLOAT * batch * (inputs + width + classes) + 8 * batch + FLOAT
    assert counted.kept_bytes == kept
    assert counted.kept_bytes_with_model - kept in (0, FLOAT * width * classes)  # the weight that the gradient needs
    assert counted.host_syncs == 0
    assert counted.peak_bytes > counted.alive_bytes > 0


def test_counting_leaves_no_gradients_and_the_same_facts_again() -> None:
    step = training(OWN)
    first = facts(step)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert facts(step) == first
