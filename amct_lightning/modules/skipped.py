"""Keeping the factors of data-parallel processes equal when some of them do not run a layer in a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from amct_lightning.modules.folding import current_weight
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer


class SkippedLayers:
    """Does before an optimizer step what the forward of a layer would have done, if this process did not run it.

    A training forward repairs the clips and keeps them for later repairs, and the first one sets what weight scales
    start from. The optimizer moves the factors in all processes alike, so those that skipped the layer, as
    the experts of a mixture may be, have to do the same. Alone there is nothing to agree with.

    Args:
        layers: The quantized layers.

    Example:
        >>> SkippedLayers([]).catch_up()
    """

    def __init__(self, layers: Iterable[QATLayer]) -> None:
        self._layers = list(layers)
        self._versions: dict[ActivationQuantizer, int] = {}
        for layer in self._layers:
            for name in layer.activation_quantizers:
                quantizer = layer.get_quantizer(name)
                self._versions[quantizer] = quantizer.clip_max_previous._version

    def catch_up(self) -> None:
        """Bring the layers that were not run since the last call to where they would be; nothing is read or sent."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for quantizer, version in self._versions.items():
            # Every training forward writes them, which raises their version.
            if quantizer.clip_max_previous._version == version and quantizer.settled and not quantizer.frozen:
                quantizer.repair()
            self._versions[quantizer] = quantizer.clip_max_previous._version
        for layer in self._layers:
            if layer.quant_mode == "quantized":
                _begin(layer)


def _begin(layer: QATLayer) -> None:
    for name, parameter in layer.weight_quantizers.items():
        quantizer = getattr(layer, name)
        if quantizer.starting:
            weight = cast(Tensor, getattr(layer, parameter))
            if not isinstance(weight, DTensor):  # the processes have to run layers with sharded weights together
                quantizer.begin(current_weight(layer, parameter))
