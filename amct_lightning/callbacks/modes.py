"""Switching the quantized layers of a model between what training, evaluation and the sanity check ask of them."""

from __future__ import annotations

from typing import cast

from torch import nn

from amct_lightning.modules import QATLayer, quantized_layers
from amct_lightning.modules.shift_hook import shift_searches
from amct_lightning.quantizers import Quantizer


def train_quantizers(model: nn.Module) -> None:
    """Let all quantizers train, also those of layers that are in eval mode, as whole pretrained models often are."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.train()


def expect_float(model: nn.Module, expected: bool) -> None:
    """Say whether layers may run in float before their calibration without anybody being told."""
    for layer in quantized_layers(model).values():
        cast(QATLayer, layer).float_is_expected = expected


def start_shift_search(model: nn.Module, enabled: bool) -> None:
    """Start the search of the shifts anew, or let the coming evaluation pass it by."""
    for search in shift_searches(model):
        search.enabled = enabled
        if enabled:
            search.reset()
