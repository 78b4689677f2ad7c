"""Looking at the forwards of sampled batches: hooks that are there for these batches only."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from amct_lightning.callbacks.monitor.layers import Drift, MonitoredLayer, read_factors
from amct_lightning.callbacks.monitor.metric import QuantStatistics
from amct_lightning.callbacks.monitor.reading import reading_of
from amct_lightning.monitor_format import LayerReading
from amct_lightning.quantizers.base import in_backward


class Sampler:
    """Gathers the statistics of layers while it is attached.

    Args:
        rows: The layers to look at.
        device: Where to gather.

    Attributes:
        attached: Whether forwards are looked at, as far as there are activations with a range in them.
    """

    def __init__(self, rows: list[MonitoredLayer], device: torch.device) -> None:
        self.rows = rows
        self.statistics = QuantStatistics(len(rows)).to(device)
        self.attached = False
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Look at forwards from now on."""
        if not self.attached:
            self.attached = True
            self._handles = [
                row.source.register_forward_hook(partial(self._look, index, row), with_kwargs=True)
                for index, row in enumerate(self.rows)
                if row.source is not None
            ]

    def detach(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.attached = [], False

    def collect(self, drift: Drift, distributed: bool) -> list[LayerReading]:
        """Return what was gathered and the present factors, with one read of the device; then start anew.

        Args:
            drift: The factors of the calibration.
            distributed: Whether there are several processes, which then all do this.
        """
        gathered = self.statistics.collect(distributed)
        if not self.rows:
            return []
        factors = [read_factors(row, drift).to(gathered.device, non_blocking=True) for row in self.rows]
        values = torch.cat((gathered, torch.stack(factors)), dim=1).tolist()
        return [reading_of(row.name, row.num_bits, line) for row, line in zip(self.rows, values, strict=True)]

    def _look(
        self, index: int, row: MonitoredLayer, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        # Compiled code cannot be looked into: hooks that come later are not called in it, so none ever is.
        if torch.compiler.is_compiling() or in_backward():
            return
        if row.quantizer is None or not row.quantizer.has_range:
            return
        with torch.no_grad():
            x = row.activations(args, kwargs, output)
            if isinstance(x, Tensor):
                self.statistics.update(index, x, row.quantizer)
