"""A small model of an LSTM or GRU, for the tests of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import calibrate, prepare_qat
from tests.modules.cases import WIDTHS, Width

KINDS = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
STEPS, BATCH, INPUTS, HIDDEN = 7, 3, 4, 38


class Net(nn.Module):
    """A recurrent layer of which outputs and last state are returned."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.layer = kind(INPUTS, HIDDEN, **settings)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, last = self.layer(x, state if len(state) > 1 else state[0] if state else None)
        return (y, *(last if isinstance(last, tuple) else (last,)))


def trained(kind: type[nn.RNNBase], x: Tensor, width: Width = WIDTHS[0], **settings: Any) -> Any:
    """A calibrated layer; some values of input and hidden state are outside of their ranges."""
    model = prepare_qat(Net(kind, **settings), width.config(), (x,)).train()
    calibrate(model, [x])
    model.train()
    with torch.no_grad():
        for quantizer in (model.layer.input_quantizer, model.layer.hidden_quantizer):
            quantizer.clip_max.mul_(0.7)
            quantizer.clip_min.mul_(0.6)
    return model


def initial(kind: type[nn.RNNBase], *shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, HIDDEN) * 0.5 for _ in range(2 if kind is nn.LSTM else 1))


def plain(model: Any, inputs: tuple[Tensor, ...], grads: Callable[[Tensor], Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The outputs, and the gradients of parameters and inputs."""
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    model.zero_grad()
    outputs = model(*inputs)
    torch.autograd.backward(outputs, [grads(y) for y in outputs])
    named = {name: p.grad.clone() for name, p in model.named_parameters()}
    return outputs, named | {str(number): t.grad for number, t in enumerate(inputs)}
