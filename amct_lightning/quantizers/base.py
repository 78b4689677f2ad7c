"""What activation and weight quantizers have in common: float32 state that loads leniently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from amct_lightning.quantizers.gate import TrainingGate


class Quantizer(nn.Module):
    """A module whose state stays float32 and may be absent from a state dict as a whole.

    A float model's checkpoint has no quantizer state; loading it leaves the quantizers as they are, also with
    ``strict=True``. A checkpoint that has only part of a quantizer's state is still an error.

    A quantizer that leaves the meta device, where its values were lost, starts afresh.

    Attributes:
        keeps_whole: Tells strategies that shard parameters to leave those of a quantizer whole on every rank.
        gate: Tells which forwards belong to a training step; ``None`` where the mode of the quantizer does.
        is_copy: Whether it is a copy of a quantizer that a conversion has made, and not of the model that is trained.
        kept: What evaluations share, see ``kept.py``; ``None`` if there is nothing.
    """

    keeps_whole: ClassVar[bool] = True
    kept: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.gate: TrainingGate | None = None
        self.is_copy = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.is_copy = True

    @property
    def learns(self) -> bool:
        """Whether a forward now may calibrate and move ranges: if it is one of a training step."""
        if is_exporting():
            return False
        gate = self.gate
        return self.training if gate is None else gate.admits(self.training, guest=self.is_copy)

    def reset_parameters(self) -> None:
        """Set the state to what it is before training."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode as any module; training frees what evaluations keep."""
        if mode:
            self.forget()
        return super().train(mode)

    def forget(self, unless_evaluated: bool = False) -> None:
        """Free what evaluations keep.

        Args:
            unless_evaluated: Whether to do so in a forward of a training step only.
        """
        if not torch.compiler.is_compiling() and "kept" in self.__dict__ and not (unless_evaluated and not self.learns):
            del self.__dict__["kept"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move like any module, but keep the dtype of the factors."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.forget()
        was_meta = self._is_meta()
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._move_extra(keep_dtype)
        if was_meta and not self._is_meta():
            self.reset_parameters()
        return self

    def _is_meta(self) -> bool:
        return any(t is not None and t.is_meta for t in (*self._parameters.values(), *self._buffers.values()))

    def _move_extra(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move tensors that are neither parameters nor buffers."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        own = (*self._parameters, *self._buffers)
        if any(prefix + name in state_dict for name in own):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
            if not self._is_meta():
                self._after_load()
        elif self._is_meta() and local_metadata.get("assign_to_params_buffers"):
            self.to_empty(device=torch.get_default_device())  # nobody else will take it off the meta device

    def _after_load(self) -> None:
        """Bring derived Python state in line with newly loaded tensors."""


def is_exporting() -> bool:
    """Tell whether a graph is made of the model, by ``torch.export`` or by tracing: nothing is trained or evaluated."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or in_torch_export()


def in_torch_export() -> bool:
    """Tell whether ``torch.export`` is at work, so that no tensor has values that could be read."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()  # torch 2.6 has no way to tell


def several_processes() -> bool:
    """Tell whether clips must stay alike on several processes, whose batches have different ranges."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_backward() -> bool:
    """Tell whether this forward repeats an earlier one for the backward pass, as gradient checkpointing does."""
    return torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint itself goes by
