"""The activation quantizer as a module: calibration, precision, state, and what it costs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import prepare_qat
from amct_lightning.quantizers import ActivationQuantizer
from amct_lightning.quantizers.ifmr import ifmr

FACTORS = ("clip_max", "clip_min", "clip_max_previous", "clip_min_previous", "scale", "offset")


def factors(quantizer: ActivationQuantizer) -> dict[str, Tensor]:
    return {name: getattr(quantizer, name).detach().clone() for name in FACTORS}


def same(here: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    return all(torch.equal(here[name], there[name]) for name in FACTORS)


def test_one_training_batch_calibrates(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8)
    quantizer(batches[0])
    expected = ifmr(batches[:1], 8)
    assert not quantizer.calibrating
    assert torch.equal(quantizer.clip_max, expected.clip_max)
    assert torch.equal(quantizer.clip_min, expected.clip_min)


def test_three_training_batches_calibrate_together(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8, batch_num=3)
    for batch in batches:
        assert quantizer.calibrating
        quantizer(batch)
    expected = ifmr(batches, 8)
    assert not quantizer.calibrating
    assert torch.equal(quantizer.clip_max, expected.clip_max)
    assert torch.equal(quantizer.clip_min, expected.clip_min)


def test_until_the_last_batch_the_range_of_the_current_one_is_used(batches: list[Tensor]) -> None:
    x = batches[0]
    given = ActivationQuantizer(num_bits=8, clip=(float(x.max()), float(x.min())))
    assert torch.equal(ActivationQuantizer(num_bits=8, batch_num=3)(x), given(x))


def test_until_then_the_clips_hold_that_range(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8, batch_num=3)
    for x in batches[:2]:
        quantizer(x)
        held = (quantizer.clip_max, quantizer.clip_min, quantizer.clip_max_previous, quantizer.clip_min_previous)
        assert [value.item() for value in held] == [x.max().item(), x.min().item()] * 2
        assert not quantizer.has_range


def test_a_sharing_layer_and_an_evaluation_leave_the_clips_alone(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8, batch_num=3)
    quantizer(batches[0])
    before = factors(quantizer)
    quantizer(batches[1], observe=False)
    quantizer.eval()(batches[1])
    assert same(factors(quantizer), before)


def test_a_second_calibration_leaves_the_clips_of_the_first_until_it_ends(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8, batch_num=2)
    for x in batches[:2]:
        quantizer(x)
    before = factors(quantizer)
    quantizer.recalibrate()
    quantizer(batches[2] * 3)
    assert same(factors(quantizer), before)


def test_clips_weight_decay_and_momentum_go_as_in_amct() -> None:
    """The optimizer's buffer takes up the gradients of a calibration of several batches."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(8, 4) * 5 for _ in range(3)]
    model = prepare_qat(model, {"batch_num": 2}, batches[0]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    clips = []
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        clips.append(f"{model[0].input_quantizer.clip_max.item():.4f}")
    assert clips == ["17.0440", "17.7181", "17.6944"]


def test_a_batch_that_is_changed_in_place_later_calibrates_with_its_first_content(
    batches: list[Tensor],
) -> None:
    quantizer = ActivationQuantizer(num_bits=8, batch_num=2)
    first = batches[0].clone()
    quantizer(first)
    first.zero_()
    quantizer(batches[1])
    assert torch.equal(quantizer.clip_max, ifmr(batches[:2], 8).clip_max)


def test_evaluation_does_not_calibrate(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8).eval()
    before = factors(quantizer)
    quantizer(batches[0])
    assert quantizer.calibrating
    assert same(factors(quantizer), before)


def test_evaluation_changes_no_factor(calibrated: ActivationQuantizer, batches: list[Tensor]) -> None:
    before = factors(calibrated)
    calibrated.eval()(batches[1])
    assert same(factors(calibrated), before)


def test_an_empty_batch_does_not_count(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8)
    assert quantizer(torch.empty(0, 6)).shape == (0, 6)
    assert quantizer.calibrating
    quantizer(batches[0])
    assert not quantizer.calibrating


def test_given_clips_need_no_calibration(calibrated: ActivationQuantizer) -> None:
    assert not calibrated.calibrating


def test_after_calibration_no_batch_is_kept(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8, batch_num=2)
    for batch in batches[:2]:
        quantizer(batch)
    assert quantizer.observed == []


def test_a_sharing_layer_that_does_not_observe_counts_no_batch(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=8)
    quantizer(batches[0], observe=False)
    assert quantizer.calibrating


def test_fixed_min_sets_the_lower_clip_back_to_zero_in_every_training_forward(
    batches: list[Tensor],
) -> None:
    quantizer = ActivationQuantizer(num_bits=8, fixed_min=True)
    quantizer(batches[0].relu())
    with torch.no_grad():
        quantizer.clip_min.fill_(-0.5)
    quantizer(batches[0].relu())
    assert quantizer.clip_min == 0
    assert quantizer.offset == -128


def test_fixed_min_leaves_the_lower_clip_its_gradient(batches: list[Tensor]) -> None:
    quantizer = ActivationQuantizer(num_bits=4, fixed_min=True, clip=(1.0, -1.0))
    quantizer(batches[0]).sum().backward()
    assert quantizer.clip_min.grad is not None
    assert quantizer.clip_min.grad != 0


def test_clips_that_learning_made_unusable_are_repaired_from_the_step_before(
    calibrated: ActivationQuantizer, batches: list[Tensor]
) -> None:
    calibrated(batches[0])
    with torch.no_grad():
        calibrated.clip_max.fill_(-3.0)
    calibrated(batches[0])
    assert calibrated.clip_max == 2.0
    assert calibrated.clip_min == -1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_stay_float32_when_the_module_changes_its_dtype(
    calibrated: ActivationQuantizer, dtype: torch.dtype, batches: list[Tensor]
) -> None:
    before = factors(calibrated)
    calibrated.to(dtype)
    y = calibrated(batches[0].to(dtype))
    assert y.dtype == dtype
    assert same(factors(calibrated), before)
    assert all(value.dtype == torch.float32 for value in factors(calibrated).values())


def test_half_keeps_the_factors_float32(calibrated: ActivationQuantizer) -> None:
    assert {value.dtype for value in factors(calibrated.half()).values()} == {torch.float32}


def test_autocast_does_not_change_the_factors(batches: list[Tensor]) -> None:
    plain, autocast = ActivationQuantizer(num_bits=8), ActivationQuantizer(num_bits=8)
    plain(batches[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast(batches[0])
    assert same(factors(autocast), factors(plain))


def test_bfloat16_activations_are_quantized_with_float32_arithmetic(calibrated: ActivationQuantizer) -> None:
    x = torch.linspace(-1, 2, 50).to(torch.bfloat16)
    assert torch.equal(calibrated(x), calibrated(x.float()).to(torch.bfloat16))


def test_the_state_dict_keeps_a_finished_calibration(batches: list[Tensor]) -> None:
    learned, fresh = ActivationQuantizer(num_bits=8), ActivationQuantizer(num_bits=8)
    learned(batches[0])
    with torch.no_grad():
        learned.clip_max.mul_(1.5)
    fresh.load_state_dict(learned.state_dict())
    fresh(batches[1])
    assert not fresh.calibrating
    assert torch.equal(fresh.clip_max, learned.clip_max)


def test_a_float_state_dict_loads_strictly_and_leaves_the_factors(calibrated: ActivationQuantizer) -> None:
    before = factors(calibrated)
    model = nn.Sequential(nn.Linear(2, 2), calibrated)
    model.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict(), strict=True)
    assert same(factors(calibrated), before)


@pytest.mark.parametrize(
    "missing", ["clip_max", "clip_min", "clip_max_previous", "clip_min_previous", "calibrated_batches"]
)
def test_a_state_dict_with_part_of_the_state_is_an_error(calibrated: ActivationQuantizer, missing: str) -> None:
    state = calibrated.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=missing):
        calibrated.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_a_copy_taken_during_calibration_goes_on_like_the_original(copied, batches: list[Tensor]) -> None:
    original = ActivationQuantizer(num_bits=8, batch_num=2)
    original(batches[0])
    twin = copied(original)
    original(batches[1])
    twin(batches[1])
    assert same(factors(twin), factors(original))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_activation_raises_a_flag_that_stays(
    calibrated: ActivationQuantizer, value: float, batches: list[Tensor]
) -> None:
    calibrated(batches[0])
    assert not calibrated.nonfinite
    bad = batches[0].clone()
    bad[0, 0] = value
    calibrated(bad)
    assert calibrated.nonfinite
    calibrated(batches[0])
    assert calibrated.nonfinite


def test_a_nonfinite_activation_in_evaluation_raises_no_flag(calibrated: ActivationQuantizer) -> None:
    calibrated.eval()(torch.tensor([float("nan")]))
    assert not calibrated.nonfinite
