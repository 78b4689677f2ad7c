"""Training step of a quantized LSTM and GRU of 64 steps against a float loop over an unfused cell.

python -m tests.benchmarks.recurrent
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from amct_lightning import calibrate, prepare_qat
from tests.benchmarks.timing import medians

STEPS = 64


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


def main() -> None:
    """Print one line per layer and size."""
    for kind in (nn.LSTM, nn.GRU):
        for batch, inputs, hidden in ((16, 32, 64), (32, 64, 128), (64, 128, 256)):
            torch.manual_seed(0)
            x = torch.randn(STEPS, batch, inputs)
            quantized = prepare_qat(Host(kind, inputs, hidden), None, x).train()
            calibrate(quantized, [x])
            models = {"loop": FloatLoop(kind, inputs, hidden), "fused": Host(kind, inputs, hidden), "QAT": quantized}
            times = medians({name: training_step(model.train(), x) for name, model in models.items()})
            print(
                f"{kind.__name__} batch {batch} inputs {inputs} hidden {hidden}: float loop 1.00x "
                f"({1000 * times['loop']:.1f} ms), QAT {times['QAT'] / times['loop']:.2f}x, "
                f"torch's fused float layer {times['fused'] / times['loop']:.2f}x"
            )


if __name__ == "__main__":
    main()
