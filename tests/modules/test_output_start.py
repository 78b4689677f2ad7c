"""``activations: {init: output}``: the range with the least squared error of what the layers make of the values."""

from __future__ import annotations

import copy
import io
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import calibrate, prepare_qat
from amct_lightning.conversion.convert import revert_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.quantizers.ifmr import ifmr
from amct_lightning.quantizers.starting.output import Reader, output_range


def choices(**more: Any) -> dict[str, Any]:
    return {"activations": {"init": "output", "dst_type": "INT4", **more}, "weights": {"dst_type": "INT4"}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def lopsided(rows: int = 64) -> Tensor:
    torch.manual_seed(1)
    return functional.gelu(torch.randn(rows, 16) * 2)


def layer_error(layer: Any, x: Tensor) -> float:
    """Return the squared error of the output of a quantized layer."""
    wanted = functional.linear(x, layer.weight)
    found = functional.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight))
    return float((found - wanted).square().sum())


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    num_bits=st.sampled_from([4, 8]),
    kind=st.sampled_from(["free", "fixed_min", "symmetric"]),
    shift=st.sampled_from([0.0, 2.0, -2.0]),
)
def test_it_is_never_worse_than_the_range_that_it_is_compared_with(
    seed: int, num_bits: int, kind: str, shift: float
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(40, 12) + shift, torch.randn(5, 12)
    x = x.abs() if kind == "fixed_min" else x
    options = {} if kind == "free" else {kind: True}
    result = ifmr([x], num_bits)
    first = result.clip_max, torch.zeros(()) if kind == "fixed_min" else result.clip_min

    def product(values: Tensor) -> Tensor:
        return functional.linear(values, weight)

    def loss(upper: Tensor, lower: Tensor) -> float:
        config: dict[str, Any] = {
            "clip_max": float(upper),
            "clip_min": float(lower) if lower < 0 else -1e-9,
            "dst_type": f"INT{num_bits}",
        }
        flags = {"fixed_min": kind == "fixed_min"}
        layer = nn.Sequential(nn.Linear(12, 5))
        if kind == "symmetric":
            flags, half = {"symmetric": True}, float(upper - lower) / 2
            config |= {"clip_max": half, "clip_min": -half}
        weights = {"dst_type": "INT4"}
        model: Any = prepare_qat(layer, {"activations": {**config, **flags}, "weights": weights}, x).eval()
        return float((product(model[0].input_quantizer(x)) - product(x)).square().sum())

    found = output_range([x[:20], x[20:]], [Reader(product, product)], first, num_bits, **options)
    assert loss(*found) <= loss(*first) * (1 + 1e-5) + 1e-9
    if kind == "fixed_min":
        assert float(found[1]) == 0
    if kind == "symmetric" and float(found[0]) != float(first[0]):
        assert float(found[0]) == -float(found[1])


@pytest.mark.parametrize("more", [{}, {"symmetric": True}])
def test_the_output_of_a_layer_has_a_smaller_error_than_with_amct_s_search(more: dict[str, Any]) -> None:
    x, errors = lopsided(), []
    for init in ("mse", "output"):
        model: Any = prepare_qat(network(), choices(init=init, **more), x)
        calibrate(model, [x])
        errors.append(layer_error(model.eval()[0], x))
    assert errors[1] < errors[0] * (1.0 if more else 0.6)


def test_both_ends_are_searched_on_their_own() -> None:
    x = lopsided()
    model: Any = prepare_qat(network(), choices(), x)
    calibrate(model, [x])
    upper, lower = (float(clip) for clip in model[0].input_quantizer.clips[:2])
    assert -0.5 < lower < 0 and upper > 2  # the values are above -0.17


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(16, 4, bias=False), nn.Linear(16, 4, bias=False)
        nn.init.zeros_(self.small.weight)
        with torch.no_grad():
            self.small.weight[0, 0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.small(x), self.large(x)], -1)


def test_all_layers_that_share_a_range_count() -> None:
    torch.manual_seed(3)
    x = torch.randn(64, 16)
    x[:, 0] *= 12  # which the first layer reads alone
    model: Any = prepare_qat(Shared(), choices(), x)
    assert model.small.input_quantizer is model.large.input_quantizer
    calibrate(model, [x])
    both = model.small.input_quantizer.clip_max.item()
    alone: Any = prepare_qat(Shared(), {**choices(), "skip_layers": ["large"]}, x)
    calibrate(alone, [x])
    assert both != alone.small.input_quantizer.clip_max.item()


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 6)),
    (nn.Conv2d(4, 4, 3, stride=2, groups=2), (2, 4, 7, 7)),
    (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("execution", ["composite", "compiled"])
def test_convolutions_have_it(layer: nn.Module, shape: tuple[int, ...], execution: Any) -> None:
    torch.manual_seed(0)
    x, found = functional.gelu(torch.randn(shape)), []
    for init in ("mse", "output"):
        config = {"activations": {"init": init, "dst_type": "INT8"}, "layers": {"0": {}}}
        model: Any = prepare_qat(nn.Sequential(layer), config, x, execution=execution).train()
        model(x).sum().backward()
        assert not model[0].input_quantizer.calibrating
        with torch.no_grad():
            wanted = layer(x)
            found.append(float((model.eval()(x) - wanted).square().sum()))
    assert found[1] < found[0]


def test_a_training_step_under_autocast_ends_the_calibration_in_single_precision() -> None:
    x, clips = lopsided(), []
    for enabled in (False, True):
        model: Any = prepare_qat(network(), choices(), x).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(x).sum().backward()
        clips.append(float(model[0].input_quantizer.clip_max))
    assert clips[0] == clips[1]


def test_a_copy_and_a_pickle_go_by_their_own_layers() -> None:
    x = lopsided()
    model: Any = prepare_qat(network(), choices(), x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for one in (clone, other):
            one[0].weight.copy_(torch.eye(32, 16) * torch.linspace(0, 1, 16))
    for one in (model, clone, other):
        calibrate(one, [x])
    clips = [float(one[0].input_quantizer.clip_max) for one in (model, clone, other)]
    assert clips[1] == clips[2] != clips[0]


def test_a_layer_that_is_float_by_now_does_not_count() -> None:
    x = torch.randn(64, 16)
    model: Any = prepare_qat(Shared(), choices(), x)
    revert_layers(model.large)
    calibrate(model, [x])
    alone: Any = prepare_qat(Shared(), {**choices(), "skip_layers": ["large"]}, x)
    calibrate(alone, [x])
    assert model.small.input_quantizer.clip_max.item() == alone.small.input_quantizer.clip_max.item()


def test_it_is_in_the_plan_and_a_state_has_what_it_found() -> None:
    x = lopsided()
    first: Any = prepare_qat(network(), choices(), x).train()
    first(x)
    found = find_plan(first)
    assert found is not None
    plan = QuantPlan.from_dict(found[1].to_dict())
    assert plan == found[1]
    second: Any = prepare_qat(network(), plan.config, x).train()
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x), second(x))


def test_values_of_zero_are_degenerate_as_ever() -> None:
    model: Any = prepare_qat(network(), choices(), torch.zeros(4, 16))
    with pytest.warns(UserWarning, match="0"):
        calibrate(model, [torch.zeros(4, 16)])
    assert float(model[0].input_quantizer.scale) == 1.0


def test_recurrent_layers_are_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.lstm(x)[0])

    with pytest.raises(
        ValueError, match=r"activations.init is 'output' for 'lstm' \(LSTM\).*Give such a layer init: mse"
    ):
        prepare_qat(Recurrent(), {"activations": {"init": "output"}}, torch.ones(1, 2, 8))
