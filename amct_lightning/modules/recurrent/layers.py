"""The QAT twins of LSTM and GRU: one layer, one direction, a loop over the time steps.

Input and hidden state have a quantizer each, as have the input and the recurrent weight. What does not depend on
the step before (the input, its product with the weight, both weights) is computed once for the whole sequence.

The loop stands here in plain operators, for all that look into it: exporters, compilers, ``torch.func`` transforms,
the deploy grid. A training step takes it from ``loop.py``, to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from amct_lightning.modules.grid.codes import activation_codes, weight_codes
from amct_lightning.modules.grid.sums import integer_product, output_dtype
from amct_lightning.modules.layers import QATLayer
from amct_lightning.modules.recurrent.cells import Cell, GRUCell, LSTMCell, Multiply, State
from amct_lightning.modules.recurrent.factors import ActivationFactors, WeightFactors
from amct_lightning.modules.recurrent.loop import run_loop
from amct_lightning.modules.recurrent.projection import project
from amct_lightning.quantizers import ActivationQuantizer, WeightQuantizer, is_exporting
from amct_lightning.quantizers.transforms import transforming

Range = tuple[Tensor, Tensor]
"""Upper and lower clip."""


class _QATRecurrent(QATLayer):
    activation_quantizers: ClassVar[tuple[str, ...]] = ("input_quantizer", "hidden_quantizer")
    weight_quantizers: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"weight_quantizer": "weight_ih_l0", "recurrent_weight_quantizer": "weight_hh_l0"}
    )

    keeps_input: ClassVar[bool] = False
    cell: ClassVar[Cell]

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
        run = self._run_on_grid if self.on_grid else self._run
        steps, state = run(self.kept(input, self.weight_ih_l0), time_axis, state, input_range, hidden_range)
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

    def _ranges(self, input: Tensor, hx: Any, h: Tensor, time_axis: int) -> tuple[Range, ...]:
        """Return the clips of hidden state and input, calibrated on them where that is due."""
        hidden_range = self._hidden_range(input, hx, h, time_axis)
        return self.input_quantizer.update_range(input, self.calibrates_input, input[:1]), hidden_range

    def _hidden_range(self, input: Tensor, hx: Any, h: Tensor, time_axis: int) -> Range:
        if not (self.hidden_quantizer.calibrating and self.hidden_quantizer.learns):
            return self.hidden_quantizer.update_range(h)
        with torch.no_grad():
            steps = self.float_forward(input, hx)[0].movedim(time_axis, 0)
        states = torch.cat((h.detach().unsqueeze(0), steps[:-1]))
        return self.hidden_quantizer.update_range(states, preview=states[:1])

    def _run(
        self, x: Tensor, time_axis: int, state: State, input_range: Range, hidden_range: Range
    ) -> tuple[Tensor, State]:
        """Run all steps, by autograd functions that keep and do little."""
        if self._is_looked_into():
            return self._run_in_parts(x, time_axis, state, input_range, hidden_range)
        factors = ActivationFactors.of(self.input_quantizer, *input_range)
        weight = WeightFactors.of(self.weight_quantizer, self.weight_ih_l0)
        bias = getattr(self, "bias_ih_l0", None)
        gates = project(x, self.input_quantizer, factors, weight, bias, time_axis)
        factors = ActivationFactors.of(self.hidden_quantizer, *hidden_range)
        weight = WeightFactors.of(self.recurrent_weight_quantizer, self.weight_hh_l0)
        bias, state = getattr(self, "bias_hh_l0", None), tuple(part.to(gates.dtype) for part in state)
        return run_loop(self.cell, gates, state, self.hidden_quantizer, factors, weight, bias)

    def _is_looked_into(self) -> bool:
        """Tell whether somebody has to see the operators, or a quantizer has a ``quantize()`` that is not the usual."""
        if torch.compiler.is_compiling() or transforming() or is_exporting():
            return True
        quantizers = self.input_quantizer, self.hidden_quantizer
        return any(getattr(q.quantize, "__func__", None) is not ActivationQuantizer.quantize for q in quantizers)

    def _run_in_parts(
        self, x: Tensor, time_axis: int, state: State, input_range: Range, hidden_range: Range
    ) -> tuple[Tensor, State]:
        """Like :meth:`_run`, by operators that exporters, compilers and ``torch.func`` transforms can look into."""
        x = self.input_quantizer.quantize(x, *input_range).movedim(time_axis, 0)
        weight = self.weight_quantizer(self.weight_ih_l0)
        recurrent = self.recurrent_weight_quantizer(self.weight_hh_l0)
        bias = getattr(self, "bias_hh_l0", None)

        def multiply(h: Tensor) -> tuple[Tensor, Tensor]:
            h = self.hidden_quantizer.quantize(h, *hidden_range)
            return F.linear(h, recurrent, bias), h

        gates = F.linear(x, weight, getattr(self, "bias_ih_l0", None))
        return self._loop(gates, tuple(part.to(gates.dtype) for part in state), multiply)

    def _run_on_grid(
        self, x: Tensor, time_axis: int, state: State, input_range: Range, hidden_range: Range
    ) -> tuple[Tensor, State]:
        """Like :meth:`_run`, with what the device computes with; what is no product is in float32."""
        exact, dtype = not self.training, output_dtype(x)
        codes = activation_codes(self.input_quantizer, x.movedim(time_axis, 0), *input_range)
        weight = weight_codes(self.weight_quantizer, self.weight_ih_l0)
        recurrent = weight_codes(self.recurrent_weight_quantizer, self.weight_hh_l0)
        bias = getattr(self, "bias_hh_l0", None)

        def multiply(h: Tensor) -> tuple[Tensor, Tensor]:
            codes = activation_codes(self.hidden_quantizer, h, *hidden_range)
            gates = integer_product(F.linear, codes, recurrent, bias, self.hidden_size, exact)
            return gates, codes.values * codes.scale.detach()  # which leaves out its forward derivative, too

        bias_ih = getattr(self, "bias_ih_l0", None)
        gates = integer_product(F.linear, codes, weight, bias_ih, self.weight_ih_l0.shape[1], exact)
        steps, state = self._loop(gates, tuple(part.float() for part in state), multiply)
        return steps.to(dtype), tuple(part.to(dtype) for part in state)

    def _loop(self, gates: Tensor, state: State, multiply: Multiply) -> tuple[Tensor, State]:
        outputs = []
        for step in gates.unbind(0):
            hidden_gates, h = multiply(state[0])
            state = self._cell(step, hidden_gates, h, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def _cell(self, input_gates: Tensor, hidden_gates: Tensor, h: Tensor, state: State) -> State:
        """One step: from the products with the two weights and the quantized hidden state to the next state."""
        raise TypeError(f"{type(self).__name__} is not a complete QAT layer: it defines no _cell().")


class QATLSTM(_QATRecurrent, nn.LSTM):  # type: ignore[misc]
    """Quantized twin of :class:`torch.nn.LSTM`; the cell state is not quantized."""

    cell: ClassVar[Cell] = LSTMCell()

    def _cell(self, input_gates: Tensor, hidden_gates: Tensor, h: Tensor, state: State) -> State:
        i, f, g, o = (input_gates + hidden_gates).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class QATGRU(_QATRecurrent, nn.GRU):  # type: ignore[misc]
    """Quantized twin of :class:`torch.nn.GRU`."""

    cell: ClassVar[Cell] = GRUCell()

    def _cell(self, input_gates: Tensor, hidden_gates: Tensor, h: Tensor, state: State) -> State:
        r, z, n = input_gates.chunk(3, -1)
        r_h, z_h, n_h = hidden_gates.chunk(3, -1)
        new = (n + (r + r_h).sigmoid() * n_h).tanh()
        return (new + (z + z_h).sigmoid() * (h - new),)
