"""Integer products of linear layers by matrix products of int8 that give int32, on CUDA devices and Ascend NPUs.

Nothing here was run on either: the arithmetic is tested with torch's ``_int_mm`` on CPUs and on a simulated NPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amct_lightning.modules.integer.codes import signed_codes
from amct_lightning.modules.integer.numbers import Numbers
from amct_lightning.quantizers.functional import quantize
from amct_lightning.targets import ATC_TARGETS

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the codes of input and weight, both with a row per sum, and an int32 per column to add: the sums, int32."""

LONGEST = 65535
"""The longest row that ``npu_quant_matmul`` takes."""

GIVES_INT32 = "A2", "A3"
"""Generations whose ``npu_quant_matmul`` gives int32, by the documentation of op-plugin."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Numbers, product: Product) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32, summed up in integers.

    Args:
        x: Input of any rank, of at least one number.
        weight: Weight, ``(out, in)``.
        bias: Bias, if there is one.
        numbers: Scales, offset and numbers of bits.
        product: The product that the device has.
    """
    codes = signed_codes(x, numbers.scale, numbers.offset, numbers.num_bits[0]).reshape(-1, weight.shape[1])
    of_weight = quantize(weight.float(), numbers.weight_scale.view(-1, 1), numbers.num_bits[1])
    # Their sum is exact in float32, as it is below 2**24 where that of products fits 32 bits. Its product is not.
    of_offset = of_weight.sum(1).to(torch.int32).mul_(numbers.offset.to(torch.int32)).neg_()
    output = product(codes, of_weight.to(torch.int8), of_offset).float().mul_(numbers.weight_scale * numbers.scale)
    if bias is not None:
        output.add_(bias)
    return output.view(*x.shape[:-1], weight.shape[0])


def int_mm(codes: Tensor, of_weight: Tensor, added: Tensor) -> Tensor:
    """Return the sums by ``torch._int_mm``, which on CUDA takes more than 16 rows and multiples of 8 only."""
    rows, columns = codes.shape[0], of_weight.shape[0]
    padded = F.pad(codes, (0, -codes.shape[1] % 8, 0, max(0, 32 - rows)))
    sums = torch._int_mm(padded, F.pad(of_weight, (0, -codes.shape[1] % 8, 0, -columns % 8)).t())
    return sums[:rows, :columns] + added


def npu_quant_matmul(codes: Tensor, of_weight: Tensor, added: Tensor) -> Tensor:
    """Return the sums by the operator of torch_npu, which adds integers to them as its bias."""
    one = torch.ones(1, dtype=torch.float32, device=codes.device)
    operator: Any = torch.ops.npu.npu_quant_matmul
    sums: Tensor = operator(codes, of_weight.t(), one, bias=added, output_dtype=torch.int32)
    return sums


PRODUCTS: dict[str, Product] = {"cuda": int_mm, "npu": npu_quant_matmul}
"""Type of device -> its product."""


def obstacle(device: torch.device, outputs: int) -> str | None:
    """Say why a device has no such product for a linear layer, or ``None`` if it has.

    Args:
        device: The device.
        outputs: Number of outputs of the layer.
    """
    if device.type == "npu" and outputs > LONGEST:
        return f"it has {outputs} outputs, npu_quant_matmul of torch_npu takes {LONGEST} at most"
    if device.type == "npu" and not _gives_int32(device):
        return f"npu_quant_matmul of torch_npu gives sums of 32 bits on Atlas {' and '.join(GIVES_INT32)} only"
    return _fails(device)


def _gives_int32(device: torch.device) -> bool:
    name = torch.get_device_module(device).get_device_name(device)
    return any(name.startswith(ATC_TARGETS[generation].soc_prefix) for generation in GIVES_INT32)


@cache
def _fails(device: torch.device) -> str | None:
    """Try the product with the largest codes."""
    codes = torch.full((3, 5), -128, dtype=torch.int8, device=device)
    added = torch.ones(5, dtype=torch.int32, device=device)
    try:
        sums = PRODUCTS[device.type](codes, codes.new_full((5, 5), -128), added)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"the product of int8 numbers fails on {device}: {str(error).partition(chr(10))[0]}"
    return None if bool((sums == 5 * 128 * 128 + 1).all()) else f"the product of int8 numbers is not exact on {device}"
