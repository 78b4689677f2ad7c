"""What holds for all inputs: the grid, the rounding error, the best of the calibration candidates."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amct_lightning.quantizers.functional import activation_scale_offset, half_range, repair_clips
from amct_lightning.quantizers.functions.activation import fake_quantize_activation
from amct_lightning.quantizers.functions.weight import (
    ChannelLayout,
    arq_scale,
    fake_quantize_weight,
)
from amct_lightning.quantizers.ifmr import ifmr

activation_bits = st.sampled_from([4, 8, 16])
weight_bits = st.sampled_from([4, 8])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
clips = st.tuples(st.floats(2**-10, 1024, width=32).map(torch.tensor), st.floats(-1024, 0, width=32).map(torch.tensor))
finite = st.floats(-1e4, 1e4, width=32)
vectors = st.lists(finite, min_size=1, max_size=30).map(torch.tensor)
moderate = st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=30).map(torch.tensor)
layouts = st.sampled_from([ChannelLayout(), ChannelLayout(True, 1), ChannelLayout(True, 2)])
settings.register_profile("suite", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("suite")


def quantize(x: Tensor, clip: tuple[Tensor, Tensor], bits: int) -> Tensor:
    return fake_quantize_activation(x, *clip, *clip, bits)


@given(vectors, clips, activation_bits)
def test_activations_lie_on_the_grid_of_the_hardware(x: Tensor, clip: tuple[Tensor, Tensor], bits: int) -> None:
    scale, offset = activation_scale_offset(*clip, bits)
    codes = quantize(x, clip, bits).double() / scale.double() + offset.double()
    h = half_range(bits)
    assert (codes - codes.round()).abs().max() < 2e-2  # float32 of codes up to 2^16
    assert codes.round().min() >= -h
    assert codes.round().max() <= h - 1


@given(vectors, clips, activation_bits)
def test_quantizing_activations_twice_changes_nothing(x: Tensor, clip: tuple[Tensor, Tensor], bits: int) -> None:
    once = quantize(x, clip, bits)
    assert torch.equal(quantize(once, clip, bits), once)


@given(vectors, clips, st.sampled_from([4, 8]))
def test_inside_the_range_the_error_is_at_most_half_a_step(x: Tensor, clip: tuple[Tensor, Tensor], bits: int) -> None:
    scale, offset = activation_scale_offset(*clip, bits)
    h = half_range(bits)
    inside = ((-h - offset) * scale <= x) & (x <= (h - 1 - offset) * scale)
    error = (quantize(x, clip, bits).double() - x.double()).abs()[inside]
    assert (error <= 0.5 * scale.double() * (1 + 2 * bits * 2.0**-12)).all()


@given(moderate, clips, activation_bits, dtypes)
def test_activations_keep_shape_and_dtype(
    x: Tensor, clip: tuple[Tensor, Tensor], bits: int, dtype: torch.dtype
) -> None:
    y = quantize(x.to(dtype).view(1, -1), clip, bits)
    assert y.dtype == dtype
    assert y.shape == (1, x.numel())


@given(vectors, clips, activation_bits)
def test_zero_is_represented_exactly(x: Tensor, clip: tuple[Tensor, Tensor], bits: int) -> None:
    assert quantize(torch.zeros_like(x), clip, bits).abs().max() == 0


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    clips,
    st.booleans(),
)
def test_repaired_clips_always_enclose_zero(
    high: float, low: float, previous: tuple[Tensor, Tensor], fixed_min: bool
) -> None:
    upper, lower = repair_clips(torch.tensor(high), torch.tensor(low), *previous, fixed_min=fixed_min)
    assert lower <= 0 <= upper


def weights(layout: ChannelLayout, seed: int) -> Tensor:
    shape = (4, 3, 2, 2)
    assert shape[0] % layout.groups == 0
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(layouts, st.integers(0, 1000), weight_bits, st.booleans())
def test_weights_lie_on_the_symmetric_grid_within_half_a_step(
    layout: ChannelLayout, seed: int, bits: int, channel_wise: bool
) -> None:
    weight, h = weights(layout, seed), half_range(bits)
    scale = arq_scale(weight, layout, bits, channel_wise)
    y = layout.view(fake_quantize_weight(weight, scale, layout, bits))
    codes = y / scale
    assert (codes - codes.round()).abs().max() < 1e-4
    assert -h <= codes.round().min()
    assert codes.round().max() <= h - 1
    # With a scale from the larger negative end, a positive end beyond (h-1) * scale is clamped.
    inside = layout.view(weight) <= (h - 1) * scale
    assert ((y - layout.view(weight)).abs() <= 0.5 * scale * (1 + 1e-4))[inside].all()


@given(layouts, st.integers(0, 1000), weight_bits, st.booleans())
def test_quantizing_weights_twice_with_one_scale_changes_nothing(
    layout: ChannelLayout, seed: int, bits: int, channel_wise: bool
) -> None:
    weight = weights(layout, seed)
    scale = arq_scale(weight, layout, bits, channel_wise)
    once = fake_quantize_weight(weight, scale, layout, bits)
    assert torch.equal(fake_quantize_weight(once, scale, layout, bits), once)


@given(vectors, activation_bits)
def test_calibration_is_never_worse_than_the_plain_largest_magnitude(x: Tensor, bits: int) -> None:
    result = ifmr([x], bits)
    whole_range = (torch.arange(0.7, 1.3, 0.01) - 1).abs().argmin()
    assert result.losses.min() <= result.losses[whole_range]


@given(st.lists(vectors, min_size=1, max_size=4), st.sampled_from([4, 8]))
def test_calibrating_on_batches_equals_calibrating_on_their_concatenation(batches: list[Tensor], bits: int) -> None:
    apart, together = ifmr(batches, bits), ifmr([torch.cat(batches)], bits)
    torch.testing.assert_close(apart.losses, together.losses, rtol=1e-5, atol=0)
    chosen = apart.losses.argmin()
    assert together.losses[chosen] <= together.losses.min() * (1 + 1e-5)


@given(vectors, activation_bits)
def test_a_symmetric_calibration_has_offset_zero_and_the_clips_of_the_integer_range(x: Tensor, bits: int) -> None:
    result, h = ifmr([x], bits), half_range(bits)
    assert result.offset == 0
    assert result.clip_max == (h - 1) * result.scale
    assert result.clip_min == -h * result.scale
