"""What activation and weight quantizers have in common: float32 state that loads leniently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self


class Quantizer(nn.Module):
    """A module whose state stays float32 and may be absent from a state dict as a whole.

    A float model's checkpoint has no quantizer state; loading it leaves the quantizers as they are, also with
    ``strict=True``. A checkpoint that has only part of a quantizer's state is still an error.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move like any module, but keep the dtype of the factors."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._move_extra(keep_dtype)
        return self

    def _move_extra(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move tensors that are neither parameters nor buffers."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        own = (*self._parameters, *self._buffers)
        if any(prefix + name in state_dict for name in own):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            self._after_load()

    def _after_load(self) -> None:
        """Bring derived Python state in line with newly loaded tensors."""
