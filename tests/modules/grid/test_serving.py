"""Layers of ``target="serving"`` give every integer and every output of the server, in bfloat16 and float16."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amct_lightning import calibrate, prepare_qat, quantized_layers
from amct_lightning.modules.grid.codes import activation_codes
from amct_lightning.modules.grid.serving import serving_factors
from tests.modules.grid import server

HALVES = [torch.bfloat16, torch.float16]
MODELS = [(of_model, dtype) for dtype in HALVES for of_model in (dtype, torch.float32)]
models = pytest.mark.parametrize(("of_model", "dtype"), MODELS, ids=str)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def converted(model: nn.Module, x: Tensor, dtype: torch.dtype, config: Any = None) -> Any:
    qat = prepare_qat(model, config, x, target=f"serving_{name_of(dtype)}")  # type: ignore[arg-type]
    calibrate(qat, [x])
    return qat.eval()


def served(layer: Any, x: Tensor, dtype: torch.dtype, by_channel: bool = True) -> tuple[Any, Any]:
    """The codes and the output that a server has for a layer, from its clips, its weight and its bias."""
    upper, lower = (float(clip) for clip in layer.input_quantizer.usable_clips())
    scale, offset = server.input_factors(upper, lower, dtype, layer.input_quantizer.symmetric)
    codes = server.input_codes(server.array(x, dtype), scale, offset)
    scale_w, weight = server.weight_factors(server.array(layer.weight), by_channel)
    deq = server.deq_scale(scale, scale_w)
    bias = None if layer.bias is None else server.array(layer.bias)
    return codes, server.output(codes, weight, server.quant_bias(bias, deq, weight, offset), deq, dtype)


def check(layer: Any, x: Tensor, dtype: torch.dtype, by_channel: bool = True) -> None:
    codes, output = served(layer, x, dtype, by_channel)
    quantizer = layer.input_quantizer
    own = activation_codes(quantizer, x, *quantizer.usable_clips()).values.detach() + quantizer.offset
    assert np.array_equal(own.numpy().astype(np.int64), codes)
    with torch.no_grad():
        y = layer.eval()(x)
    assert y.dtype == x.dtype
    assert np.array_equal(server.array(y), output.astype(np.float32))
    if codes.size and np.abs(codes).max() < 2**24 / (255 * 128):  # where float32 adds exactly, training does the same
        assert torch.equal(layer.train()(x), y)


@settings(max_examples=60, deadline=None)
@given(
    of_model=st.sampled_from(MODELS),
    shape=st.sampled_from([(3, 8), (2, 3, 8), (8,), (2, 700), (1, 1)]),
    outputs=st.integers(1, 5),
    magnitude=st.integers(-6, 4),
    shift=st.sampled_from([-1.0, 0.0, 0.3, 1.0]),
    bias=st.booleans(),
    by_channel=st.booleans(),
    symmetric=st.booleans(),
    halves=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_code_and_every_output_is_that_of_the_server(
    of_model: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, ...],
    outputs: int,
    magnitude: int,
    shift: float,
    bias: bool,
    by_channel: bool,
    symmetric: bool,
    halves: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model_dtype, dtype = of_model
    model = nn.Sequential(nn.Linear(shape[-1], outputs, bias=bias)).to(model_dtype)
    x = ((torch.randn(shape) + shift) * 10.0**magnitude).to(model_dtype)
    config = {"weights": {"channel_wise": by_channel}, "activations": {"symmetric": symmetric}}
    layer: Any = converted(model, x, dtype, config)[0]
    if halves:  # values that lie just between two integers, where half to even decides
        scale = layer.input_quantizer.scale
        x = ((torch.randint(-130, 130, shape) + 0.5) * scale).to(model_dtype)
    check(layer, x, dtype, by_channel)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-4, 1.0, 1e4, 1e9, 1e30])
def test_scale_and_reciprocal_are_neither_0_nor_infinite(dtype: torch.dtype, magnitude: float, symmetric: bool) -> None:
    config, x = {"activations": {"symmetric": symmetric}}, torch.tensor([[-1.0, 0.5, 0.25, 1.0]]) * magnitude
    layer: Any = converted(nn.Sequential(nn.Linear(4, 2)), x, dtype, config)[0]
    scale = layer.input_quantizer.scale
    reciprocal = torch.reciprocal(scale).to(dtype).float()
    for number in (scale, reciprocal):
        assert 0 < number < float("inf")
    assert scale == scale.to(dtype).float()
    offset = float(layer.input_quantizer.offset)
    assert -128 <= offset <= 127
    assert offset == (0 if symmetric else round(offset))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_zero_has_an_integer_also_if_all_values_are_of_one_sign(dtype: torch.dtype, sign: float) -> None:
    for step in range(1, 60):
        x = torch.tensor([[0.1, 1.0 + step / 64]]) * sign
        layer: Any = converted(nn.Sequential(nn.Linear(2, 2)), x, dtype)[0]
        zero = server.input_codes(np.zeros(1, server.DTYPES[dtype]), *served_factors(layer, dtype))
        assert zero == int(layer.input_quantizer.offset)


def served_factors(layer: Any, dtype: torch.dtype) -> tuple[Any, int]:
    upper, lower = (float(clip) for clip in layer.input_quantizer.usable_clips())
    return server.input_factors(upper, lower, dtype)


@models
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_what_is_saved_of_a_layer_is_what_its_forward_used(
    of_model: torch.dtype, dtype: torch.dtype, algo: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 700).to(of_model)
    qat = prepare_qat(
        nn.Sequential(nn.Linear(700, 6)).to(of_model),
        {"weights": {"algo": algo}},
        x,
        target=f"serving_{name_of(dtype)}",  # type: ignore[arg-type]
    ).train()
    optimizer = torch.optim.SGD(qat.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        qat(x).float().square().mean().backward()
        optimizer.step()
    layer: Any = quantized_layers(qat.eval())["0"]
    factors = serving_factors(layer)
    assert factors.dtype == dtype
    assert [t.dtype for t in factors[:6]] == [torch.float32] * 2 + [torch.int8] + [torch.float32] * 2 + [torch.int32]
    assert [t.shape for t in factors[:6]] == [(), (), (6, 700), (6,), (6,), (6,)]
    scale, offset = factors.input_scale.to(dtype), int(factors.input_offset)
    assert scale.float() == factors.input_scale
    codes = server.input_codes(server.array(x, dtype), server.array(scale, dtype), offset)
    weight = factors.weight.numpy().astype(np.int64)
    y = server.output(codes, weight, factors.quant_bias.numpy(), factors.deq_scale.numpy(), dtype)
    assert np.array_equal(server.array(layer(x)), y.astype(np.float32))
    assert np.array_equal(
        factors.deq_scale.numpy(), server.deq_scale(server.array(scale, dtype), factors.weight_scale.numpy())
    )


def test_one_scale_for_all_is_that_of_each_output() -> None:
    x = torch.randn(3, 4)
    layer: Any = converted(nn.Sequential(nn.Linear(4, 5)), x, torch.bfloat16, {"weights": {"channel_wise": False}})[0]
    factors = serving_factors(layer)
    assert factors.weight_scale.shape == factors.deq_scale.shape == (5,)
    assert len(set(factors.weight_scale.tolist())) == 1


def test_what_no_server_has_is_refused() -> None:
    x = torch.randn(3, 4)
    plain: Any = prepare_qat(nn.Sequential(nn.Linear(4, 5)), None, x)
    with pytest.raises(ValueError, match=r"QATLinear computes as no server does.*target='serving'"):
        serving_factors(plain[0])
    fresh: Any = prepare_qat(nn.Sequential(nn.Linear(4, 5)), None, x, target="serving")
    with pytest.raises(ValueError, match="not calibrated yet"):
        serving_factors(fresh[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_bias_that_32_bits_do_not_hold_is_cut_off_as_in_what_is_saved(dtype: torch.dtype, training: bool) -> None:
    x = torch.randn(3, 4)
    layer: Any = converted(nn.Sequential(nn.Linear(4, 3)), x, dtype)[0].train(training)
    with torch.no_grad():
        layer.weight[1].mul_(1e-4)
        layer.bias.copy_(torch.tensor([-0.3, 1e3, 0.4]))
        assert np.array_equal(server.array(layer(x)), served(layer, x, dtype)[1].astype(np.float32))
    with pytest.warns(UserWarning, match=r"The bias of 1 of 3 outputs of a QATLinear is too large for the 32 bits"):
        factors = serving_factors(layer)
    assert factors.quant_bias[1].abs() > 2**29


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_those_of_a_float_layer_on_the_values_that_the_integers_stand_for(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8, requires_grad=True)
    layer: Any = converted(nn.Sequential(nn.Linear(8, 5)), x.detach(), dtype)[0].train()
    upper, lower = layer.input_quantizer.usable_clips()
    grad = torch.randn(6, 5).to(dtype).float()
    layer(x).backward(grad)
    scale, offset = layer.input_quantizer.scale, layer.input_quantizer.offset
    reciprocal = torch.reciprocal(scale).to(dtype).float()
    codes = (torch.round(x.detach().to(dtype).float() * reciprocal) + offset).clamp(-128, 127) - offset
    scale_w = layer.weight_quantizer.scale[:, None]
    weight = torch.round(layer.weight.detach() / scale_w).clamp(-128, 127) * scale_w
    inside = ((x <= scale * (127 - offset)) & (x >= scale * (-128 - offset))).float()
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(layer.weight.grad, grad.t() @ (codes * scale), **close)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), **close)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (grad @ weight) * inside, **close)
    assert layer.input_quantizer.clip_max.grad is not None
    assert upper > lower


@models
def test_the_fused_training_step_is_the_one_taken_apart(of_model: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8).to(of_model)
    fused: Any = converted(nn.Sequential(nn.Linear(8, 5)).to(of_model), x, dtype).train()
    apart = copy.deepcopy(fused)
    apart[0].input_quantizer.register_forward_hook(lambda *_: None)  # whoever watches a quantizer has it called
    outputs = []
    for model in (fused, apart):
        y = model(x)
        y.float().square().mean().backward()
        outputs.append(y)
    assert torch.equal(*outputs)
    for (name, ours), theirs in zip(fused.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("autocast", HALVES)
@pytest.mark.parametrize("dtype", HALVES)
def test_within_autocast_the_server_s_dtype_is_kept(dtype: torch.dtype, autocast: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    layer: Any = converted(nn.Sequential(nn.Linear(8, 5)), x, dtype)[0]
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
        y = layer(x)
        trained = layer.train()(x)
    assert y.dtype == autocast
    expected = torch.from_numpy(served(layer, x, dtype)[1].astype(np.float32)).to(autocast)
    assert torch.equal(y, expected)
    assert torch.equal(trained, y)


@pytest.mark.parametrize("training", [False, True])
@models
def test_it_compiles_to_one_graph(of_model: torch.dtype, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8).to(of_model)
    model = converted(nn.Sequential(nn.Linear(8, 5)).to(of_model), x, dtype).train(training)
    expected = model(x)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)


@pytest.mark.usefixtures("every_execution")
def test_every_executor_trains_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    model: Any = prepare_qat(
        nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), None, x, target="serving"
    ).train()
    for _ in range(2):
        y = model(x)
        y.square().mean().backward()
    hidden = torch.relu(torch.from_numpy(served(model[0], x, torch.bfloat16)[1].astype(np.float32)))
    assert np.array_equal(server.array(y), served(model[2], hidden, torch.bfloat16)[1].astype(np.float32))


def test_frozen_copied_and_pickled_layers_compute_the_same() -> None:
    x = torch.randn(6, 8)
    model = converted(nn.Sequential(nn.Linear(8, 5)), x, torch.float16)
    y = model(x)
    model[0].input_quantizer.freeze()
    model[0].weight_quantizer.freeze(model[0].weight)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), y)
        assert torch.equal(other.train()(x), y)


def test_a_model_that_becomes_the_other_half_precision_is_refused() -> None:
    x = torch.randn(2, 4)
    model = converted(nn.Sequential(nn.Linear(4, 2)), x, torch.bfloat16)
    model.bfloat16()(x.bfloat16())
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=r"for servers in bfloat16 has weights of float16.*'serving_float16'"):
            model.half().train(mode)(x.half())


def test_a_reverted_layer_is_the_float_layer() -> None:
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 2))
    qat: Any = converted(model, x, torch.bfloat16)
    qat[0].revert()
    assert torch.equal(qat(x), model(x))


def test_layers_of_other_kinds_stay_as_they_are_beside_those_that_servers_compute() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).bfloat16()
    algorithms = {"0": {"algo": "per_token"}, "1": {"algo": "none"}, "2": {"symmetric": True}}
    config = {"layers": {name: {"activations": settings} for name, settings in algorithms.items()}}
    x = torch.randn(5, 8).bfloat16()
    model: Any = prepare_qat(net, config, x, target="serving").train()
    for _ in range(2):
        y = model(x)
        y.float().square().mean().backward()
    assert [layer.serving for layer in model] == [None, None, torch.bfloat16, torch.bfloat16]
    assert float(model[2].input_quantizer.offset) == 0
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), y)
        check(model[2], model[:2](x), torch.bfloat16)
        check(model[3], model[:3].eval()(x), torch.bfloat16)


@pytest.mark.filterwarnings("ignore:.*does not run as configured.*")
def test_what_is_wanted_though_no_server_has_it_computes_as_without_the_target() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(5, 4)
    config = {"weights": {"channel_wise": False}, "layers": {"0": {"weights": {"dst_type": "INT4"}}}}
    model: Any = prepare_qat(net, config, x, target="serving", on_unsupported="warn")
    plain: Any = prepare_qat(net, config, x)
    for one in (model, plain):
        calibrate(one.train(), [x])
    assert [layer.serving for layer in model] == [None, torch.bfloat16]
    assert torch.equal(model[0](x), plain[0](x))
