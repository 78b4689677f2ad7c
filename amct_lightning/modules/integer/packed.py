"""What a weight was packed into, kept while its codes stay the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor


class PackedWeight:
    """Keeps the packed form of a layer's weight from one forward to the next.

    Whether it still holds is told by the codes themselves, as optimizers, averages of weights and sharding also write
    where no version counter of a tensor sees it. So micro-batches of a step and batches of an evaluation share it. It
    belongs to one layer; neither copies, pickles nor states of the layer contain it: a copy begins empty.

    Example:
        >>> packed, codes = PackedWeight(), torch.tensor([[1, 2]], dtype=torch.int8)
        >>> first = packed.of(codes, key=(), pack=lambda: codes.t().contiguous())
        >>> packed.of(codes.clone(), key=(), pack=lambda: codes.t().contiguous()) is first
        True
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def of(self, codes: Tensor, key: Hashable, pack: Callable[[], Tensor]) -> Tensor:
        """Return the packed form of ``codes``.

        Args:
            codes: The codes of the weight; they must not be changed afterwards.
            key: What else the packed form depends on.
            pack: Packs them, if they are others than those of the last call.
        """
        kept = self._kept
        if kept is None or kept.key != key or kept.codes.device != codes.device or not torch.equal(kept.codes, codes):
            self._kept = None  # its memory is free before there is another one
            self._kept = kept = _Kept(codes, key, pack())
        return kept.packed

    def clear(self) -> None:
        """Free the memory."""
        self._kept = None

    def __deepcopy__(self, _memo: object) -> PackedWeight:
        return PackedWeight()

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return PackedWeight, ()


class _Kept(NamedTuple):
    codes: Tensor
    key: Hashable
    packed: Tensor
