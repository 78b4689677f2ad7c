"""The same training on the CPU and on a simulated device: the losses agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.ascend_sim.networks import NETWORKS


def _losses(name: str, device: str, optimizer: str) -> list[float]:
    torch.manual_seed(1)
    make, data = NETWORKS[name]
    model: nn.Module = make().to(device)
    chosen: torch.optim.Optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4, foreach=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=False),
    }[optimizer](model.parameters())
    torch.manual_seed(2)
    losses = []
    for _ in range(5):
        inputs, labels = data(), torch.randint(0, 4, (8,))
        loss: Tensor = F.cross_entropy(model(inputs.to(device)), labels.to(device))
        chosen.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        chosen.step()
        losses.append(loss.item())
    return losses


@pytest.mark.npu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_losses_are_those_of_the_cpu(name: str, optimizer: str) -> None:
    expected = _losses(name, "cpu", optimizer)

    assert len(set(expected)) == 5
    for device in ("npu:0", "npu:1"):
        assert _losses(name, device, optimizer) == pytest.approx(expected, abs=1e-5)


@pytest.mark.npu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_small_type(dtype: torch.dtype) -> None:
    layer, inputs = nn.Linear(6, 3), torch.randn(4, 6)
    expected = layer(inputs)

    with torch.autocast("npu", dtype):
        result = layer.to("npu")(inputs.to("npu"))

    assert result.dtype == dtype
    assert torch.allclose(result.float().cpu(), expected, atol=2e-2)
