"""What autograd keeps for backward is what it keeps for the float layer, to the byte."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amct_lightning import RetrainConfig, prepare_qat
from tests.benchmarks.bench.facts import kept_bytes
from tests.modules.cases import LAYERS, Host, LayerCase, Width
from tests.modules.executors.cases import (
    EXECUTIONS,
    LEARNED,
    Step,
    calibrated,
    case_named,
    same,
)

SIMPLE = [case for case in LAYERS if not case.recurrent]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(20, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + nn.functional.gelu(self.second(x))
        return self.third(x)


class Cnn(nn.Module):
    """Two layers read one tensor, one in place ReLU, a depthwise layer, a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.right, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.left(x) + self.right(x)).mean((2, 3)))


NETS = [(Mlp, (6, 20)), (Cnn, (4, 3, 8, 8))]


def kept(model: nn.Module, x: Tensor) -> tuple[int, int]:
    return kept_bytes(lambda: model(x), [*model.parameters(), *model.buffers()])


def converted(net: nn.Module, x: Tensor, execution: Any) -> nn.Module:
    model = prepare_qat(net, RetrainConfig.default(net, x), x, execution=execution).train()
    model(x)
    return model


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("needs_grad", [False, True], ids=["data", "activations"])
@pytest.mark.parametrize("case", SIMPLE, ids=lambda case: case.name)
def test_a_layer_keeps_what_the_float_layer_keeps(case: LayerCase, needs_grad: bool, execution: str) -> None:
    model, x = calibrated(case, Width(), execution), case.input().requires_grad_(needs_grad)
    torch.manual_seed(0)
    assert kept(model, x) == kept(case.model(), x)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("needs_grad", [False, True], ids=["data", "activations"])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_of_layers_that_are_not_trained_they_keep_the_input_for_the_clips(
    name: str, needs_grad: bool, frozen: tuple[str, ...], execution: str
) -> None:
    case = case_named(name)
    model, x = calibrated(case, Width(), execution), case.input().requires_grad_(needs_grad)
    for layer in (model.layer, host := case.model()):
        for parameter in frozen:
            getattr(getattr(layer, "layer", layer), parameter).requires_grad_(False)
    assert kept(model, x)[0] <= max(kept(host, x)[0], x.untyped_storage().nbytes())


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize(("make", "shape"), NETS)
def test_a_net_keeps_what_the_float_net_keeps(make: Any, shape: Any, algo: str, execution: str) -> None:
    torch.manual_seed(0)
    net, x = make().train(), torch.randn(shape)
    model = prepare_qat(net, {"weights": {"algo": algo}}, x, execution=execution).train()
    model(x)
    assert kept(model, x) == kept(net, x)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_channels_last_and_bfloat16_keep_no_copies(execution: str) -> None:
    case = case_named("conv")
    x = case.input().to(memory_format=torch.channels_last)
    assert kept(calibrated(case, Width(), execution), x) == kept(case.model(), x)


@pytest.mark.parametrize("execution", ["composite", "compiled"])
def test_autocast_keeps_no_more_than_the_input_and_the_weight(execution: str) -> None:
    case = case_named("linear")
    model, x = calibrated(case, Width(), execution), case.input()
    with torch.autocast("cpu", torch.bfloat16):
        own, _ = kept(model, x)
    assert own <= x.numel() * 4  # the input as it is, which is another's, where the float layer keeps a rounded copy


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("make", "shape"), NETS)
def test_checkpointing_gives_the_same_gradients(make: Any, shape: Any, reentrant: bool, execution: str) -> None:
    torch.manual_seed(0)
    net, x = make().train(), torch.randn(shape)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    model = converted(net, x, execution)
    twin = copy.deepcopy(model)
    plain = Step.of(model, x)
    inner = twin.forward
    twin.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)  # type: ignore[method-assign]
    repeated = Step.of(twin, x)
    assert same(plain.output, repeated.output)
    assert plain.gradients.keys() == repeated.gradients.keys()
    assert all(same(gradient, repeated.gradients[name]) for name, gradient in plain.gradients.items())


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_checkpointed_layers_keep_what_checkpointed_float_layers_keep(name: str, execution: str) -> None:
    case = case_named(name)
    model, x = calibrated(case, LEARNED if name == "conv" else Width(), execution), case.input().requires_grad_()

    def of(host: Host) -> tuple[int, int]:
        own = [*host.parameters(), *host.buffers()]
        return kept_bytes(lambda: checkpoint(host, x, use_reentrant=False), own)

    assert of(model) == of(case.model())
