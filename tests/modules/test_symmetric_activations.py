"""A range around 0: one magnitude is learned, the offset is 0 whatever the values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from amct_lightning import QuantRecord, calibrate, conversion_report, export_onnx, prepare_qat, verify_export
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.quantizers import ActivationQuantizer
from amct_lightning.quantizers.functional import EPS, activation_scale_offset, range_around_zero
from amct_lightning.quantizers.functions.activation import clips_around_zero
from amct_lightning.quantizers.ifmr import ifmr
from tests.operators import Operators

SYMMETRIC = {"activations": {"symmetric": True}}
EXECUTIONS = ["composite", "compiled"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(x: Tensor, choices: dict[str, Any] | None = None, steps: int = 3, **options: Any) -> Any:
    model: Any = prepare_qat(network(), choices or SYMMETRIC, x, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@given(
    st.floats(2**-20, 2**20, width=32),
    st.floats(-(2**20), 0, width=32),
    st.sampled_from([4, 8, 16]),
)
def test_the_offset_is_zero_and_the_scale_that_of_amct(clip_max: float, clip_min: float, num_bits: int) -> None:
    clips = torch.tensor(clip_max), torch.tensor(clip_min)
    scale, offset = activation_scale_offset(*range_around_zero(*clips, num_bits), num_bits)
    assert offset == 0
    width = (clips[0] - clips[1]) / (2**num_bits - 1)
    wanted = width if width > 2 * EPS else None
    if wanted is not None:
        torch.testing.assert_close(scale, wanted, rtol=5e-7, atol=0)


@pytest.mark.parametrize("num_bits", [4, 8, 16])
@pytest.mark.parametrize("size", [0.0, 1e-12, EPS, 1.0000001 * EPS, 1.1 * EPS])
def test_a_range_that_is_too_small_has_the_scale_one_and_no_offset(num_bits: int, size: float) -> None:
    end = torch.tensor(size * (2**num_bits - 1) / 2)
    scale, offset = activation_scale_offset(*range_around_zero(end, -end, num_bits), num_bits)
    assert offset == 0
    assert scale == 1 or scale >= EPS


@pytest.mark.parametrize("num_bits", [4, 8, 16])
def test_values_and_gradients_follow_the_formulas(num_bits: int) -> None:
    """By autograd through ``u = (h-1) s`` and ``l = -h s`` from the gradients of the ends of an unbound range."""
    torch.manual_seed(0)
    x, h = torch.randn(200), 2 ** (num_bits - 1)
    quantizer = ActivationQuantizer(num_bits, clip=(1.0, -1.0), symmetric=True).train()
    y = quantizer(x)
    scale = torch.tensor(2.0) / (2**num_bits - 1)
    torch.testing.assert_close(y, torch.clamp(torch.round(x / scale), -h, h - 1) * scale, rtol=1e-6, atol=0)
    gradient = torch.randn(200)
    y.backward(gradient)
    free = ActivationQuantizer(num_bits, clip=(float(scale * (h - 1)), float(scale * -h))).train()
    free(x).backward(gradient)
    wanted = (free.clip_max.grad * (h - 1) - free.clip_min.grad * h) / (2 * h - 1)  # type: ignore[operator]
    torch.testing.assert_close(quantizer.clip_max.grad, wanted, rtol=1e-4, atol=1e-5)
    assert quantizer.clip_max.grad == -quantizer.clip_min.grad  # type: ignore[operator]


def test_the_gradient_is_that_of_the_magnitude() -> None:
    clips = torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    torch.autograd.gradcheck(
        lambda a, b: clips_around_zero(a, b, 8), [c.detach().double().requires_grad_() for c in clips]
    )
    _, tangent = torch.func.jvp(
        lambda a: clips_around_zero(a, clips[1].detach(), 8)[0], (clips[0].detach(),), (torch.ones(()),)
    )
    torch.testing.assert_close(tangent, torch.tensor(127 / 255))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_training_keeps_the_range_around_zero(execution: Any) -> None:
    x = torch.randn(16, 8) + 1  # whose range is not around 0
    model = trained(x, execution=execution)
    for quantizer in (model[0].input_quantizer, model[2].input_quantizer):
        assert quantizer.offset == 0
        upper, lower = quantizer.usable_clips()
        torch.testing.assert_close(-lower / upper, torch.tensor(128 / 127))
    assert [layer.offset_d for layer in QuantRecord.from_model(model).values()] == [0, 0]


def test_both_executors_learn_alike() -> None:
    x = torch.randn(16, 8)
    one, other = (trained(x, execution=execution) for execution in EXECUTIONS)
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


def test_the_calibrated_scale_is_that_of_the_symmetric_search() -> None:
    x = torch.randn(64, 8) + 1
    model: Any = prepare_qat(network(), SYMMETRIC, x)
    calibrate(model, [x])
    torch.testing.assert_close(model[0].input_quantizer.scale, ifmr([x], 8).scale, rtol=5e-7, atol=0)


def test_what_calibrates_is_quantized_with_a_range_that_holds_the_batch() -> None:
    x = torch.tensor([[-0.5, 3.0]])
    quantizer = ActivationQuantizer(batch_num=2, symmetric=True).train()
    assert quantizer(x).max() > 2.97
    assert quantizer.calibrating


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 1), nn.GRU(4, 3)], ids=lambda layer: type(layer).__name__
)
def test_every_kind_of_layer_evaluates_what_it_trains_and_learns(layer: nn.Module, execution: Any) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(layer)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y[0] if isinstance(y, tuple) else y

    x = torch.randn(2, 4, 4)
    model: Any = prepare_qat(Host(), SYMMETRIC, x, execution=execution).train()
    model(x)
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "clip" in n)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), y.detach(), rtol=1e-6, atol=1e-6)
        again = copy.deepcopy(model)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x))


def test_a_step_reads_nothing_on_the_host() -> None:
    x = torch.randn(16, 8)
    model = trained(x)
    with Operators() as operators:
        model(x).square().mean().backward()
    assert operators.counts
    assert not operators.host_reads


@pytest.mark.parametrize("grid", [False, True])
def test_graphs_of_torch_and_files_have_the_offset_zero(tmp_path: Path, grid: bool) -> None:
    x = torch.randn(16, 8)
    model = trained(x, deploy_grid=grid).eval()
    if not grid:
        with torch.no_grad():
            assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    for form in ("qdq", "deploy"):
        export_onnx(model, tmp_path / f"{form}.onnx", x, form)
        assert verify_export(model, {form: tmp_path / f"{form}.onnx"}, [x]).ok


def test_a_compiled_step_is_one_graph_and_gives_the_same() -> None:
    x = torch.randn(16, 8)
    model = trained(x)
    wanted = copy.deepcopy(model)(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)


def test_frozen_clips_stay() -> None:
    x = torch.randn(16, 8)
    model = trained(x)
    quantizer = model[0].input_quantizer
    before = quantizer.usable_clips()
    quantizer.freeze()
    with torch.no_grad():
        quantizer.clip_max.fill_(50.0)
    model(x)
    assert quantizer.usable_clips() == before


@pytest.mark.parametrize("bits", ["INT8", "INT16"])
def test_scales_that_are_rounded_to_float16_keep_the_offset(bits: str) -> None:
    x = torch.randn(16, 8) * 3
    choices = {"fakequant_precision_mode": "FORCE_FP16_QUANT", "activations": {"symmetric": True, "dst_type": bits}}
    record = QuantRecord.from_model(trained(x, choices))
    assert [layer.offset_d for layer in record.values()] == [0, 0]


def test_the_report_tells_of_it_and_where_half_of_the_integers_are_unused() -> None:
    x = torch.randn(4, 8)
    model = prepare_qat(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), SYMMETRIC, x)
    text = str(conversion_report(model))
    assert "symmetric input" in text
    assert "input never negative, yet its range is around 0: set symmetric to false: '2'" in text
    found = find_plan(model)
    assert found is not None
    assert not any(layer.fixed_min for layer in found[1].layers)
    assert QuantPlan.from_dict(found[1].to_dict()) == found[1]
