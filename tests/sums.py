"""Arithmetic that is the same on every machine: sums are made in float64 and rounded to float32 once.

A float32 sum depends on the order in which its terms are added, which depends on the width of the CPU's vectors, on the
library and on the number of threads; its last bits decide which way a value near a tie is rounded, and from there on
two runs differ by whole quantization steps. Everything else that a quantizer does (divide, round, clamp, compare,
maximum) is exact or correctly rounded, and so the same everywhere. Under :class:`SumsRoundedOnce` what is left is the
same everywhere too, and a comparison with recorded numbers gives the same result on every machine.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

UNIT_ROUNDOFF = 2.0**-24
"""Of float32: the largest relative error of one operation."""

# fmt: off
_SUMS = frozenset({
    "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "_log_softmax", "_log_softmax_backward_data", "_softmax",
    "_softmax_backward_data", "addmm", "avg_pool2d", "avg_pool2d_backward", "baddbmm", "bmm", "convolution",
    "convolution_backward", "dot", "mean", "mm", "mse_loss", "mse_loss_backward", "mv", "native_batch_norm",
    "native_batch_norm_backward", "native_layer_norm", "native_layer_norm_backward", "nll_loss_backward",
    "nll_loss_forward", "sum", "var_mean",
})
# Not sums, but functions whose last bit depends on the library as well.
_FUNCTIONS = frozenset({
    "exp", "gelu", "gelu_backward", "log", "sigmoid", "sigmoid_backward", "tanh", "tanh_backward",
})
# fmt: on


class SumsRoundedOnce(TorchDispatchMode):
    """Within it, forward and backward, operators that add float32 numbers do so in float64.

    oneDNN's recurrent layer, a single operator that knows float32 only, is left as it is.

    Attributes:
        terms: The largest number of terms that a sum can have had: the elements of the largest operand of them all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms = 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in _SUMS | _FUNCTIONS:
            return func(*args, **(kwargs or {}))
        wide, wide_kwargs = tree_map(_widen, args), tree_map(_widen, kwargs or {})
        if name in _SUMS:
            self.terms = max(self.terms, *(t.numel() for t in wide if isinstance(t, Tensor)))
        result = func(*wide, **wide_kwargs)
        if name == "native_batch_norm":  # updates its running statistics in place
            for own, new in zip(args[3:5], wide[3:5], strict=True):
                if own is not None:
                    own.copy_(new)
        return tree_map(_narrow, result)


def sum_error(terms: int) -> float:
    """Return how far a float32 sum may be from the exact one, relative to the magnitude of its terms.

    For ``n`` terms in any order the error is at most ``n * u``, and at most ``lambda * sqrt(n) * u`` with a probability
    of ``1 - 2n * exp(-lambda**2 / 2)`` if rounding errors are independent (Higham and Mary 2019, A New Approach to
    Probabilistic Rounding Error Analysis). ``lambda`` is 8 here: 1 in 10**10 for 6,000 terms.

    Args:
        terms: Number of terms.
    """
    return min(terms, 8 * math.sqrt(terms)) * UNIT_ROUNDOFF


def _widen(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _narrow(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value
