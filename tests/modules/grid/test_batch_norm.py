"""Layers on the device's grid whose BatchNorm is folded in evaluation, and networks of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import conversion_report, prepare_qat
from amct_lightning.conversion.convert import fold_norms, revert_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.modules import quantized_layers
from amct_lightning.modules.grid.norm import FoldedNorm
from tests.modules.cases import Host
from tests.modules.grid.conftest import (
    CLOSE,
    EXACT,
    ascend_dequant,
    ascend_quant,
    factors,
    integer_weight,
    sums_of,
)


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
