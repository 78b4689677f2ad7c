"""Observing a model changes nothing: not its state, not its modes, not the random generators."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import prepare_qat, quantized_layers
from amct_lightning.conversion.make_plan import make_plan


class Noisy(nn.Module):
    """Draws random numbers, keeps statistics, and writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn_like(x) * random.random() * np.random.rand()
        return self.drop(self.bn(self.conv(x + noise)))


class BrokenInside(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise KeyError("mask")


@pytest.fixture(params=[Noisy, BrokenInside])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A model that works, and one that fails half way; both are left as they were."""
    return request.param()


@pytest.fixture
def observe(model: nn.Module) -> Callable[[], None]:
    def run() -> None:
        if isinstance(model, BrokenInside):
            with pytest.raises(RuntimeError):
                make_plan(model, None, torch.randn(2, 2, 5, 5, generator=torch.Generator()))
        else:
            make_plan(model, None, torch.randn(2, 2, 5, 5, generator=torch.Generator()))

    return run


def test_the_random_generators(observe: Callable[[], None]) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    observe()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_the_buffers_and_their_objects(model: nn.Module, observe: Callable[[], None]) -> None:
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    observe()
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])


def test_the_training_flags_of_every_module(model: nn.Module, observe: Callable[[], None]) -> None:
    model.train()
    model.bn.eval()
    before = [module.training for module in model.modules()]
    observe()
    assert [module.training for module in model.modules()] == before


def test_the_hooks(model: nn.Module, observe: Callable[[], None]) -> None:
    def hooks() -> list[int]:
        return [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ]

    before = hooks()
    observe()
    assert hooks() == before


def test_gradients_and_grad_mode(model: nn.Module, observe: Callable[[], None]) -> None:
    observe()
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_input_is_not_changed() -> None:
    x = torch.randn(2, 2, 5, 5)
    before = x.clone()
    make_plan(Noisy(), None, x)
    assert torch.equal(x, before)


def test_an_error_of_the_model_keeps_its_cause_and_gets_context() -> None:
    with pytest.raises(RuntimeError, match=r"BrokenInside failed on the given input_data") as caught:
        make_plan(BrokenInside(), None, torch.randn(2, 2, 5, 5))
    assert isinstance(caught.value.__cause__, KeyError)
    assert "(2, 2, 5, 5) torch.float32" in str(caught.value)
    assert "tensor, a tuple of positional arguments or a dict" in str(caught.value)


def test_input_of_the_wrong_shape_shows_the_model_s_own_error() -> None:
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied"):
        make_plan(nn.Sequential(nn.Linear(4, 2)), None, torch.randn(1, 3))


class TestTransformerEncoder:
    """Torch's fused evaluation path hides the layers of an encoder; it must not hide them from us."""

    @pytest.fixture
    def encoder(self) -> Any:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 1).eval()

    def test_its_layers_are_found_in_eval_mode(self, encoder: Any) -> None:
        plan = make_plan(encoder, None, torch.randn(2, 3, 8))
        assert {"layers.0.linear1", "layers.0.linear2"} <= {layer.name for layer in plan.layers}

    def test_the_fast_path_setting_is_put_back(self, encoder: Any) -> None:
        make_plan(encoder, None, torch.randn(2, 3, 8))
        assert torch.backends.mha.get_fastpath_enabled()

    def test_evaluation_after_training_is_quantized(self, encoder: Any) -> None:
        x = torch.randn(2, 3, 8)
        converted = prepare_qat(encoder, None, x).train()
        converted(x)
        converted.eval()
        with torch.no_grad():
            called: list[str] = []
            for name, layer in quantized_layers(converted).items():
                layer.register_forward_hook(lambda *_, name=name: called.append(name))
            y = converted(x)
        assert called == list(quantized_layers(converted))
        assert not torch.allclose(y, encoder(x), rtol=0, atol=1e-6)
