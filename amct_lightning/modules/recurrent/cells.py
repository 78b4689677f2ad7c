"""The cells of LSTM and GRU with their gradients written by hand: what is kept of a step, and what becomes of it.

A gradient of a step is that of its state times slopes that depend on nothing later. So the slopes of many steps are
computed at once, before a loop in which little is left to do. A forward has the operators of ``_cell()`` of the layers,
on tensors of the same shapes, and so gives the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""The hidden state, for LSTM also the cell state; each (batch, hidden size)."""

Multiply = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the hidden state to its product with the recurrent weight, and the quantized hidden state."""

Keep = Callable[[tuple[Tensor, ...]], object]
"""Takes what backward needs of a step."""

_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class Cell(ABC):
    """A cell; it has no state of its own.

    Attributes:
        kept: How many tensors backward needs of a step. The first of them is the hidden state before it.
    """

    kept: ClassVar[int]

    @abstractmethod
    def forward(self, gates: Tensor, multiply: Multiply, state: State, keep: Keep) -> tuple[list[Tensor], State]:
        """Run all steps.

        Args:
            gates: The products with the input weight, (time, batch, gates * hidden size).
            multiply: What gives those with the recurrent weight.
            state: The initial state.
            keep: What takes what backward needs, in each step.

        Returns:
            The outputs of the steps, and the last state.
        """

    @abstractmethod
    def slopes(self, kept: Sequence[Tensor], quantized: Tensor, of_input: Tensor) -> tuple[Tensor, ...]:
        """Compute what the gradients of a few steps are multiplied by.

        Args:
            kept: What backward needs, each (steps, batch, hidden size).
            quantized: The quantized hidden states.
            of_input: Where the gradients of the products with the input weight come to stand in the end, (steps, batch,
                gates, hidden size). Their slopes may be written there.

        Returns:
            A piece for each step along the first axis: the slopes of the products with the recurrent weight, (steps,
            batch, gates * hidden size), and what else :meth:`backward` needs.
        """

    @abstractmethod
    def backward(self, grad: Tensor, others: State, weight: Tensor, *slopes: Tensor) -> tuple[Tensor, State]:
        """Go back through a step, and turn the slopes of its products into their gradients.

        Args:
            grad: Gradient of its output.
            others: Gradients of the other states after it.
            weight: The quantized recurrent weight.
            slopes: A piece of each tensor that :meth:`slopes` gave.

        Returns:
            The gradients of the quantized hidden state and of the other states before it.
        """

    @abstractmethod
    def finish(self, of_input: Tensor, *slopes: Tensor) -> None:
        """Write the gradients of the products with the input weight where they are not yet.

        Args:
            of_input: Where they come to stand.
            slopes: What :meth:`slopes` gave, after :meth:`backward` of all of its steps.
        """


class LSTMCell(Cell):
    """The cell of an LSTM; it keeps hidden state, cell state, the four gates and the tanh of the new cell state."""

    kept = 7

    def forward(self, gates: Tensor, multiply: Multiply, state: State, keep: Keep) -> tuple[list[Tensor], State]:
        """Run all steps."""
        h, c = state
        outputs = []
        total = torch.empty_like(gates[0])
        i_sum, f_sum, g_sum, o_sum = total.chunk(4, -1)
        for step in gates.unbind(0):
            torch.add(step, multiply(h)[0], out=total)
            i, f, g, o = i_sum.sigmoid(), f_sum.sigmoid(), g_sum.tanh(), o_sum.sigmoid()
            new = (f * c).add_(i * g)
            squashed = new.tanh()
            keep((h, c, i, f, g, o, squashed))
            h, c = o * squashed, new
            outputs.append(h)
        return outputs, (h, c)

    def slopes(self, kept: Sequence[Tensor], quantized: Tensor, of_input: Tensor) -> tuple[Tensor, ...]:
        """Compute what the gradients of a few steps are multiplied by: those of both products are the same."""
        _, c, i, f, g, o, squashed = kept
        of_gates = (
            _sigmoid_backward(g, i),
            _sigmoid_backward(c, f),
            _tanh_backward(i, g),
            _sigmoid_backward(squashed, o),
        )
        torch.stack(of_gates, 2, out=of_input)
        return of_input.flatten(2), of_input[:, :, :3], of_input[:, :, 3], _tanh_backward(o, squashed), f

    def backward(self, grad: Tensor, others: State, weight: Tensor, *slopes: Tensor) -> tuple[Tensor, State]:
        """Go back through a step."""
        of_product, of_ifg, of_o, of_cell, f = slopes
        of_c = torch.addcmul(others[0], grad, of_cell)
        of_ifg.mul_(of_c.unsqueeze(1))
        of_o.mul_(grad)
        return of_product @ weight, (of_c.mul_(f),)

    def finish(self, of_input: Tensor, *slopes: Tensor) -> None:
        """Do nothing: they are there."""


class GRUCell(Cell):
    """The cell of a GRU; it keeps hidden state, both gates, the new state and its part of the recurrent product.

    That part has a gradient of its own, which comes after those of both gates and before that of the new state.
    """

    kept = 5

    def forward(self, gates: Tensor, multiply: Multiply, state: State, keep: Keep) -> tuple[list[Tensor], State]:
        """Run all steps."""
        (h,) = state
        outputs = []
        for step in gates.unbind(0):
            product, h_quantized = multiply(h)
            r_in, z_in, n_in = step.chunk(3, -1)
            r_h, z_h, n_h = product.chunk(3, -1)
            r, z = (r_in + r_h).sigmoid(), (z_in + z_h).sigmoid()
            n_h = n_h.clone()  # which lets go of the part of the product that backward does not need
            new = (r * n_h).add_(n_in).tanh()
            keep((h, r, z, new, n_h))
            h = (h_quantized - new).mul_(z).add_(new)
            outputs.append(h)
        return outputs, (h,)

    def slopes(self, kept: Sequence[Tensor], quantized: Tensor, of_input: Tensor) -> tuple[Tensor, ...]:
        """Compute what the gradients of a few steps are multiplied by."""
        _, r, z, new, n_h = kept
        of_n = _tanh_backward(1 - z, new)
        of_gates = _sigmoid_backward(n_h, r).mul_(of_n), _sigmoid_backward(quantized - new, z), of_n * r, of_n
        slopes = torch.stack(of_gates, 2)
        return slopes[:, :, :3].flatten(2), slopes, z

    def backward(self, grad: Tensor, others: State, weight: Tensor, *slopes: Tensor) -> tuple[Tensor, State]:
        """Go back through a step."""
        of_product, of_gates, z = slopes
        of_gates.mul_(grad.unsqueeze(1))
        return (of_product @ weight).addcmul_(grad, z), others

    def finish(self, of_input: Tensor, *slopes: Tensor) -> None:
        """Take over those of both gates and of the new state."""
        of_input[:, :, :2].copy_(slopes[1][:, :, :2])
        of_input[:, :, 2].copy_(slopes[1][:, :, 3])
