"""Which layers can be quantized: AMCT's single-layer probes and the words for the others."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.graph.eligibility import eligible_layers
from tests.golden_data import GOLDEN

NOT_YET = ("Conv1d", "Conv3d", "ConvTranspose1d", "LSTM", "GRU")
"""Types that AMCT quantizes and this package does not; their probes say nothing about it where they are listed."""

PROBES = [
    probe
    for probe in json.loads((GOLDEN / "eligibility.json").read_text())
    if not (probe["listed"] and probe["constructor"].removeprefix("nn.").startswith(NOT_YET))
]


class Wrapper(nn.Module):
    def __init__(self, probe: nn.Module) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        if isinstance(self.probe, (nn.LSTM, nn.LSTMCell)):
            return self.probe(x, states)[0]
        return self.probe(x, *states)


def build(probe: dict[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = eval(probe["constructor"], {"nn": nn})  # expressions from our own data file
    integers = isinstance(layer, nn.Embedding)
    inputs = [
        torch.zeros(shape, dtype=torch.long) if integers else torch.randn(shape) for shape in probe["input_shapes"]
    ]
    return Wrapper(layer), tuple(inputs)


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: f"{p['constructor']}-{p['input_shapes'][0]}")
def test_a_layer_is_eligible_where_amct_lists_it(probe: dict[str, Any]) -> None:
    model, inputs = build(probe)
    assert list(eligible_layers(model, inputs)) == (["probe"] if probe["listed"] else [])


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 1)), (2, 4, 4), r"'0': its input has 3 dimensions, not 4"),
        (nn.Sequential(nn.Conv2d(2, 2, 1, padding_mode="reflect", padding=1)), (1, 2, 4, 4), r"'reflect'"),
        (nn.Sequential(nn.ReLU()), (2, 3), r"It has no layer of type Conv1d, Conv2d, .*LSTM, GRU"),
    ],
)
def test_nothing_to_quantize_is_refused_with_the_reasons(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"No supported layers.*{reason}"):
        make_plan(model, None, torch.randn(shape))


@pytest.mark.parametrize("model", [None, "model", {"layer": nn.Linear(1, 1)}])
def test_what_is_not_a_module_is_refused(model: object) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        eligible_layers(model, torch.ones(1, 1))
