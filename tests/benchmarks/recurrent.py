"""Training step of a quantized LSTM and GRU of 64 steps against a float loop over an unfused cell.

python -m tests.benchmarks.recurrent
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from amct_lightning import calibrate, prepare_qat
from tests.operators import Operators, saved_bytes

STEPS = 64
ROUNDS = 21


class FloatLoop(nn.Module):
    """The float cell, written out and called step by step."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden
        gates = 4 if kind is nn.LSTM else 3
        self.w, self.r = nn.Linear(inputs, gates * hidden), nn.Linear(hidden, gates * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all steps."""
        h = c = x.new_zeros(x.shape[1], self.hidden)
        outputs = []
        for step in x:
            a, b = self.w(step), self.r(h)
            if self.kind is nn.LSTM:
                i, f, g, o = (a + b).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                new = (an + (ar + br).sigmoid() * bn).tanh()
                h = new + (az + bz).sigmoid() * (h - new)
            outputs.append(h)
        return torch.stack(outputs)


class Products(nn.Module):
    """The products of a loop alone, forward and backward: what no loop can do without."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int) -> None:
        super().__init__()
        gates = 4 if kind is nn.LSTM else 3
        self.w, self.r = nn.Linear(inputs, gates * hidden), nn.Linear(hidden, gates * hidden)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Multiply as often as a step of training does, and give what has a gradient."""
        gates = self.w(x)
        h = x.new_zeros(x.shape[1], self.r.in_features)
        for _ in x:
            step = self.r(h)
        for _ in x:
            step @ self.r.weight
        flat = gates.flatten(0, 1)
        flat.t() @ x.flatten(0, 1)
        flat @ self.w.weight
        flat.t() @ flat[:, : self.r.in_features]
        return torch.ones(1, requires_grad=True)


class Host(nn.Module):
    """A model of one recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn = kind(inputs, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all steps."""
        return self.rnn(x)[0]


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return forward and backward of a model."""
    return lambda: model(x).square().mean().backward()


def ratios(steps: Mapping[str, Callable[[], None]]) -> dict[str, str]:
    """Return median and quartiles of the processor time of each step by that of the first; the steps take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 2):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if number >= 2:
                times[name].append(time.process_time() - begin)
    base = next(iter(times.values()))
    found = {"": f"{1000 * median(base):.1f} ms"}
    for name, values in times.items():
        low, middle, high = quantiles([value / of for value, of in zip(values, base, strict=True)], n=4)
        found[name] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return found


def operators_per_step(step: Callable[[Tensor], Callable[[], None]], x: Tensor) -> float:
    """Return how many operators a time step adds to forward and backward."""
    counts = []
    for length in (STEPS // 2, STEPS):
        with Operators() as operators:
            step(x[:length])()
        counts.append(sum(operators.counts.values()))
    return (counts[1] - counts[0]) / (STEPS // 2)


def main() -> None:
    """Print one line per layer and size."""
    torch.set_num_threads(1)
    for kind in (nn.LSTM, nn.GRU):
        for batch, inputs, hidden in ((16, 32, 64), (32, 64, 128), (64, 128, 256)):
            torch.manual_seed(0)
            x = torch.randn(STEPS, batch, inputs)
            quantized = prepare_qat(Host(kind, inputs, hidden), None, x).train()
            calibrate(quantized, [x])
            x.requires_grad_()  # as behind another layer; the quantized one goes back that far in any case
            models = {"loop": FloatLoop(kind, inputs, hidden), "QAT": quantized.train()}
            others = {"fused": Host(kind, inputs, hidden), "products": Products(kind, inputs, hidden)}
            steps = {name: training_step(model, x) for name, model in (models | others).items()}
            found = ratios(steps)
            counts = [operators_per_step(partial(training_step, model), x) for model in models.values()]
            kept = [saved_bytes(partial(model, x)) for model in models.values()]
            print(
                f"{kind.__name__} batch {batch} inputs {inputs} hidden {hidden}: float loop {found['']}, QAT "
                f"{found['QAT']}, torch's fused float layer {found['fused']}, products alone {found['products']}; "
                f"operators per time step {counts[0]:.0f}, QAT {counts[1]:.0f}; bytes kept {kept[0]}, QAT {kept[1]}, "
                f"{kept[1] / kept[0]:.4f}"
            )


if __name__ == "__main__":
    main()
