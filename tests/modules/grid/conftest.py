"""Layers on the device's grid, and an int64 computation of what the contract says the device does."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import prepare_qat
from tests.modules import reference
from tests.modules.cases import COMBINATIONS, LAYERS, LayerCase, Width

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class OnGrid:
    """A calibrated layer on the grid, what it was made from, and the same layer without the grid."""

    def __init__(self, case: LayerCase, width: Width) -> None:
        torch.manual_seed(0)
        self.case, self.width = case, width
        self.float_model, self.x = case.model(), case.input()
        self.model = prepare_qat(self.float_model, width.config(), self.x, deploy_grid=True).train()
        self.plain = prepare_qat(self.float_model, width.config(), self.x).train()
        for model in (self.model, self.plain):
            model(self.x)


@pytest.fixture(params=COMBINATIONS, ids=lambda combination: f"{combination[0].name}-{combination[1]}")
def qat(request: pytest.FixtureRequest) -> OnGrid:
    return OnGrid(*request.param)


@pytest.fixture(params=LAYERS, ids=lambda case: case.name)
def qat8(request: pytest.FixtureRequest) -> OnGrid:
    return OnGrid(request.param, Width())


# The device, from the contract; numpy and integers.


def clips_of(quantizer: Any) -> tuple[np.float32, np.float32]:
    upper, lower = quantizer.usable_clips()
    return np.float32(upper.item()), np.float32(lower.item())


def factors(quantizer: Any) -> tuple[np.float32, int]:
    """``s = (M - m) / (2^b - 1)`` and ``o = round(-h - m/s)``."""
    upper, lower = clips_of(quantizer)
    scale = (upper - lower) / np.float32(2**quantizer.num_bits - 1)
    return scale, int(np.round(np.float32(-(2 ** (quantizer.num_bits - 1))) - lower / scale))


def ascend_quant(x: np.ndarray, quantizer: Any) -> np.ndarray:
    """``clamp(round(x * float32(1/s)) + o) - o``."""
    scale, offset = factors(quantizer)
    h = 2 ** (quantizer.num_bits - 1)
    rounded = np.round(x.astype(np.float32) * (np.float32(1) / scale)).astype(np.int64)
    return np.clip(rounded + offset, -h, h - 1) - offset


def integer_weight(weight: np.ndarray, scale: np.ndarray, num_bits: int) -> np.ndarray:
    h = 2 ** (num_bits - 1)
    return np.clip(np.round(weight / scale), -h, h - 1).astype(np.int64)


def ascend_dequant(sums: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The int32 sums times the top 19 bits of the float32 scale."""
    assert np.abs(sums).max() < 2**31
    kept = (scale.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return sums.astype(np.int32).astype(np.float32) * kept


def spread_scale(layer: Any, quantizer: Any) -> Tensor:
    """The scales of a weight, shaped like it; one per output channel or a single one."""
    weight, scale = layer.weight, quantizer.scale.detach()
    if scale.numel() == 1:
        return scale.expand(weight.shape)
    if not reference.is_transposed(layer):
        return scale.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)
    rows = [s.view(1, -1, *[1] * (weight.dim() - 2)) for s in scale.chunk(layer.groups)]
    groups = weight.detach().chunk(layer.groups)
    return torch.cat([row.expand(group.shape) for row, group in zip(rows, groups, strict=True)])


def sums_of(layer: Any, codes: np.ndarray, weight: np.ndarray, call: dict[str, Any]) -> np.ndarray:
    """The layer's operation on integers; float64 holds them exactly, and nothing else is asked of torch."""
    bare = copy.copy(layer)
    bare.__dict__ = {**layer.__dict__, "_parameters": {**layer._parameters, "bias": None}}
    sums = reference.forward(bare, torch.from_numpy(codes).double(), torch.from_numpy(weight).double(), **call)
    return sums.numpy().astype(np.int64)


def deployed(qat: OnGrid, x: Tensor) -> np.ndarray:
    layer = qat.model.layer
    codes = ascend_quant(x.numpy(), layer.input_quantizer)
    scale_w = layer.weight_quantizer.scale.detach()
    spread = spread_scale(layer, layer.weight_quantizer).numpy()
    weight = integer_weight(layer.weight.detach().numpy(), spread, qat.width.weights if qat.case.int4 else 8)
    sums = sums_of(layer, codes, weight, qat.case.call)
    scale = scale_w.numpy() * factors(layer.input_quantizer)[0]
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (layer.weight.dim() - 2))
    if layer.bias is None:
        return ascend_dequant(sums, scale.reshape(shape))
    if isinstance(layer, nn.Linear) and x.dim() != 2:  # MatMul has no bias: a float Add follows it in the file
        return ascend_dequant(sums, scale.reshape(shape)) + layer.bias.detach().numpy()
    sums = sums + np.round(layer.bias.detach().numpy() / scale).astype(np.int64).reshape(shape)
    return ascend_dequant(sums, scale.reshape(shape))


def deployed_recurrent(qat: OnGrid, x: Tensor) -> Tensor:
    """Every product as above; what is no product is in float32."""
    layer = qat.model.layer
    sequence = x if qat.case.time_first else x.transpose(0, 1)

    def product(values: Tensor, quantizer: Any, which: str, weights: Any) -> Tensor:
        weight, scale_w = getattr(layer, f"weight_{which}_l0").detach().numpy(), weights.scale.detach().numpy()
        integers = integer_weight(weight, scale_w.reshape(-1, 1), qat.width.weights)
        scale = scale_w * factors(quantizer)[0]
        sums = ascend_quant(values.numpy(), quantizer) @ integers.T
        bias = getattr(layer, f"bias_{which}_l0", None)
        if bias is not None:
            sums = sums + np.round(bias.detach().numpy() / scale).astype(np.int64)
        return torch.from_numpy(ascend_dequant(sums, scale))

    h = c = torch.zeros(sequence.shape[1], layer.hidden_size)
    outputs = []
    for step in sequence:
        a = product(step, layer.input_quantizer, "ih", layer.weight_quantizer)
        b = product(h, layer.hidden_quantizer, "hh", layer.recurrent_weight_quantizer)
        if isinstance(layer, nn.LSTM):
            i, f, g, o = (a + b).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            codes = torch.from_numpy(ascend_quant(h.numpy(), layer.hidden_quantizer)).float()
            hq = codes * torch.tensor(factors(layer.hidden_quantizer)[0])
            (r, z, n), (r_h, z_h, n_h) = a.chunk(3, 1), b.chunk(3, 1)
            new = (n + (r + r_h).sigmoid() * n_h).tanh()
            h = new + (z + z_h).sigmoid() * (hq - new)
        outputs.append(h)
    y = torch.stack(outputs)
    return y if qat.case.time_first else y.transpose(0, 1)
