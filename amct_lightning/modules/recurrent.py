"""The QAT twins of LSTM and GRU: one layer, one direction, a loop over the time steps.

Input and hidden state have a quantizer each, as have the input and the recurrent weight. What does not depend on
the step before (the input, its product with the weight, both weights) is computed once for the whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer, WeightQuantizer

State = tuple[Tensor, ...]
"""The hidden state, for LSTM also the cell state; each (batch, hidden size)."""


class _QATRecurrent(QATLayer):
    activation_quantizers: ClassVar[tuple[str, ...]] = ("input_quantizer", "hidden_quantizer")
    weight_quantizers: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"weight_quantizer": "weight_ih_l0", "recurrent_weight_quantizer": "weight_hh_l0"}
    )

    keeps_input: ClassVar[bool] = False

    hidden_quantizer: ActivationQuantizer
    recurrent_weight_quantizer: WeightQuantizer
    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    batch_first: bool
    hidden_size: int
    check_forward_args: Any

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        """Run the layer on fake-quantized input, hidden states and weights.

        Args:
            input: Sequence (time, batch, features), batch first if the layer says so, or (time, features).
            hx: Initial state as the float layer takes it; ``None`` for zeros.

        Returns:
            The outputs of all steps and the last state, in the float layer's shapes.

        Raises:
            ValueError: If the input is a packed sequence.
        """
        if isinstance(input, PackedSequence):
            raise ValueError(
                f"A quantized {type(self).__name__} got a PackedSequence, which the hardware cannot run. Give the "
                "padded tensor (pad_packed_sequence) and mask the outputs, or set retrain_enable to false for it."
            )
        batched = input.dim() == 3
        time_axis = 1 if self.batch_first and batched else 0
        if self.runs_in_float:
            if self.quant_mode == "observe" and self.hidden_quantizer.calibrating:
                self._ranges(input, hx, self._initial_state(input, hx, batched)[0], time_axis)
            output, last = self.float_forward(input, hx)
            return self.keep_in_graph(output), last
        state = self._initial_state(input, hx, batched)
        input_range, hidden_range = self._ranges(input, hx, state[0], time_axis)
        x = self.input_quantizer.quantize(self.kept(input, self.weight_ih_l0), *input_range)
        steps, state = self._loop(x.movedim(time_axis, 0), state, hidden_range)
        if self.hidden_quantizer.learns:
            self.hidden_quantizer.watch(steps)
        last = tuple(part.unsqueeze(0) for part in state)
        return steps.movedim(0, time_axis), last if len(last) > 1 else last[0]

    def _initial_state(self, input: Tensor, hx: Any, batched: bool) -> State:
        """Return the initial state without its layer axis, checked as the float layer checks it."""
        if hx is None:
            batch = (input.shape[0 if self.batch_first else 1],) if batched else ()
            zeros = input.new_zeros(*batch, self.hidden_size)
            return (zeros, zeros) if isinstance(self, nn.LSTM) else (zeros,)
        parts: State = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        full = [part if batched else part.unsqueeze(1) for part in parts]
        whole = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        self.check_forward_args(whole, full if len(full) > 1 else full[0], None)
        return tuple(part.squeeze(0) for part in parts)

    def _ranges(self, input: Tensor, hx: Any, h: Tensor, time_axis: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the clips of hidden state and input, calibrated on them where that is due."""
        hidden_range = self._hidden_range(input, hx, h, time_axis)
        return self.input_quantizer.update_range(input, self.calibrates_input, input[:1]), hidden_range

    def _hidden_range(self, input: Tensor, hx: Any, h: Tensor, time_axis: int) -> tuple[Tensor, Tensor]:
        if not (self.hidden_quantizer.calibrating and self.hidden_quantizer.learns):
            return self.hidden_quantizer.update_range(h)
        with torch.no_grad():
            steps = self.float_forward(input, hx)[0].movedim(time_axis, 0)
        states = torch.cat((h.detach().unsqueeze(0), steps[:-1]))
        return self.hidden_quantizer.update_range(states, preview=states[:1])

    def _loop(self, x: Tensor, state: State, hidden_range: tuple[Tensor, Tensor]) -> tuple[Tensor, State]:
        weight = self.weight_quantizer(self.weight_ih_l0)
        recurrent = self.recurrent_weight_quantizer(self.weight_hh_l0)
        gates = F.linear(x, weight, getattr(self, "bias_ih_l0", None))
        state = tuple(part.to(gates.dtype) for part in state)
        outputs = []
        for step in gates.unbind(0):
            h = self.hidden_quantizer.quantize(state[0], *hidden_range)
            state = self._cell(step, F.linear(h, recurrent, getattr(self, "bias_hh_l0", None)), h, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def _cell(self, input_gates: Tensor, hidden_gates: Tensor, h: Tensor, state: State) -> State:
        """One step: from the products with the two weights and the quantized hidden state to the next state."""
        raise TypeError(f"{type(self).__name__} is not a complete QAT layer: it defines no _cell().")


class QATLSTM(_QATRecurrent, nn.LSTM):  # type: ignore[misc]
    """Quantized twin of :class:`torch.nn.LSTM`; the cell state is not quantized."""

    def _cell(self, input_gates: Tensor, hidden_gates: Tensor, h: Tensor, state: State) -> State:
        i, f, g, o = (input_gates + hidden_gates).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class QATGRU(_QATRecurrent, nn.GRU):  # type: ignore[misc]
    """Quantized twin of :class:`torch.nn.GRU`."""

    def _cell(self, input_gates: Tensor, hidden_gates: Tensor, h: Tensor, state: State) -> State:
        r, z, n = input_gates.chunk(3, -1)
        r_h, z_h, n_h = hidden_gates.chunk(3, -1)
        new = (n + (r + r_h).sigmoid() * n_h).tanh()
        return (new + (z + z_h).sigmoid() * (h - new),)
