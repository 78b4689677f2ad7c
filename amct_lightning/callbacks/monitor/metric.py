"""How well tensors are quantized, in sums that add up over batches and processes: a torchmetrics Metric."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from amct_lightning.quantizers import ActivationQuantizer
from amct_lightning.quantizers.functional import dequantize_, half_range, quantize

SUMS = ("elements", "below", "above", "signal", "noise")
"""What is summed up per layer: elements, those below and above the range, squares of values and of their errors."""


class QuantStatistics(Metric):
    """Statistics of quantized activations, one row per layer, kept on the device.

    All layers are in one metric, so that the processes of a training exchange them in three gathers, however many
    layers there are and whichever of them ran in a process. Nothing is read on the host.

    Args:
        layers: Number of layers.

    Attributes:
        sums: :data:`SUMS` of each layer, (layers, 5) float32.
        lowest: Smallest integer code that occurred, (layers,) float32; infinity if there was none.
        highest: Largest integer code that occurred; minus infinity if there was none.

    Example:
        >>> quantizer = ActivationQuantizer(num_bits=4, fixed_min=True, clip=(1.5, -1e-9))
        >>> statistics = QuantStatistics(layers=1)
        >>> statistics.update(0, torch.tensor([0.0, 0.5, 9.0, 1.0]), quantizer)
        >>> statistics.compute()  # 1 of 4 is above the range; codes from -8 to 7
        tensor([[ 4.0000,  0.0000,  1.0000, 82.2500, 56.2500, -8.0000,  7.0000]])
    """

    full_state_update = False
    sums: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__(sync_on_compute=False)  # when to exchange is decided by what all processes know
        self.add_state("sums", torch.zeros(layers, len(SUMS)), dist_reduce_fx="sum")
        self.add_state("lowest", torch.full((layers,), torch.inf), dist_reduce_fx="min")
        self.add_state("highest", torch.full((layers,), -torch.inf), dist_reduce_fx="max")

    def update(self, row: int, x: Tensor, quantizer: ActivationQuantizer) -> None:
        """Add activations of a layer; an empty tensor adds nothing.

        Args:
            row: Number of the layer.
            x: Activations of any shape and floating dtype.
            quantizer: The quantizer with whose range to measure; it is left as it is.
        """
        if x.numel() == 0:
            return
        sums, lowest, highest = (part.to(self.sums.device, non_blocking=True) for part in measure(x, quantizer))
        self.sums[row] += sums
        self.lowest[row] = torch.minimum(self.lowest[row], lowest)
        self.highest[row] = torch.maximum(self.highest[row], highest)

    def compute(self) -> Tensor:
        """Return a row per layer, on the device: :data:`SUMS`, lowest and highest code."""
        return self.table

    @property
    def table(self) -> Tensor:
        """What :meth:`compute` returns."""
        return torch.cat((self.sums, self.lowest[:, None], self.highest[:, None]), dim=1)

    def collect(self, distributed: bool) -> Tensor:
        """Return the :attr:`table` over all processes, and start anew.

        Args:
            distributed: Whether the training has several processes; then all of them must call this.
        """
        with self.sync_context(should_sync=distributed):
            table = self.table
        self.reset()
        return table


@torch.no_grad()
def measure(x: Tensor, quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Measure what the present range of a quantizer makes of a tensor, in float32 whatever the dtype.

    Values are below or above the range as in the gradient of the clips: if they are strictly beyond the smallest or
    largest value that the integers can express.

    Args:
        x: Activations, not empty.
        quantizer: The quantizer; it is left as it is.

    Returns:
        :data:`SUMS` as a 1-d tensor, the smallest and the largest integer code, all float32.

    Example:
        >>> quantizer = ActivationQuantizer(num_bits=8, clip=(1.27, -1.28))
        >>> measure(torch.tensor([-2.0, 1.27]), quantizer)[1:]
        (tensor(-128.), tensor(127.))
    """
    scale, offset = quantizer.factors_of(*quantizer.usable_clips())
    h = half_range(quantizer.num_bits)
    values = x.detach().float()
    quantized = dequantize_(quantize(values, scale, quantizer.num_bits, offset), scale, offset)
    sums = (
        values.new_full((), values.numel()),
        (values < scale * (-h - offset)).sum().float(),
        (values > scale * (h - 1 - offset)).sum().float(),
        values.square().sum(),
        quantized.sub(values).square_().sum(),
    )
    lowest, highest = (torch.round(end / scale + offset) for end in torch.aminmax(quantized))
    return torch.stack(sums), lowest, highest
