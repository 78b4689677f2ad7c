"""What a server computes of a W8A8 layer, in NumPy and int64, from the documented formulas alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


def array(tensor: Tensor, dtype: torch.dtype | None = None) -> Any:
    """The values of a tensor, float32 or rounded to a dtype."""
    values = tensor.detach().float().numpy()
    return values if dtype is None else values.astype(DTYPES[dtype])


def input_factors(upper: float, lower: float, dtype: torch.dtype, symmetric: bool = False) -> tuple[Any, int]:
    """The scale of a range, rounded to the dtype, and the offset that the lower end has with it.

    A range around 0 has the offset 0. One without a scale has 1; float16 holds no reciprocal of less than 1.53e-5.
    """
    low = np.float32(min(lower, 0.0))
    wanted = (np.float32(max(upper, 0.0)) - low) / np.float32(255)
    if wanted < np.float32(2.0**-23):
        return DTYPES[dtype](1), 0 if symmetric else -128
    scale = (max(wanted, np.float32(1.53184e-5)) if dtype == torch.float16 else wanted).astype(DTYPES[dtype])
    offset = np.rint(np.float32(-128) - low / np.float32(scale))
    return scale, 0 if symmetric else int(np.clip(offset, -128, 127))


def input_codes(x: Any, scale: Any, offset: int) -> Any:
    """npu_quantize: the input in the dtype of the server times the reciprocal of the scale, of that dtype too."""
    reciprocal = (np.float32(1) / scale.astype(np.float32)).astype(scale.dtype)
    rounded = np.rint(x.astype(np.float32) * reciprocal.astype(np.float32))
    return (np.clip(rounded, -1e6, 1e6).astype(np.int64) + offset).clip(-128, 127)


def weight_factors(weight: Any, by_channel: bool = True) -> tuple[Any, Any]:
    """The max-abs scale of each row, or of all, as AMCT has it, and the integers."""
    rows = weight if by_channel else weight.reshape(1, -1)
    high, low = np.abs(rows.max(1)), np.abs(rows.min(1))
    scale = (np.maximum(high, low) / np.where(high < low, np.float32(128), np.float32(127))).astype(np.float32)
    scale = np.broadcast_to(np.where(scale < np.float32(2.0**-23), np.float32(1), scale), weight.shape[:1])
    return scale, np.rint(weight / scale[:, None]).clip(-128, 127).astype(np.int64)


def deq_scale(input_scale: Any, weight_scale: Any) -> Any:
    """float32 for bfloat16; for float16 the 19 bits that npu_trans_quant_param leaves."""
    product = input_scale.astype(np.float32) * weight_scale
    if input_scale.dtype != np.float16:
        return product
    return (product.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def quant_bias(bias: Any | None, scale: Any, weight: Any, offset: int) -> Any:
    """round(bias / deq_scale) - sum_k(weight) * offset; a bias is cut off at 2**30."""
    added = -weight.sum(1) * offset
    return added if bias is None else added + np.rint(bias / scale).clip(-(2**30), 2**30).astype(np.int64)


def output(codes: Any, weight: Any, added: Any, scale: Any, dtype: torch.dtype) -> Any:
    """npu_quant_matmul: exact sums in 32 bits, with the integer bias, times the scale."""
    sums = codes @ weight.T + added
    assert np.abs(sums).max() < 2**31
    return (sums.astype(np.int32).astype(np.float32) * scale).astype(DTYPES[dtype])
