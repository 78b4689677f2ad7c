"""The search that tries few candidates finds what one that tries them all finds, with a fraction of the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from amct_lightning.quantizers.functional import half_range
from amct_lightning.quantizers.ifmr import IfmrResult, ifmr
from tests.sums import SumsRoundedOnce, sum_error

COUNT = 150_000
KINDS: dict[str, Callable[[int], Tensor]] = {
    "normal": torch.randn,
    "after a ReLU": lambda n: torch.randn(n).relu(),
    "after a ReLU6, many at both ends": lambda n: (4 * torch.randn(n)).clamp(0, 6),
    "after a GELU": lambda n: functional.gelu(torch.randn(n)),
    "uniform": torch.rand,
    "negative": lambda n: -(torch.rand(n) ** 2),
    "on a grid of its own": lambda n: torch.randint(-127, 128, (n,)) / 64,
    "outliers": lambda n: torch.randn(n) * torch.where(torch.rand(n) > 0.9999, 100.0, 1.0),
    "two values": lambda n: torch.randint(0, 2, (n,)).float(),
    "one value": lambda n: torch.full((n,), 0.3),
    "heavy tails": lambda n: torch.randn(n) / torch.randn(n),
    "tiny": lambda n: 1e-5 * torch.randn(n),
    "too small for a scale": lambda n: 1e-9 * torch.randn(n),
    "large": lambda n: 1e6 * torch.randn(n),
    "larger than bounds are computed for": lambda n: 1e15 * torch.randn(n),
}


def candidates(values: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """All scales and their losses, by the book."""
    k = values.numel() - int(0.999999 * values.numel())
    upper, lower = values.topk(k).values[-1].clamp(min=0), (-values).topk(k).values[-1].clamp(min=0)
    divisor = half_range(num_bits) - 1 + int(upper < lower)
    high = torch.arange(0.7, 1.3, 0.01) * torch.maximum(upper, lower)
    scales = high / divisor
    scales[scales < torch.finfo(torch.float32).eps] = 1
    errors = (torch.round(values.clamp(-h, h) / s) * s - values for h, s in zip(high, scales, strict=True))
    return scales, torch.stack([error.square().sum() for error in errors]) / values.numel()


@pytest.mark.parametrize("num_bits", [4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_candidate_is_chosen_that_a_search_through_all_of_them_chooses(kind: str, num_bits: int) -> None:
    values = KINDS[kind](COUNT)
    with SumsRoundedOnce():
        result = ifmr(values.split(100_000), num_bits)
        scales, losses = candidates(values, num_bits)
    tried = result.losses.isfinite()
    assert torch.equal(result.scale, scales[result.losses.argmin()])
    torch.testing.assert_close(result.losses[tried], losses[tried], rtol=sum_error(COUNT), atol=0)
    # Near ties may go to the other one, as sums of the pieces are rounded on their own.
    assert losses[result.losses.argmin()] <= losses.min() * (1 + sum_error(COUNT))
    assert bool((losses[~tried] > losses.min()).all())


@pytest.mark.parametrize("count", [3_200_000, 2_000_500])
def test_more_than_a_million_values_leave_out_the_share_that_the_percentile_allows(count: int) -> None:
    values = torch.randn(count)
    values[[7, 1_000_000, count - 1]] = torch.tensor([50.0, 60.0, -70.0])
    kth = count - int(0.999999 * count)
    upper, lower = values.topk(kth).values[-1], (-values).topk(kth).values[-1]
    result = ifmr([values], 8, search=(1.0, 1.005, 0.01))  # the range itself
    assert torch.equal(result.scale, torch.maximum(upper, lower) / (127 + int(upper < lower)))


class Work(TorchDispatchMode):
    """Count the elements that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.elements += out.numel()
        return out


def test_a_search_computes_a_few_numbers_for_each_value_and_not_several_for_each_candidate() -> None:
    values = torch.randn(1_000_000)
    with Work() as work:
        ifmr([values], 8)
    assert work.elements < 40 * values.numel()  # six operators for each of 61 candidates are 366


def outcome(batches: list[Tensor]) -> IfmrResult:
    return ifmr(batches, 8)


@pytest.mark.parametrize("count", [100, 50_000])
def test_values_that_are_not_finite_count_as_zero(count: int) -> None:
    values = torch.randn(count)
    values[::7] = torch.tensor(float("nan"))
    values[1], values[2] = float("inf"), -float("inf")
    for a, b in zip(outcome([values]), outcome([values.nan_to_num(0.0, 0.0, 0.0)]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [100, 50_000])
def test_batches_of_half_precision_are_searched_in_float32(dtype: torch.dtype, count: int) -> None:
    values = torch.randn(count).to(dtype)
    for a, b in zip(outcome([values]), outcome([values.float()]), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
