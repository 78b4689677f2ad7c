"""Search-N: the shifts, straight from their definition, and what is kept between batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amct_lightning.quantizers import ShiftSearch
from amct_lightning.quantizers.shift_search import best_shifts, shift_errors


def reference(y: np.ndarray, scale: np.ndarray) -> list[int]:
    """Channels on axis 1; 64-bit integers, one channel and one shift after the other."""
    columns = [y[:, c] for c in range(y.shape[1])] if scale.size > 1 else [y]
    shifts = []
    for column, s in zip(columns, scale, strict=True):
        sums = np.clip(np.round(column.astype(np.float32) / np.float32(s)), -(2**31), 2**31 - 1).astype(np.int64)
        errors = []
        for n in range(1, 17):
            kept = np.clip(sums >> n, -(2**15), 2**15 - 1) << n
            errors.append(float(((sums - kept).astype(np.float64) ** 2).sum()))
        shifts.append(max(n for n, error in enumerate(errors, start=1) if error == min(errors)))
    return shifts


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    magnitude=st.sampled_from([1.0, 100.0, 3e4, 1e6, 1e8, 5e9]),
    channels=st.integers(2, 4),
    per_channel=st.booleans(),
)
def test_the_shifts_follow_the_definition(seed: int, magnitude: float, channels: int, per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(6, channels, 3, generator=generator) * magnitude
    scale = torch.rand(channels if per_channel else 1, generator=generator) + 0.5
    assert best_shifts(shift_errors(y, scale)).tolist() == reference(y.numpy(), scale.numpy())


def test_among_equal_errors_the_largest_shift_counts() -> None:
    assert best_shifts(shift_errors(torch.zeros(2, 3), torch.ones(3))).tolist() == [16, 16, 16]
    assert best_shifts(shift_errors(torch.full((2, 1), 4.0), torch.ones(1))).tolist() == [2]


def test_sums_beyond_int16_need_a_shift_that_keeps_them() -> None:
    assert best_shifts(shift_errors(torch.tensor([[2.0**20]]), torch.ones(1))).tolist() == [16]
    assert best_shifts(shift_errors(torch.tensor([[2.0**17 + 12, 15.0]]), torch.ones(1))).tolist() == [3]


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(4, 2, 3) * 1000 * 8**n for n in range(3)]


def test_the_errors_of_batches_add_up(batches: list[Tensor]) -> None:
    search, scale = ShiftSearch(2), torch.tensor([0.3, 0.7])
    for batch in batches:
        search.update(batch, scale)
    torch.testing.assert_close(search.errors, shift_errors(torch.cat(batches), scale))
    assert search.batches == 3


def test_an_evaluation_after_training_starts_anew(batches: list[Tensor]) -> None:
    search, fresh, scale = ShiftSearch(2), ShiftSearch(2), torch.ones(2)
    search.update(batches[2], scale)
    search.stale = True
    search.update(batches[0], scale)
    fresh.update(batches[0], scale)
    assert torch.equal(search.errors, fresh.errors)


def test_without_a_batch_there_are_no_shifts() -> None:
    assert ShiftSearch(2).shift_bit() == []


def test_an_empty_batch_changes_no_error(batches: list[Tensor]) -> None:
    search, scale = ShiftSearch(2), torch.ones(2)
    search.update(batches[0], scale)
    before = search.errors.clone()
    search.update(batches[0][:0], scale)
    assert torch.equal(search.errors, before)


def test_the_state_goes_through_a_state_dict(batches: list[Tensor]) -> None:
    search, twin = ShiftSearch(2), ShiftSearch(2)
    search.update(batches[1], torch.ones(2))
    twin.load_state_dict(search.state_dict())
    assert twin.shift_bit() == search.shift_bit() != []
