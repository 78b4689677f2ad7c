"""Sums that are rounded once do not depend on the order of their terms, and leave everything else as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sums import UNIT_ROUNDOFF, SumsRoundedOnce, sum_error

TERMS = 4096


@pytest.fixture
def operands() -> tuple[Tensor, Tensor]:
    return torch.randn(64, TERMS), torch.randn(TERMS, 64)


@pytest.fixture
def order() -> Tensor:
    return torch.randperm(TERMS)


def test_the_order_matters_without_and_not_within(operands: tuple[Tensor, Tensor], order: Tensor) -> None:
    left, right = operands
    assert not torch.equal(left @ right, left[:, order] @ right[order])
    with SumsRoundedOnce() as mode:
        assert torch.equal(left @ right, left[:, order] @ right[order])
        assert torch.equal(left.sum(1), left[:, order].sum(1))
    assert mode.terms == left.numel()


def test_gradients_are_summed_in_the_same_way(operands: tuple[Tensor, Tensor], order: Tensor) -> None:
    x, weight = operands[0].T.contiguous(), torch.ones(8, 64, requires_grad=True)

    def gradient(rows: Tensor) -> Tensor:
        return torch.autograd.grad(F.linear(rows, weight).square().sum(), weight)[0]

    assert not torch.equal(gradient(x), gradient(x[order]))
    with SumsRoundedOnce():
        assert torch.equal(gradient(x), gradient(x[order]))


def test_a_batch_norm_updates_its_running_statistics() -> None:
    x, here, there = torch.randn(16, 4, 5, 5), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    there(x)
    with SumsRoundedOnce():
        here(x)
    torch.testing.assert_close(here.running_mean, there.running_mean)
    torch.testing.assert_close(here.running_var, there.running_var)
    assert here.running_var.dtype == torch.float32


def test_a_float32_sum_is_within_the_error_that_is_allowed(operands: tuple[Tensor, Tensor]) -> None:
    left, right = operands
    magnitude = left.abs().double() @ right.abs().double()
    error = ((left @ right).double() - left.double() @ right.double()).abs() / magnitude
    assert UNIT_ROUNDOFF / 100 < float(error.max()) <= sum_error(TERMS)


def test_other_dtypes_and_operators_are_left_alone() -> None:
    x = torch.randn(8, 8)
    with SumsRoundedOnce() as mode:
        assert (x.half() + 1).dtype == torch.float16
        assert torch.equal((x / 0.3).round().clamp(-3, 3), (x / 0.3).round().clamp(-3, 3))
        assert x.to(torch.int64).sum().dtype == torch.int64
    assert mode.terms == 64
