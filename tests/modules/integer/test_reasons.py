"""Which layers are not computed in integers, and the words for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from amct_lightning.modules.integer import why_not
from tests.capabilities import LEVELS

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layer", "bits", "reason"),
    [
        (nn.ConvTranspose2d(2, 2, 3), (8, 8), "no integer operator computes a layer of type ConvTranspose2d"),
        (nn.GRU(2, 2), (8, 8), "no integer operator computes a layer of type GRU"),
        (nn.Linear(2, 2), (16, 8), "its activations have 16 bits, integer operators take 8 at most"),
        (nn.Linear(2, 2).double(), (8, 8), "its weight is torch.float64, integer sums become float32"),
        (
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            (8, 8),
            "padding_mode is 'reflect', integer operators pad with zeros only",
        ),
        (
            nn.Conv1d(2, 2, 4, padding="same"),
            (8, 8),
            "padding='same' needs more zeros at one end than at the other, integer operators pad both alike",
        ),
        (nn.Linear(70000, 1), (8, 8), "a sum of 70000 products may exceed 32 bits"),
    ],
)
def test_layer_that_has_no_integer_product(layer: nn.Module, bits: tuple[int, int], reason: str) -> None:
    assert why_not(layer, CPU, bits) == reason


def test_device_without_integer_operators() -> None:
    reason = why_not(nn.Linear(2, 2), torch.device("meta"), (8, 8))
    assert reason == "there are no integer operators for devices of type 'meta'"


def test_a_sum_of_more_products_of_fewer_bits_fits() -> None:
    assert why_not(nn.Linear(70000, 1), CPU, (4, 4)) is None


WITHOUT_VNNI = """
import torch
from torch import nn
from amct_lightning.modules.integer import why_not
for layer in (nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)):
    print([why_not(layer, torch.device("cpu"), bits) for bits in ((8, 8), (8, 4), (4, 8), (4, 4))])
"""


def test_cpu_whose_sums_saturate_computes_8_bits_in_float() -> None:
    env = {**os.environ, **LEVELS["avx2"]}
    found = subprocess.run([sys.executable, "-c", WITHOUT_VNNI], env=env, capture_output=True, text=True, check=True)
    reason = "this CPU has no VNNI instructions: its sums of 8-bit products saturate at 16 bits"
    assert found.stdout.splitlines() == [str([reason, None, None, None])] * 4
