"""Layers on the device's grid against an int64 computation of what the contract says the device does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from amct_lightning import conversion_report, prepare_qat
from amct_lightning.conversion.convert import fold_norms, revert_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.modules import quantized_layers
from amct_lightning.modules.grid.codes import activation_codes
from amct_lightning.modules.grid.norm import FoldedNorm
from amct_lightning.quantizers import ActivationQuantizer
from tests.modules import reference
from tests.modules.cases import COMBINATIONS, LAYERS, Host, LayerCase, Width
from tests.operators import Operators

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class OnGrid:
    """A calibrated layer on the grid, what it was made from, and the same layer without the grid."""

    def __init__(self, case: LayerCase, width: Width) -> None:
        torch.manual_seed(0)
        self.case, self.width = case, width
        self.float_model, self.x = case.model(), case.input()
        self.model = prepare_qat(self.float_model, width.config(), self.x, deploy_grid=True).train()
        self.plain = prepare_qat(self.float_model, width.config(), self.x).train()
        for model in (self.model, self.plain):
            model(self.x)


@pytest.fixture(params=COMBINATIONS, ids=lambda combination: f"{combination[0].name}-{combination[1]}")
def qat(request: pytest.FixtureRequest) -> OnGrid:
    return OnGrid(*request.param)


@pytest.fixture(params=LAYERS, ids=lambda case: case.name)
def qat8(request: pytest.FixtureRequest) -> OnGrid:
    return OnGrid(request.param, Width())


# The device, from the contract; numpy and integers.


def clips_of(quantizer: Any) -> tuple[np.float32, np.float32]:
    upper, lower = quantizer.usable_clips()
    return np.float32(upper.item()), np.float32(lower.item())


def factors(quantizer: Any) -> tuple[np.float32, int]:
    """``s = (M - m) / (2^b - 1)`` and ``o = round(-h - m/s)``."""
    upper, lower = clips_of(quantizer)
    scale = (upper - lower) / np.float32(2**quantizer.num_bits - 1)
    return scale, int(np.round(np.float32(-(2 ** (quantizer.num_bits - 1))) - lower / scale))


def ascend_quant(x: np.ndarray, quantizer: Any) -> np.ndarray:
    """``clamp(round(x * float32(1/s)) + o) - o``."""
    scale, offset = factors(quantizer)
    h = 2 ** (quantizer.num_bits - 1)
    rounded = np.round(x.astype(np.float32) * (np.float32(1) / scale)).astype(np.int64)
    return np.clip(rounded + offset, -h, h - 1) - offset


def integer_weight(weight: np.ndarray, scale: np.ndarray, num_bits: int) -> np.ndarray:
    h = 2 ** (num_bits - 1)
    return np.clip(np.round(weight / scale), -h, h - 1).astype(np.int64)


def ascend_dequant(sums: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The int32 sums times the top 19 bits of the float32 scale."""
    assert np.abs(sums).max() < 2**31
    kept = (scale.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return sums.astype(np.int32).astype(np.float32) * kept


def spread_scale(layer: Any, quantizer: Any) -> Tensor:
    """The scales of a weight, shaped like it; one per output channel or a single one."""
    weight, scale = layer.weight, quantizer.scale.detach()
    if scale.numel() == 1:
        return scale.expand(weight.shape)
    if not reference.is_transposed(layer):
        return scale.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)
    rows = [s.view(1, -1, *[1] * (weight.dim() - 2)) for s in scale.chunk(layer.groups)]
    groups = weight.detach().chunk(layer.groups)
    return torch.cat([row.expand(group.shape) for row, group in zip(rows, groups, strict=True)])


def sums_of(layer: Any, codes: np.ndarray, weight: np.ndarray, call: dict[str, Any]) -> np.ndarray:
    """The layer's operation on integers; float64 holds them exactly, and nothing else is asked of torch."""
    bare = copy.copy(layer)
    bare.__dict__ = {**layer.__dict__, "_parameters": {**layer._parameters, "bias": None}}
    sums = reference.forward(bare, torch.from_numpy(codes).double(), torch.from_numpy(weight).double(), **call)
    return sums.numpy().astype(np.int64)


def deployed(qat: OnGrid, x: Tensor) -> np.ndarray:
    layer = qat.model.layer
    codes = ascend_quant(x.numpy(), layer.input_quantizer)
    scale_w = layer.weight_quantizer.scale.detach()
    spread = spread_scale(layer, layer.weight_quantizer).numpy()
    weight = integer_weight(layer.weight.detach().numpy(), spread, qat.width.weights if qat.case.int4 else 8)
    sums = sums_of(layer, codes, weight, qat.case.call)
    scale = scale_w.numpy() * factors(layer.input_quantizer)[0]
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (layer.weight.dim() - 2))
    if layer.bias is None:
        return ascend_dequant(sums, scale.reshape(shape))
    if isinstance(layer, nn.Linear) and x.dim() != 2:  # MatMul has no bias: a float Add follows it in the file
        return ascend_dequant(sums, scale.reshape(shape)) + layer.bias.detach().numpy()
    sums = sums + np.round(layer.bias.detach().numpy() / scale).astype(np.int64).reshape(shape)
    return ascend_dequant(sums, scale.reshape(shape))


def deployed_recurrent(qat: OnGrid, x: Tensor) -> Tensor:
    """Every product as above; what is no product is in float32."""
    layer = qat.model.layer
    sequence = x if qat.case.time_first else x.transpose(0, 1)

    def product(values: Tensor, quantizer: Any, which: str, weights: Any) -> Tensor:
        weight, scale_w = getattr(layer, f"weight_{which}_l0").detach().numpy(), weights.scale.detach().numpy()
        integers = integer_weight(weight, scale_w.reshape(-1, 1), qat.width.weights)
        scale = scale_w * factors(quantizer)[0]
        sums = ascend_quant(values.numpy(), quantizer) @ integers.T
        bias = getattr(layer, f"bias_{which}_l0", None)
        if bias is not None:
            sums = sums + np.round(bias.detach().numpy() / scale).astype(np.int64)
        return torch.from_numpy(ascend_dequant(sums, scale))

    h = c = torch.zeros(sequence.shape[1], layer.hidden_size)
    outputs = []
    for step in sequence:
        a = product(step, layer.input_quantizer, "ih", layer.weight_quantizer)
        b = product(h, layer.hidden_quantizer, "hh", layer.recurrent_weight_quantizer)
        if isinstance(layer, nn.LSTM):
            i, f, g, o = (a + b).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            codes = torch.from_numpy(ascend_quant(h.numpy(), layer.hidden_quantizer)).float()
            hq = codes * torch.tensor(factors(layer.hidden_quantizer)[0])
            (r, z, n), (r_h, z_h, n_h) = a.chunk(3, 1), b.chunk(3, 1)
            new = (n + (r + r_h).sigmoid() * n_h).tanh()
            h = new + (z + z_h).sigmoid() * (hq - new)
        outputs.append(h)
    y = torch.stack(outputs)
    return y if qat.case.time_first else y.transpose(0, 1)


@torch.no_grad()
def test_evaluation_gives_the_bits_of_the_device(qat: OnGrid) -> None:
    y = qat.model.eval()(qat.x)
    expected = deployed_recurrent(qat, qat.x) if qat.case.recurrent else torch.from_numpy(deployed(qat, qat.x))
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize("num_bits", [4, 8, 16])
def test_values_at_ties_are_rounded_as_the_device_rounds_them(num_bits: int) -> None:
    """Multiplying by the reciprocal falls on the other side of many ties than dividing, and the offset comes after."""
    differing = 0
    for upper, lower in ((1.7, -0.9), (2.55, -0.3), (0.123, -3.1), (5.0, -4.7)):
        quantizer = ActivationQuantizer(num_bits, clip=(upper, lower))
        scale, _ = factors(quantizer)
        ties = (np.arange(-300, 300).astype(np.float32) + np.float32(0.5)) * scale
        codes = activation_codes(quantizer, torch.from_numpy(ties), *quantizer.usable_clips()).values
        assert np.array_equal(codes.detach().numpy(), ascend_quant(ties, quantizer))
        differing += int((codes * torch.tensor(scale) != quantizer(torch.from_numpy(ties))).sum())
    assert differing > 0


@pytest.mark.parametrize("width", [Width(), Width(16, 8), Width(4, 4)], ids=str)
@torch.no_grad()
def test_sums_of_many_terms_are_exact(width: Width) -> None:
    """More terms than float32 adds exactly, all of one sign."""
    qat = OnGrid(LayerCase("wide", lambda: nn.Linear(2000, 3), (4, 2000)), width)
    qat.model.layer.weight.abs_()
    x = qat.x.abs() if width.activations < 16 else qat.x  # int32 would overflow
    torch.testing.assert_close(qat.model.eval()(x), torch.from_numpy(deployed(qat, x)), **EXACT)


def test_gradients_are_those_without_the_grid(qat8: OnGrid) -> None:
    """Exactly where nothing depends on a rounding of the output."""
    if qat8.case.recurrent:
        pytest.skip("the states of a recurrent layer depend on the products before")
    found = []
    for model in (qat8.model, qat8.plain):
        x = qat8.x.clone().requires_grad_()
        y = model(x)
        y.backward(torch.ones_like(y))
        found.append({"x": x.grad} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_gradients_in_evaluation_are_those_of_training(qat: OnGrid) -> None:
    found = []
    for training in (True, False):
        qat.model.train(training).zero_grad()
        qat.model(qat.x).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in qat.model.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_training_computes_what_evaluation_computes(qat: OnGrid) -> None:
    trained = qat.model(qat.x)
    torch.testing.assert_close(qat.model.eval()(qat.x), trained, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_read_on_the_host(qat8: OnGrid, training: bool) -> None:
    qat8.model.train(training)
    with Operators() as operators:
        qat8.model(qat8.x).square().mean().backward()
    assert operators.counts
    assert operators.host_reads == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same(qat8: OnGrid, duplicate: Any) -> None:
    twin = duplicate(qat8.model.eval())
    torch.testing.assert_close(twin(qat8.x), qat8.model(qat8.x), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_the_dtype_of_the_output_only(qat8: OnGrid, dtype: torch.dtype) -> None:
    expected = qat8.model(qat8.x)
    with torch.autocast("cpu", dtype=dtype):
        y = qat8.model(qat8.x)
    torch.testing.assert_close(y, expected.to(dtype), **EXACT)
    y.float().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in qat8.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_keeps_it(qat8: OnGrid, dtype: torch.dtype) -> None:
    qat8.model.to(dtype)
    assert qat8.model(qat8.x.to(dtype)).dtype == dtype
    assert qat8.model.eval()(qat8.x.to(dtype)).dtype == dtype


def test_the_grid_adds_nothing_to_the_state(qat8: OnGrid) -> None:
    assert qat8.model.state_dict().keys() == qat8.plain.state_dict().keys()
    qat8.model.load_state_dict(qat8.float_model.state_dict())
    qat8.plain.load_state_dict(qat8.model.state_dict())


def test_derivatives_of_functional_transforms_agree(qat8: OnGrid) -> None:
    model, x = qat8.model.eval(), qat8.x
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    of_values, of_x = grad(loss, argnums=(0, 1))(values, x)
    directions = {name: torch.randn_like(value) for name, value in values.items()}, torch.randn_like(x)
    _, pushed = jvp(loss, (values, x), directions)
    pulled = (of_x * directions[1]).sum() + sum((of_values[name] * directions[0][name]).sum() for name in values)
    torch.testing.assert_close(pushed, pulled, rtol=1e-4, atol=1e-3)


@pytest.fixture
def _allow_rnn() -> Iterator[None]:
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.mark.usefixtures("_allow_rnn")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["conv", "linear", "deconv", "gru"])
def test_it_compiles_to_one_graph(name: str, training: bool) -> None:
    qat = OnGrid(next(case for case in LAYERS if case.name == name), Width(algo="ulq_retrain"))
    qat.model.train(training)
    expected = qat.model(qat.x)
    torch._dynamo.reset()
    y = torch.compile(qat.model, fullgraph=True, backend="aot_eager")(qat.x)
    torch.testing.assert_close(y, expected, **CLOSE)


# With a BatchNorm.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False))
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu().mean((2, 3)))


IMAGES = (8, 4, 8, 8)


def trained(config: str = "INT8") -> tuple[nn.Module, Tensor]:
    """A network after some steps, so that its statistics and weights of BatchNorms are no round numbers."""
    torch.manual_seed(0)
    x, target = torch.randn(IMAGES), torch.randint(0, 3, (IMAGES[0],))
    model = prepare_qat(Net(), config, x, deploy_grid=True).train()
    losses = fit(model, x, target)
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        model.norm.weight[1] *= -1
    return model, x


def fit(model: nn.Module, x: Tensor, target: Tensor, steps: int = 20) -> list[float]:
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def folded_conv(layer: Any, norm: Any, x: Tensor) -> Tensor:
    """Conv and BatchNorm as the exported integers compute them."""
    gamma, beta = norm.weight.detach(), norm.bias.detach()
    factor = gamma * torch.rsqrt(norm.running_var + norm.eps)
    scale_w = layer.weight_quantizer.compute_scale(layer.weight).abs() * factor.abs()
    spread = scale_w.view(-1, 1, 1, 1).numpy()
    num_bits = layer.weight_quantizer.num_bits
    weight = integer_weight((layer.weight.detach() * factor.view(-1, 1, 1, 1)).numpy(), spread, num_bits)
    shifted = -norm.running_mean if layer.bias is None else layer.bias.detach() - norm.running_mean
    scale = scale_w.numpy() * factors(layer.input_quantizer)[0]
    bias = np.round((beta + shifted * factor).numpy() / scale).astype(np.int64)
    sums = sums_of(layer, ascend_quant(x.numpy(), layer.input_quantizer), weight, {}) + bias.reshape(-1, 1, 1)
    return torch.from_numpy(ascend_dequant(sums, scale.reshape(-1, 1, 1)))


@torch.no_grad()
def in_evaluation(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    names = ("body.0", "body.1", "body.3", "norm")
    hooks = [
        modules[n].register_forward_hook(lambda _m, a, y, n=n: outputs.update({n: y, f"{n}.input": a[0]}))
        for n in names
    ]
    outputs["y"] = model.eval()(x)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("config", ["INT8", "A4W4"])
def test_evaluation_computes_with_the_folded_integers(config: str, synced: bool) -> None:
    model, x = trained(config)
    if synced:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        fold_norms(*find_plan(model))
    seen = in_evaluation(model, x)
    for conv, name in (("body.0", "body.1"), ("body.3", "norm")):
        expected = folded_conv(model.get_submodule(conv), model.get_submodule(name), seen[f"{conv}.input"])
        torch.testing.assert_close(seen[conv], expected, **EXACT)
        torch.testing.assert_close(seen[name], expected, **EXACT)


def test_training_normalizes_with_the_statistics_of_the_batch() -> None:
    model, x = trained()
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda _m, _a, y: seen.append(y))
    model.train()(x)
    mean = seen[0].mean((0, 2, 3))
    torch.testing.assert_close(mean, model.norm.bias, rtol=1e-4, atol=1e-5)


def test_gradients_through_a_folded_batch_norm_are_those_without_the_grid() -> None:
    model, x = trained()
    plain = prepare_qat(Net(), None, x)
    plain.load_state_dict(model.state_dict())
    found = []
    for each in (model.eval(), plain.eval()):
        each.zero_grad()
        each.norm(each.body[3](x.repeat(1, 2, 1, 1)[:, :6])).sum().backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert {"norm.weight", "body.3.weight", "body.3.input_quantizer.clip_max"} <= found[0].keys()
    for name, expected in found[1].items():
        # That of a BatchNorm's weight depends on what the convolution gives, which has a scale of 19 bits.
        torch.testing.assert_close(found[0][name], expected, rtol=5e-3, atol=5e-3 * float(expected.abs().max()))


def test_a_layer_in_float_leaves_its_batch_norm_to_normalize() -> None:
    model, x = trained()
    model.eval()
    for layer in quantized_layers(model).values():
        layer.quant_mode = "float"  # type: ignore[assignment]
    float_model = Net()
    float_model.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    torch.testing.assert_close(model(x), float_model.eval()(x), **EXACT)


@torch.no_grad()
def test_an_evaluation_before_calibration_is_that_of_the_float_model() -> None:
    float_model, x = Net().eval(), torch.randn(IMAGES)
    model = prepare_qat(float_model, None, x, deploy_grid=True)
    with pytest.warns(UserWarning, match="run in float"):
        y = model(x)
    torch.testing.assert_close(y, float_model(x), **EXACT)


def test_a_frozen_batch_norm_in_training_normalizes_with_its_statistics() -> None:
    model, x = trained()
    model.train()
    for norm in (model.body[1], model.norm):
        norm.eval()
    model(x).sum().backward()
    frozen = model(x)
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.norm.parameters())
    torch.testing.assert_close(frozen, model.eval()(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_folds_its_own_batch_norm(duplicate: Any) -> None:
    model, x = trained()
    twin = duplicate(model)
    before = model.eval()(x)
    torch.testing.assert_close(twin.eval()(x), before, **EXACT)
    with torch.no_grad():
        twin.norm.bias.add_(1.0)
    torch.testing.assert_close(model(x), before, **EXACT)
    assert not torch.equal(twin(x), before)


def test_a_batch_norm_that_was_replaced_is_not_computed_twice() -> None:
    model, x = trained()
    old = model.norm  # kept alive
    before = model.eval()(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.warns(UserWarning, match="BatchNorm that belongs to a layer of deploy_grid=True was replaced"):
        y = synced(x)
    assert old is not synced.norm
    torch.testing.assert_close(y, before, rtol=0.05, atol=0.05)


def test_reverting_brings_the_float_model_back() -> None:
    model, x = trained()
    float_model = Net()
    float_model.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    revert_layers(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in float_model.modules()]
    assert repr(model) == repr(float_model)
    torch.testing.assert_close(model.eval()(x), float_model.eval()(x), **EXACT)


@pytest.mark.parametrize("part", ["body", "norm"])
def test_reverting_a_part_leaves_the_rest_as_it_computes(part: str) -> None:
    model, x = trained()
    before = model.eval()(x)
    revert_layers(model.get_submodule(part))
    assert not any(isinstance(module, FoldedNorm) for module in model.get_submodule(part).modules())
    torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.1)


def test_a_network_with_batch_norms_compiles_to_one_graph() -> None:
    model, x = trained()
    with torch.no_grad():
        expected = model.eval()(x)
        torch._dynamo.reset()
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected, **CLOSE)


def test_the_plan_keeps_the_choice_and_people_see_it() -> None:
    model, _ = trained()
    plan = find_plan(model)[1]
    assert QuantPlan.from_dict(plan.to_dict()) == plan
    assert plan.deploy_grid
    old = {key: value for key, value in plan.to_dict().items() if key != "deploy_grid"}
    assert not QuantPlan.from_dict(old).deploy_grid
    assert "deploy_grid=True" in str(conversion_report(model))
    assert "deploy_grid=True" in repr(model.head)
    assert "folded in evaluation" in repr(model.norm)


def test_float16_scales_of_the_record_are_refused_with_it() -> None:
    config = {"fakequant_precision_mode": "FORCE_FP16_QUANT"}
    with pytest.raises(ValueError, match=r"FORCE_FP16_QUANT.*deploy_grid=True"):
        prepare_qat(Host(nn.Linear(4, 2), {}), config, torch.ones(1, 4), deploy_grid=True)
