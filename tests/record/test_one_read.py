"""Taking a record reads the device once, however many layers there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amct_lightning import prepare_qat
from amct_lightning.modules.convert import activation_quantizers
from amct_lightning.record import QuantRecord
from tests.operators import Operators, Reads


def network(blocks: int, algo: str = "arq_retrain") -> nn.Module:
    layers = [layer for _ in range(blocks) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Flatten(1), nn.Linear(32, 2)), torch.randn(2, 2, 4, 4)
    model = prepare_qat(model, {"weights": {"algo": algo}}, x).train()
    model(x)
    QuantRecord.from_model(model)  # which tells of what is to be told once
    return model


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_the_number_of_reads_does_not_grow_with_the_number_of_layers(blocks: int, algo: str) -> None:
    model = network(blocks, algo)
    with Operators() as operators, Reads() as reads:
        record = QuantRecord.from_model(model)
        record.to_text()
    assert len(record) == blocks + 1
    assert operators.host_reads == {}
    assert reads.counts == {"cpu": 1, "numpy": 1}


def test_what_is_wrong_is_found_in_what_was_read() -> None:
    model = network(2)
    clip = activation_quantizers(model)["3"].clip_max
    with torch.no_grad():
        clip.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"Layer '3' has NaN or infinite factors \(scale_d, offset_d\)"):
        QuantRecord.from_model(model)
