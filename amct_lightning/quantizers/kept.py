"""What an evaluation computes from tensors that stay the same, kept from one batch to the next."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from amct_lightning.quantizers.base import Quantizer, is_exporting, several_processes
from amct_lightning.quantizers.transforms import differentiating_forward, transforming
from amct_lightning.quantizers.weight import WeightQuantizer

_Result = TypeVar("_Result")

_LARGEST = 1 << 22
"""Number of values from which nothing is kept: for a weight of half precision it is three times as much memory as the
weight itself, which large language models do not have, and their products take far longer than quantizing it."""


class _Kept(NamedTuple):
    copies: tuple[Tensor | None, ...]
    key: Hashable
    result: Any


def evaluates(quantizer: Quantizer) -> bool:
    """Tell whether a forward now is one of an evaluation, which no graph, transform or training step is made of.

    Args:
        quantizer: A quantizer of the layer.

    Example:
        >>> evaluates(Quantizer()), evaluates(Quantizer().eval())
        (False, True)
    """
    if torch.compiler.is_compiling() or transforming() or differentiating_forward() or is_exporting():
        return False
    return not (_is_traced() or quantizer.learns)


def kept(quantizer: Quantizer, sources: Sequence[Tensor | None], key: Hashable, make: Callable[[], _Result]) -> _Result:
    """Return what was made of the same values before, or make it and keep it with the quantizer.

    Whether they are the same is told by all their bytes. Version counters and addresses do not tell: writes through
    ``.data``, averages of weights, fused optimizers and sharding leave them as they are. So nothing is kept of tensors
    that the host would have to wait for, nor where several processes may have sharded them, nor of very large ones.

    Args:
        quantizer: Where it is kept, the last thing only; a copy of the quantizer and its state contain nothing of it.
        sources: All tensors that it depends on.
        key: What else it depends on.
        make: Makes it; what it returns must not be changed.

    Example:
        >>> quantizer, values = Quantizer().eval(), torch.ones(2)
        >>> first = kept(quantizer, [values], (), lambda: values * 2)
        >>> kept(quantizer, [values.clone()], (), lambda: values * 2) is first
        True
        >>> values.data[0] = 5.0
        >>> kept(quantizer, [values], (), lambda: values * 2)
        tensor([10.,  2.])
    """
    if not _are_comparable(sources):
        quantizer.forget()
        return make()
    last: _Kept | None = quantizer.kept
    if last is not None and last.key == key and all(map(_is_same, last.copies, sources)):
        result: _Result = last.result
        return result
    quantizer.forget()  # its memory is free before there is another one
    copies = tuple(None if source is None else source.detach().clone() for source in sources)
    result = make()
    if all(map(_is_same, copies, sources)):  # not so if there are gaps between the values, of which the copy has none
        quantizer.kept = _Kept(copies, key, result)
    return result


def kept_weight(quantizer: WeightQuantizer, weight: Tensor, key: Hashable, make: Callable[[], _Result]) -> _Result:
    """Return what is made of a weight and its scales, see :func:`kept`; the books are as after making it.

    Args:
        quantizer: The quantizer of the weight.
        weight: The weight.
        key: What else it depends on, besides the settings of the quantizer.
        make: Makes it, in a forward of the quantizer.
    """
    given = quantizer.given_scale()
    sources = weight, *quantizer.scale_sources()
    if not _are_comparable(sources):
        quantizer.forget()
        return make()  # without one operator more
    key = key, quantizer.settings, given is None
    result, scale = kept(quantizer, sources, key, lambda: (make(), quantizer.scale.detach().clone()))
    if given is None:
        with torch.no_grad():
            quantizer.scale.copy_(scale)
    return result


def _is_same(copy: Tensor | None, source: Tensor | None) -> bool:
    if copy is None or source is None:
        return copy is source
    if copy.dtype != source.dtype or copy.shape != source.shape or copy.stride() != source.stride():
        return False
    assert _MEMCMP is not None
    same: bool = _MEMCMP(copy.data_ptr(), source.data_ptr(), copy.nbytes) == 0
    return same


def _are_comparable(sources: Sequence[Tensor | None]) -> bool:
    return _MEMCMP is not None and not several_processes() and all(map(_is_readable, sources))


def _is_readable(source: Tensor | None) -> bool:
    if source is None:
        return True
    plain = type(source) in (Tensor, nn.Parameter) and source.layout is torch.strided
    return plain and source.numel() < _LARGEST and source.device.type == "cpu" and not source.is_neg()


def _is_traced() -> bool:
    """Tell whether a graph is made by dispatching each operator, of plain tensors or of none with values."""
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FAKE))


def _memcmp() -> Callable[[int, int, int], int] | None:
    """Return the comparison of the C library; ``torch.equal`` takes as long as quantizing does."""
    try:
        compare = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # Windows
        return None
    compare.argtypes, compare.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return compare


_MEMCMP = _memcmp()
