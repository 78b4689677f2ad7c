"""Every operator vector of AMCT: forward, factors and gradients, to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.quantizers.functional import activation_scale_offset, guard_scale, repair_clips
from amct_lightning.quantizers.functions.activation import fake_quantize_activation
from amct_lightning.quantizers.functions.weight import (
    ChannelLayout,
    arq_scale,
    fake_quantize_weight,
    fake_quantize_weight_learned,
    scale_gradient_factor,
)
from amct_lightning.quantizers.ifmr import IfmrResult, ifmr
from tests.golden_data import OperatorCase, operator_cases
from tests.golden_exceptions import ULQ_ACT_CASES as RANGE_REPAIRED

CLIP_GRADIENT_TOLERANCE = 1e-5
"""Of the L2 norm of the terms that the gradient sums; the order of summation is not specified."""

LOSS_TOLERANCE = 1e-4
"""Relative; the losses only order the candidates."""

ULQ_ACT = operator_cases("ulq_act")
ARQ_WEIGHT = [case for case in operator_cases("arq_weight") if "ConvTranspose3d" not in case.name]
ULQ_WEIGHT = [case for case in operator_cases("ulq_weight") if "ConvTranspose" not in case.name]
ULQ_WEIGHT_FORWARD = [
    case
    for case in operator_cases("ulq_weight") + operator_cases("ulq_weight", failed_in="backward")
    if "ConvTranspose3d" not in case.name
]
IFMR = operator_cases("ifmr")
SCALE_GUARD = operator_cases("scale_guard")


def by_name(cases: list[OperatorCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


class UlqAct:
    """The activation fake quantization of one case, forward and backward."""

    def __init__(self, case: OperatorCase) -> None:
        self.bits = case.params["num_bits"]
        self.x = case["x"].clone().requires_grad_()
        self.clip_max = case["clip_max"].clone().requires_grad_()
        self.clip_min = case["clip_min"].clone().requires_grad_()
        with torch.no_grad():
            self.upper, self.lower = repair_clips(
                self.clip_max,
                self.clip_min,
                case["clip_max_pre"],
                case["clip_min_pre"],
                case.params["fixed_min"],
            )
        self.scale, self.offset = activation_scale_offset(self.upper, self.lower, self.bits)
        self.y = fake_quantize_activation(self.x, self.clip_max, self.clip_min, self.upper, self.lower, self.bits)
        self.y.backward(case["grad_out"])

    def equals(self, case: OperatorCase) -> dict[str, bool]:
        pairs = {
            "y": self.y,
            "scale": self.scale,
            "clip_max_out": self.upper,
            "clip_min_out": self.lower,
            "grad_x": self.x.grad,
        }
        same = {key: torch.equal(value, case[key]) for key, value in pairs.items()}
        return same | {"offset": torch.equal(self.offset, case["offset"].float())}


def clip_gradient_terms(run: UlqAct, case: OperatorCase) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms of both clip gradients in float64, from the formulas."""
    s, o, h = run.scale.double(), run.offset.double(), 2 ** (run.bits - 1)
    x, grad = case["x"], case["grad_out"].double()
    above = x > run.scale * ((h - 1) - run.offset)
    below = x < run.scale * (-h - run.offset)
    clipped = torch.where(above, run.upper.double(), torch.where(below, run.lower.double(), x.double()))
    error = (torch.round(clipped / s) - clipped / s) / (2**run.bits - 1)
    assert torch.isfinite(o)
    return (error + above) * grad, (below.double() - error) * grad


@by_name([case for case in ULQ_ACT if case.name not in RANGE_REPAIRED])
def test_activations_factors_clips_and_input_gradient_equal_amct_s(case: OperatorCase) -> None:
    assert all((same := UlqAct(case).equals(case)).values()), same


@by_name([case for case in ULQ_ACT if case.name not in RANGE_REPAIRED])
def test_clip_gradients_equal_amct_s(case: OperatorCase) -> None:
    run = UlqAct(case)
    terms_max, terms_min = clip_gradient_terms(run, case)
    for grad, key, terms in (
        (run.clip_max.grad, "grad_clip_max", terms_max),
        (run.clip_min.grad, "grad_clip_min", terms_min),
    ):
        error = abs(grad.double() - case[key].double())
        # float16 codes of 16 bits overflow; the gradient is NaN then, there as here.
        both_nan = bool(grad.isnan() & case[key].isnan())
        assert both_nan or error <= CLIP_GRADIENT_TOLERANCE * terms.norm(), key


@by_name([case for case in ULQ_ACT if case.name in RANGE_REPAIRED])
def test_tiny_and_inverted_ranges_are_repaired_where_amct_lets_them_pass(case: OperatorCase) -> None:
    assert not all(UlqAct(case).equals(case).values()), f"drop this exception: {RANGE_REPAIRED[case.name]}"
    run = UlqAct(case)
    fixed_min = case.params["fixed_min"]
    assert run.lower == case["clip_min_pre"] or (fixed_min and run.lower == 0)
    assert run.upper - run.lower >= 1.192092896e-7


def test_every_range_repair_exception_names_a_case_that_exists() -> None:
    assert set(RANGE_REPAIRED) <= {case.name for case in ULQ_ACT}


def layout_of(case: OperatorCase) -> ChannelLayout:
    return ChannelLayout("Transpose" in case.params["module_type"], case.params.get("groups", 1))


@by_name(ARQ_WEIGHT)
def test_weight_scales_equal_amct_s(case: OperatorCase) -> None:
    scale = arq_scale(case["w"].float(), layout_of(case), case.params["num_bits"], case.params["channel_wise"])
    assert torch.equal(scale.flatten(), case["scale"].flatten())


@by_name(ARQ_WEIGHT)
def test_fake_quantized_weights_equal_amct_s(case: OperatorCase) -> None:
    weight, layout, bits = case["w"].float(), layout_of(case), case.params["num_bits"]
    scale = arq_scale(weight, layout, bits, case.params["channel_wise"])
    assert torch.equal(fake_quantize_weight(weight, scale, layout, bits), case["y"])


@by_name([case for case in ARQ_WEIGHT if f"{case.name}/grad_w" in case.tensors])
def test_weight_gradients_equal_amct_s(case: OperatorCase) -> None:
    weight, layout, bits = case["w"].clone().requires_grad_(), layout_of(case), case.params["num_bits"]
    scale = arq_scale(weight.detach(), layout, bits, case.params["channel_wise"])
    fake_quantize_weight(weight, scale, layout, bits).backward(case["grad_out"])
    assert torch.equal(weight.grad, case["grad_w"])


class UlqWeight:
    """The forward and backward of one case with a learned scale."""

    def __init__(self, case: OperatorCase) -> None:
        params, layout = case.params, layout_of(case)
        channel_wise, bits = params["channel_wise"], params["num_bits"]
        self.layout, self.channel_wise = layout, channel_wise
        self.weight = case["w"].clone().requires_grad_()
        first = arq_scale(case["w"], layout, bits, channel_wise)
        self.scale = (case["scale_in"] if params["cur_batch"] else first).flatten().clone().requires_grad_()
        view = layout.view(self.weight)
        self.factor = scale_gradient_factor(self.elements(case), bits)
        self.y = fake_quantize_weight_learned(
            self.weight, layout.spread(self.scale, view, channel_wise), layout, bits, self.factor
        )

    @torch.no_grad()
    def norm_of_terms(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the L2 norm of what the gradient of each scale sums."""
        weight, y = self.layout.view(self.weight), self.layout.view(self.y)
        scale = self.layout.spread(self.scale, weight, self.channel_wise)
        codes = y / scale
        terms = codes - (weight / scale) * (codes == torch.round(weight / scale))
        dims = self.layout.reduced_dims(weight, self.channel_wise)
        return (terms * self.factor * self.layout.view(grad)).square().sum(dims).sqrt().flatten()

    @staticmethod
    def elements(case: OperatorCase) -> int:
        params, weight = case.params, case["w"]
        kind = getattr(nn, params["module_type"])
        channels = {"in_channels": params.get("in", 1), "out_channels": params.get("out")}
        layer = SimpleNamespace(groups=params.get("groups", 1), **channels)
        return LAYER_TYPES[kind].scale_elements(layer, weight, params["channel_wise"])


@by_name(ULQ_WEIGHT_FORWARD)
def test_weights_with_learned_scales_equal_amct_s(case: OperatorCase) -> None:
    run = UlqWeight(case)
    assert torch.equal(run.scale.detach(), case["scale"].flatten())
    assert torch.equal(run.y.detach().nan_to_num(), case["y"].nan_to_num())


@by_name(ULQ_WEIGHT)
def test_the_gradients_of_learned_scales_equal_amct_s(case: OperatorCase) -> None:
    run = UlqWeight(case)
    run.y.backward(case["grad_out"])
    assert torch.equal(run.weight.grad, case["grad_w"])
    error = (
        (run.scale.grad - case["grad_scale"].flatten()).abs().nan_to_num(0)
    )  # a scale of zero gives NaN on both sides
    assert torch.equal(run.scale.grad.isnan(), case["grad_scale"].flatten().isnan())
    assert bool((error <= CLIP_GRADIENT_TOLERANCE * run.norm_of_terms(case["grad_out"]).nan_to_num(0)).all())


def calibrate(case: OperatorCase) -> IfmrResult:
    given = case.params
    return ifmr(
        [case[f"batch{i}"] for i in range(given["batch_num"])],
        given["num_bits"],
        symmetric=not given["with_offset"],
        max_percentile=given.get("max_percentile", 0.999999),
        min_percentile=given.get("min_percentile", 0.999999),
        search=(
            given.get("search_start", 0.7),
            given.get("search_end", 1.3),
            given.get("search_step", 0.01),
        ),
    )


@by_name(IFMR)
def test_calibrated_factors_and_clips_equal_amct_s(case: OperatorCase) -> None:
    result = calibrate(case)
    for key in ("scale", "offset", "clip_max", "clip_min"):
        assert torch.equal(getattr(result, key), case[key]), key


@by_name(IFMR)
def test_calibration_chooses_the_candidate_that_amct_chose(case: OperatorCase) -> None:
    assert calibrate(case).losses.argmin() == case.entry["best_index"]


@by_name(IFMR)
def test_calibration_losses_equal_amct_s(case: OperatorCase) -> None:
    torch.testing.assert_close(calibrate(case).losses, case["candidate_losses"], rtol=LOSS_TOLERANCE, atol=0)


def test_calibration_tries_the_ratios_that_amct_tries() -> None:
    entries = {case.name: case for case in IFMR}
    assert calibrate(entries["000_int8_sym_normal"]).losses.numel() == 61


@by_name([case for case in SCALE_GUARD if "with_offset" in case.params])
def test_tiny_scales_are_replaced_as_amct_does(case: OperatorCase) -> None:
    scale, offset = guard_scale(case["scale_in"], case["offset_in"], case.params["num_bits"])
    assert torch.equal(scale, case["scale"])
    if case.params["with_offset"]:
        assert torch.equal(offset, case["offset"])


@by_name([case for case in SCALE_GUARD if case.params.get("asymmetric")])
def test_a_range_becomes_the_scale_and_offset_that_amct_computes(case: OperatorCase) -> None:
    scale, offset = activation_scale_offset(case["data_max"], case["data_min"], case.params["num_bits"])
    assert torch.equal(scale, case["scale"])
    assert torch.equal(offset, case["offset"].float())


@by_name([case for case in SCALE_GUARD if case.params.get("asymmetric") is False])
def test_a_symmetric_range_becomes_the_scale_that_amct_computes(case: OperatorCase) -> None:
    ends = torch.stack((case["data_max"], case["data_min"]), dim=1)
    scale = arq_scale(ends, ChannelLayout(), case.params["num_bits"], channel_wise=True)
    assert torch.equal(scale.flatten(), case["scale"])
    assert torch.equal(torch.zeros_like(case["offset"]), case["offset"])
