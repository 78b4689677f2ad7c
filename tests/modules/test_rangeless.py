"""A Linear whose input has no range: a scale per token in every forward, or float."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from amct_lightning import QuantRecord, calibrate, conversion_report, export_onnx, prepare_qat
from amct_lightning.conversion.convert import revert_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.modules import activation_quantizers, learned_factors
from amct_lightning.modules.fused.choice import set_execution, without_integers
from amct_lightning.quantizers.functional import quantize_tokens, token_scale
from amct_lightning.record import LayerRecord
from tests.operators import Operators, saved_bytes

ALGORITHMS = ["per_token", "none"]
WEIGHTS: dict[str, dict[str, Any]] = {
    "arq": {},
    "by channel": {"channel_wise": True},
    "learned": {"algo": "ulq_retrain"},
    "groups": {"dst_type": "INT4", "group_size": 32},
}
LARGE, TINY = st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-(2.0**-126), 2.0**-126, width=32)
SHAPES = [(6, 64), (2, 3, 64), (64,), (0, 64)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))


def converted(algo: str, weights: str = "arq", shape: tuple[int, ...] = (6, 64), **options: Any) -> Any:
    choices = {"activations": {"algo": algo}, "weights": WEIGHTS[weights]}
    return prepare_qat(network(), choices, torch.ones(shape if 0 not in shape else (6, 64)), **options).train()


def reference(x: Tensor, algo: str, num_bits: int = 8) -> Tensor:
    """One token after another, with a straight-through gradient."""
    if algo == "none":
        return x
    h = 2 ** (num_bits - 1)
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        with torch.no_grad():
            scale = row.abs().max() / (h - 1)
            scale = scale if scale > 0 else torch.ones(())
            values = torch.clamp(torch.round(row / scale), -h, h - 1) * scale
        rows.append(row + (values - row).detach())
    return torch.stack(rows).reshape(x.shape) if rows else x


@given(
    st.lists(
        st.lists(LARGE | TINY, min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([4, 8, 16]),
)
def test_every_token_has_finite_codes_of_its_own_scale(rows: list[list[float]], num_bits: int) -> None:
    x, h = torch.tensor(rows), 2 ** (num_bits - 1)
    scale, values = token_scale(x, num_bits), quantize_tokens(x, num_bits)
    assert torch.isfinite(values).all()
    codes = torch.round(x / scale)
    assert codes.abs().max() <= h - 1  # nothing is clipped, so the gradient passes everywhere
    assert torch.equal(values, codes * scale)
    for row, alone in zip(values, x, strict=True):
        assert torch.equal(row, quantize_tokens(alone, num_bits))
    normal = x.abs().amax(-1) > 2.0**-100
    error = (values - x).abs().amax(-1)
    assert (error <= scale.squeeze(-1) * 0.5001)[normal].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_zeros_stay_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=dtype)
    assert torch.equal(quantize_tokens(x, 8)[0], x[0])
    assert quantize_tokens(x, 8).dtype == dtype
    assert quantize_tokens(torch.ones(2, 0), 8).shape == (2, 0)


@pytest.mark.parametrize("execution", ["composite", "compiled", "integer"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_follow_the_formulas(
    shape: tuple[int, ...], algo: str, weights: str, execution: Any
) -> None:
    model = converted(algo, weights, shape, execution=execution)
    layer, x = model[0], torch.randn(shape, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    quantizer, weight = copy.deepcopy(layer.weight_quantizer), layer.weight.detach().clone().requires_grad_()
    wanted = nn.functional.linear(reference(twin, algo), quantizer(weight), layer.bias.detach())
    y = layer(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    gradient = torch.randn(y.shape)
    y.backward(gradient)
    wanted.backward(gradient)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)
    if weights == "learned":
        found, expected = layer.weight_quantizer.scale.grad, quantizer.scale.grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.eval()[0](x), y)


@pytest.mark.parametrize(("data", "weight"), [("INT4", "INT4"), ("INT16", "INT8")])
def test_tokens_may_have_other_widths(data: str, weight: str) -> None:
    choices = {"activations": {"algo": "per_token", "dst_type": data}, "weights": {"dst_type": weight}}
    x = torch.randn(6, 64)
    model: Any = prepare_qat(network(), choices, x).train()
    bits = int(data[3:])
    wanted = nn.functional.linear(
        reference(x, "per_token", bits), model[0].weight_quantizer(model[0].weight), model[0].bias
    )
    torch.testing.assert_close(model[0](x), wanted, rtol=1e-5, atol=1e-6)
    assert QuantRecord.from_model(model)["0"].act_type == f"{data}_PER_TOKEN"


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "weights frozen"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_no_byte_more_is_kept_than_in_float(algo: str, weights: str, frozen: bool) -> None:
    model, plain, x = converted(algo, weights), network(), torch.randn(6, 64, requires_grad=True)
    for module in (model, plain):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("weight" not in name if frozen else True)
    if frozen and weights == "learned":
        return  # scales learn, which needs the input
    assert saved_bytes(lambda: model(x)) == saved_bytes(lambda: plain(x))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_input_may_be_changed_in_place_where_the_float_layer_allows_it(algo: str) -> None:
    model, x = converted(algo), torch.randn(6, 64, requires_grad=True)
    model[0].weight.requires_grad_(False)
    hidden = x * 1
    y = model[0](hidden)
    hidden.mul_(2)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_it_needs_no_calibration_and_learns_no_clips(algo: str) -> None:
    model, x = converted(algo), torch.randn(6, 64)
    assert activation_quantizers(model) == {}
    assert learned_factors(model) == []
    assert not any("input_quantizer" in name for name in model.state_dict())
    calibrate(model, [x])
    with torch.no_grad():
        y = model.eval()(x)
    assert not torch.equal(y, network()(x))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_step_reads_nothing_on_the_host(algo: str) -> None:
    model, x = converted(algo, "learned"), torch.randn(6, 64)
    model(x).sum().backward()
    with Operators() as operators:
        model(x).square().mean().backward()
    assert operators.counts
    assert not operators.host_reads


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_copies_states_and_graphs_compute_the_same(algo: str, weights: str) -> None:
    model, x = converted(algo, weights).eval(), torch.randn(6, 64)
    model.train()(x)  # with which learned scales begin
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        other = converted(algo, weights).eval()
        other.load_state_dict(model.state_dict())
        graph = torch.export.export(model, (x,)).module()
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, graph):
            assert torch.equal(same(x), wanted)
        torch.testing.assert_close(torch.func.vmap(model)(x), wanted, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), wanted)
    compiled(x).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_low_precision_trains_with_factors_in_float32(algo: str, dtype: torch.dtype) -> None:
    model, x = converted(algo, "learned"), torch.randn(6, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
        wanted = nn.functional.linear(reference(x, algo), model[0].weight_quantizer(model[0].weight), model[0].bias)
        torch.testing.assert_close(model[0](x), wanted)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.to(dtype)
    assert model(x.detach().to(dtype)).dtype == dtype
    assert model[0].weight_quantizer.scale.dtype == torch.float32


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_differentiating_twice_is_refused_clearly(algo: str) -> None:
    model, x = converted(algo), torch.randn(6, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="refuses to differentiate twice"):
        grad.square().sum().backward()


def test_layers_that_read_one_tensor_have_nothing_to_share() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)

    model = prepare_qat(Heads(), {"activations": {"algo": "per_token"}}, torch.ones(1, 4))
    assert [row.shares_with for row in conversion_report(model).rows] == [(), ()]
    model(torch.ones(2, 4)).sum().backward()


def mixed() -> Any:
    layers = {"2": {"activations": {"algo": "none"}}, "4": {"activations": {"algo": None}}}
    model = nn.Sequential(*network(), nn.ReLU(), nn.Linear(3, 3))
    return prepare_qat(model, {"activations": {"algo": "per_token"}, "layers": layers}, torch.ones(6, 64)).train()


def test_the_record_has_the_factors_of_the_weight_and_says_how_the_input_is_quantized() -> None:
    model = mixed()
    calibrate(model, [torch.randn(6, 64)])
    record = QuantRecord.from_model(model)
    shown = {name: (layer.act_type, layer.scale_d is None, layer.offset_d is None) for name, layer in record.items()}
    assert shown == {"0": ("INT8_PER_TOKEN", True, True), "2": ("FLOAT", True, True), "4": ("INT8", False, False)}
    assert QuantRecord.from_text(record.to_text()) == record
    assert "scale_d" not in record.to_text().partition('key: "4"')[0]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (LayerRecord(0.5, 0, [1.0], [0], act_type="FLOAT"), "scale_d is 0.5 and offset_d 0; with act_type FLOAT there"),
        (LayerRecord(None, None, [1.0], [0]), "scale_d is missing; only with act_type INT4_PER_TOKEN or INT8_PER_T"),
        (LayerRecord(0.5, None, [1.0], [0]), "offset_d is missing"),
        (
            LayerRecord(None, None, [1.0], [0], act_type="FLOAT", scale_h=1.0, offset_h=0, scale_r=[1.0], offset_r=[0]),
            "act_type is FLOAT, which no LSTM or GRU has",
        ),
    ],
    ids=["given", "missing", "offset", "recurrent"],
)
def test_a_record_that_contradicts_its_type_is_refused(record: LayerRecord, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        record.validate("fc")


def test_the_plan_of_a_checkpoint_has_everything() -> None:
    model = mixed()
    found = find_plan(model)
    assert found is not None
    assert QuantPlan.from_dict(found[1].to_dict()) == found[1]
    text = str(conversion_report(model))
    assert "A8W8 ARQ   input scale per token" in text
    assert "W8 ARQ     input in float" in text
    old = {key: value for key, value in found[1].to_dict().items() if key != "activations"}
    assert all(layer.retrain_data_config.has_clips for layer in QuantPlan.from_dict(old).config.values())


def test_integers_are_left_with_a_reason_and_the_layers_are_reverted() -> None:
    model = mixed()
    set_execution(model, "integer")
    reasons = without_integers(model)
    assert reasons["its input has a scale per token, integer operators take one for all"] == ["0"]
    assert reasons["its input stays in float (algo: none)"] == ["2"]
    revert_layers(model)
    assert [type(layer) for layer in model[:3:2]] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("form", ["qdq", "deploy", "fake_quant"])
def test_files_are_refused_with_layers_and_remedy(tmp_path: Any, form: Any) -> None:
    model = mixed()
    calibrate(model, [torch.randn(6, 64)])
    with pytest.raises(
        ValueError, match=r"scale per token \(algo: per_token\) in '0', float activations .* in '2'\. Co"
    ):
        export_onnx(model.eval(), tmp_path / "net.onnx", torch.randn(6, 64), form)
    assert not list(tmp_path.iterdir())
