"""The time steps of a quantized LSTM or GRU as one autograd function with a backward of its own.

It keeps what a float loop keeps of its steps: states and gates. The quantized hidden states and the quantized weight
are rebuilt, of many steps at once, as are the gradients of the clips, for which a single step has no use.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amct_lightning.modules.recurrent.cells import Cell, State
from amct_lightning.modules.recurrent.factors import (
    ActivationFactors,
    WeightFactors,
    WeightSettings,
    rebuilt_weight,
    weight_gradients,
)
from amct_lightning.quantizers import ActivationQuantizer
from amct_lightning.quantizers.functions.activation import activation_gradients
from amct_lightning.quantizers.transforms import differentiable_once

BLOCK = 2**17
"""Elements of the hidden states of as many steps as backward looks at together: few enough to stay in a cache."""


class _Settings(NamedTuple):
    cell: Cell
    num_bits: int
    weight: WeightSettings
    recorded: bool


def run_loop(
    cell: Cell,
    gates: Tensor,
    state: State,
    quantizer: ActivationQuantizer,
    factors: ActivationFactors,
    weight: WeightFactors,
    bias: Tensor | None,
) -> tuple[Tensor, State]:
    """Run all steps from the products of their inputs.

    Args:
        cell: The cell.
        gates: The products, with the time first.
        state: The initial state, in the dtype of the products.
        quantizer: The quantizer of the hidden state.
        factors: How it is quantized.
        weight: The recurrent weight.
        bias: Its bias.

    Returns:
        The outputs of all steps, and the last state.
    """
    settings = _Settings(cell, quantizer.num_bits, weight.settings, torch.is_grad_enabled())
    learned = gates, *quantizer.learned_clips, weight.weight, weight.scale, bias
    steps, *last = _Loop.apply(*learned, *state, weight.quantized, *factors, settings)  # type: ignore[no-untyped-call]
    return steps, tuple(last)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        _max: Tensor,
        _min: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *state, quantized_weight, upper, lower, scale, offset, settings = rest
        factors = ActivationFactors(upper, lower, scale, offset)
        recurrent = quantized_weight.to(gates.dtype)  # autocast would do so in every step
        used_bias = None if bias is None else bias.to(gates.dtype)

        def multiply(h: Tensor) -> tuple[Tensor, Tensor]:
            h = factors.quantized(h, settings.num_bits)
            return F.linear(h, recurrent, used_bias), h

        kept: list[Tensor] = []
        keeps = settings.recorded and any(ctx.needs_input_grad)
        outputs, last = settings.cell.forward(gates, multiply, tuple(state), kept.extend if keeps else _forget)
        if keeps:
            ctx.save_for_backward(weight, weight_scale, *factors, *kept)
        ctx.settings, ctx.shape = settings, gates.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return (torch.stack(outputs), *last)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, of_steps: Tensor, *of_state: Tensor) -> tuple[Tensor | None, ...]:
        way = _WayBack(ctx)
        before = way.run(of_steps, of_state)
        of_weight = of_scale = None
        if way.of_weight is not None:
            learns = ctx.needs_input_grad[4]
            of_weight, of_scale = weight_gradients(*way.weight, ctx.settings.weight, way.of_weight, learns)
        of_bias = None if way.of_bias is None else way.of_bias.to(ctx.bias_dtype)
        learned = way.of_input.view(ctx.shape), way.of_max, way.of_min, of_weight, of_scale, of_bias
        return (*learned, *before, *[None] * 6)


def _forget(_kept: tuple[Tensor, ...]) -> None:
    """Let what backward would need be freed."""


class _WayBack:
    """One backward: block after block of steps, from the last to the first."""

    of_max: Tensor | None = None
    of_min: Tensor | None = None
    of_weight: Tensor | None = None
    of_bias: Tensor | None = None

    def __init__(self, ctx: Any) -> None:
        weight, scale, *saved = ctx.saved_tensors
        self.weight, self.factors, self.kept = (weight, scale), ActivationFactors(*saved[:4]), saved[4:]
        self.settings, self.needs, self.shape = ctx.settings, ctx.needs_input_grad, ctx.shape
        self.cell: Cell = self.settings.cell
        self.recurrent = rebuilt_weight(weight, scale, self.settings.weight).to(self.kept[0].dtype)
        h = self.kept[0]
        self.batched = batch, size = (1, *h.shape)[-2:]  # one sequence alone has no batch
        self.of_input = h.new_empty(self.shape[0], batch, self.shape[-1] // size, size)

    def run(self, of_steps: Tensor, of_state: State) -> State:
        """Go all the way, and return the gradients of the initial state."""
        h = self.kept[0]
        steps = of_steps.view(self.shape[0], *self.batched)
        grad, *rest = (part.view(self.batched) for part in of_state)
        others = tuple(rest)
        length = max(1, BLOCK // max(1, h.numel()))
        for stop in range(self.shape[0], 0, -length):
            start = max(0, stop - length)
            grad, others = self._block(slice(start, stop), steps[start:stop], grad, others)
        return tuple(part.view(h.shape) for part in (grad, *others))

    def _block(self, block: slice, of_steps: Tensor, grad: Tensor, others: State) -> tuple[Tensor, State]:
        count, num_bits = self.cell.kept, self.settings.num_bits
        first, last = block.start * count, block.stop * count
        kept = [torch.stack(self.kept[first + k : last : count]).view(of_steps.shape) for k in range(count)]
        quantized = self.factors.quantized(kept[0], num_bits)
        beyond = self.factors.beyond(kept[0], num_bits)
        slopes = self.cell.slopes(kept, quantized, self.of_input[block])
        of_quantized = []
        per_step = [tensor.unbind(0)[::-1] for tensor in (of_steps, beyond, *slopes)]
        for of_step, outside, *parts in zip(*per_step, strict=True):
            back, others = self.cell.backward(grad + of_step, others, self.recurrent, *parts)
            grad = torch.where(outside, 0.0, back)
            of_quantized.append(back)
        self.cell.finish(self.of_input[block], *slopes)
        self._add_clips(kept[0], torch.stack(of_quantized[::-1]))
        self._add_weight(slopes[0].flatten(0, 1), quantized.flatten(0, 1))
        return grad, others

    def _add_clips(self, h: Tensor, grad: Tensor) -> None:
        settings, needs = (self.settings.num_bits, torch.float32), (False, *self.needs[1:3])
        _, of_max, of_min = activation_gradients((h, *self.factors), settings, needs, grad)
        self.of_max, self.of_min = _plus(self.of_max, of_max), _plus(self.of_min, of_min)

    def _add_weight(self, of_product: Tensor, quantized: Tensor) -> None:
        if any(self.needs[3:5]):
            self.of_weight = _plus(self.of_weight, of_product.t() @ quantized)
        if self.needs[5]:
            self.of_bias = _plus(self.of_bias, of_product.sum(0))


def _plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part
