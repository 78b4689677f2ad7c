"""The weight quantizer as a module."""

from __future__ import annotations

import pytest
import torch

from amct_lightning.quantizers import ChannelLayout, WeightQuantizer


def make(weight: torch.Tensor, channel_wise: bool = True) -> WeightQuantizer:
    return WeightQuantizer(8, channel_wise, ChannelLayout(), weight)


def test_scales_follow_the_weight_in_every_forward() -> None:
    weight = torch.randn(3, 4)
    quantizer = make(weight)
    before = quantizer.scale.clone()
    quantizer(weight * 2)
    assert torch.equal(quantizer.scale, before * 2)


def test_computing_the_scale_does_not_store_it() -> None:
    weight = torch.randn(3, 4)
    quantizer = make(weight)
    before = quantizer.scale.clone()
    assert torch.equal(quantizer.compute_scale(weight * 2), before * 2)
    assert torch.equal(quantizer.scale, before)


@pytest.mark.parametrize(("channel_wise", "count"), [(True, 3), (False, 1)])
def test_number_of_scales(channel_wise: bool, count: int) -> None:
    quantizer = make(torch.randn(3, 4), channel_wise)
    assert quantizer.scale.shape == quantizer.offset.shape == (count,)


def test_a_channel_of_zeros_has_scale_one_and_stays_zero() -> None:
    weight = torch.randn(3, 4)
    weight[1] = 0
    quantizer = make(weight)
    assert quantizer(weight)[1].abs().max() == 0
    assert quantizer.scale[1] == 1


def test_the_gradient_passes_straight_through() -> None:
    weight, grad = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    make(weight.detach())(weight).backward(grad)
    assert torch.equal(weight.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_get_float32_scales(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4).to(dtype)
    quantizer = make(weight).to(dtype)
    assert quantizer(weight).dtype == dtype
    assert quantizer.scale.dtype == torch.float32
    assert torch.equal(quantizer.scale, make(weight.float()).scale)


def test_the_state_dict_round_trip() -> None:
    first, second = make(torch.randn(3, 4)), make(torch.randn(3, 4))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.scale, first.scale)


def test_a_state_dict_with_part_of_the_state_is_an_error() -> None:
    quantizer = make(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="offset"):
        quantizer.load_state_dict({"scale": quantizer.scale})
