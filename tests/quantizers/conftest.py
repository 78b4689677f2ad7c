"""Shared objects of the quantizer tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amct_lightning.quantizers import ActivationQuantizer


@pytest.fixture
def batches() -> list[Tensor]:
    """Three batches of different range."""
    return [torch.randn(4, 6) * scale for scale in (1.0, 3.0, 0.5)]


@pytest.fixture
def calibrated() -> ActivationQuantizer:
    """An 8-bit quantizer in training mode with the clips 2 and -1."""
    return ActivationQuantizer(num_bits=8, clip=(2.0, -1.0))
