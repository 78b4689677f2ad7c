"""Notices loops over ``parameters()`` that do not know of the factors that quantization added.

Such a loop may clamp all parameters, as a Wasserstein critic's does, or pair those of a quantized network with those
of its float copy, as the update of a momentum teacher does. Nothing fails then: a factor is a number, which goes with
a tensor of any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from amct_lightning.conversion.copies import float_copies
from amct_lightning.modules import quantized_layers
from amct_lightning.modules.convert import float_parameters, quantizers_of
from amct_lightning.quantizers import Quantizer
from amct_lightning.wording import abbreviated

_FIRST = 3
"""Number of batches after which a new copy is looked at; a teacher that learns does so in each."""
_PARAMETERS = 16
"""Number of parameters of a copy that are looked at: from the first factor on, all pairs are wrong."""


class OutsideWrites:
    """Looks, between two batches, at what was written by other code than the optimizers and the forward.

    It compares on the device and reads nothing: :class:`NonfiniteWatch` reads its flags along with others.

    Args:
        pl_module: The LightningModule.
        model: The converted module.
        interval: Number of batches between two looks at the factors.
    """

    def __init__(self, pl_module: nn.Module, model: nn.Module, interval: int) -> None:
        self._pl_module = pl_module
        self._model = model
        self._interval = max(1, interval)
        self._batches = 0
        self._before: dict[Quantizer, list[Tensor]] = {}
        self._written: dict[Quantizer, Tensor] = {}
        self._has_warned = False
        self._known: WeakSet[nn.Module] = WeakSet()
        self._copies: list[_Copy] = []
        self._find_copies()

    def end_batch(self, calibrated: bool) -> None:
        """Note the factors after a batch, if they are to be looked at.

        Args:
            calibrated: Whether nothing but optimizers changes them by now.
        """
        self._batches += 1
        self._before = {}
        is_due = self._batches <= _FIRST or self._batches % self._interval == 0
        if calibrated and is_due and not self._has_warned:
            factors = {quantizer: _factors(quantizer) for quantizer in quantizers_of(self._model)}
            self._before = {quantizer: [f.clone() for f in own] for quantizer, own in factors.items() if own}

    def start_batch(self, batch: int) -> None:
        """Compare with what was noted.

        Args:
            batch: Number of the batch in its epoch; between epochs, weights are exchanged for averages, for example.
        """
        before, self._before = self._before, {}
        if batch > 0:
            for quantizer, values in before.items():
                pairs = zip(_factors(quantizer), values, strict=True)
                written = torch.stack([(a != b).any() for a, b in pairs]).any()
                self._written[quantizer] = written | self._written.get(quantizer, False)
        if batch == 0:
            self._find_copies()
        for copy in self._copies:
            if not copy.is_over:
                copy.compare()

    def _find_copies(self) -> None:
        """Look for copies among the modules that came since the last time, as hooks of the training make them."""
        new = WeakSet(module for module in self._pl_module.modules() if module not in self._known)
        if new:  # only then the values are compared, for which the host waits
            found = float_copies(self._pl_module)
            self._copies += [_Copy(name, module, other, twin) for name, module, other, twin in found if module in new]
            self._known |= new

    def take_flags(self) -> list[Tensor]:
        """Return the flags to be read, 0-d bool; they belong to the next :meth:`report`."""
        return [*self._written.values(), *(copy.strayed for copy in self._copies)]

    def report(self, flags: Sequence[float]) -> None:
        """Warn, once, of what the flags tell.

        Args:
            flags: Their values, in the order of :meth:`take_flags`.
        """
        strayed = {quantizer for quantizer, flag in zip(self._written, flags, strict=False) if flag}
        copies = [copy for copy, flag in zip(self._copies, flags[len(self._written) :], strict=True) if flag]
        self._written = {}
        self._copies = [copy for copy in self._copies if not copy.is_over and copy not in copies]
        for copy in copies:
            copy.warn()
        if strayed:
            self._has_warned = True
            names = [name for name, layer in quantized_layers(self._model).items() if strayed & set(layer.children())]
            rank_zero_warn(
                f"The clips or scales of {abbreviated(names)} were written between two batches, and by no optimizer. "
                "If a loop over parameters() clamps or overwrites weights there, let it go over "
                "amct_lightning.float_parameters(module) instead."
            )


def _factors(quantizer: Quantizer) -> list[Tensor]:
    return [parameter.detach() for parameter in quantizer.parameters(recurse=False)]


class _Copy:
    """A float copy of a quantized module, as its loops may find it."""

    def __init__(self, name: str, module: nn.Module, other: str, twin: nn.Module) -> None:
        self.name, self.other = name, other
        self._own = list(module.parameters())[:_PARAMETERS]
        self._quantized = float_parameters(twin)[:_PARAMETERS]
        self._lowest = [parameter.detach().clone() for parameter in self._own]
        self._highest = [lowest.clone() for lowest in self._lowest]
        self._looks = 0
        self.strayed = torch.zeros((), dtype=torch.bool, device=self._own[0].device)

    @property
    def is_over(self) -> bool:
        """Whether it was looked at in the beginning, and after the first batches."""
        return self._looks > _FIRST

    @torch.no_grad()
    def compare(self) -> None:
        """Note whether it is no average any more of what the quantized module was and is."""
        self._looks += 1
        for own, low, high, now in zip(self._own, self._lowest, self._highest, self._quantized, strict=True):
            low.copy_(torch.minimum(low, now))
            high.copy_(torch.maximum(high, now))
            margin = 1e-5 * (1 + high.abs() + low.abs())  # of rounding
            outside = ((own < low - margin) | (own > high + margin)).any()
            self.strayed = self.strayed | outside.to(self.strayed.device)

    def warn(self) -> None:
        """Warn of it."""
        rank_zero_warn(
            f"'{self.name}', a float copy of '{self.other}', was given values that its weights never had. If "
            f"zip({self.other}.parameters(), {self.name}.parameters()) updates it, the pairs are wrong: the quantized "
            f"one has clips between its weights. Use amct_lightning.float_parameters({self.other}) there."
        )
