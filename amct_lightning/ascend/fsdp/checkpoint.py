"""Checkpoints of a sharded model: a folder with the shards of all ranks, or one file that loads anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer
from typing_extensions import override

from amct_lightning.ascend.devices import npu
from amct_lightning.ascend.fsdp import state
from amct_lightning.ascend.fsdp.gradients import plain
from amct_lightning.ascend.fsdp.units import reshard
from amct_lightning.ascend.hccl.collectives import broadcast_tensors
from amct_lightning.ascend.on_npus import given
from amct_lightning.files import atomic_path, location, make_parent
from amct_lightning.protocols import WrappingCheckpointIO

META = "meta.pt"
"""The file of a checkpoint folder with all that is not sharded; named as Lightning names it."""


class ShardedState:
    """The state of an optimizer on its way into a checkpoint folder: not to be moved to the CPU as a whole.

    Args:
        state: The state, sharded.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


class ShardedCheckpointIO(TorchCheckpointIO):
    """Writes and reads checkpoint folders, which all ranks do together, and checkpoint files.

    A checkpoint replaces an older one of its name only when it is complete.

    Args:
        folders: Whether to write folders.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/last.ckpt"
        >>> ShardedCheckpointIO(folders=False).save_checkpoint({"epoch": 3}, path)
        >>> ShardedCheckpointIO(folders=True).load_checkpoint(path)
        {'epoch': 3}
    """

    def __init__(self, folders: bool) -> None:
        self.folders = folders

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a folder is a collective."""
        if not self.folders:
            if isinstance(location(path), str):
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            with atomic_path(path) as temporary:
                super().save_checkpoint(checkpoint, temporary, storage_options)
            return
        final = location(path)
        if isinstance(final, str):
            raise ValueError(f"A checkpoint folder is written to a file system that all ranks see, not to '{path}'.")
        temporary = final.with_name(f".{final.name}.tmp")
        if _is_main():
            make_parent(final)
            _remove(temporary)
            temporary.mkdir()
        _wait()
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        states = [held.state for held in checkpoint.get("optimizer_states", [])]
        state.save_shards(checkpoint["state_dict"], states, temporary)
        if _is_main():
            torch.save(rest, temporary / META)
            _replace(final, temporary)
        _wait()

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint file without copying its tensors, or of a folder all that is not sharded."""
        place = location(path)
        if isinstance(place, str):
            return super().load_checkpoint(path, map_location="cpu", weights_only=weights_only)  # type: ignore[arg-type]
        if not place.exists():
            raise FileNotFoundError(f"There is no checkpoint '{path}'.")
        if is_checkpoint_folder(place):
            found: dict[str, Any] = torch.load(place / META, map_location="cpu", weights_only=weights_only)
        elif place.is_dir():
            raise IsADirectoryError(f"'{path}' is no checkpoint: the folder has no '{META}'.")
        else:
            found = torch.load(place, map_location="cpu", mmap=True, weights_only=weights_only)
        return found


class ShardedCheckpoints(ModelParallelStrategy):
    """The part of a strategy that deals with checkpoints of a sharded model."""

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """How checkpoints are written."""
        if self._checkpoint_io is None:
            self._checkpoint_io = ShardedCheckpointIO(self._save_distributed_checkpoint)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        # one that writes records beside checkpoints has the actual one inside
        inner = io.inner if isinstance(io, WrappingCheckpointIO) else io
        if io is not None and self._save_distributed_checkpoint and not isinstance(inner, ShardedCheckpointIO):
            raise MisconfigurationException(
                f"{type(inner).__name__} cannot write the checkpoint folders of a sharded model. Leave it out, or "
                f"write files: AscendFSDPStrategy(save_distributed_checkpoint=False)."
            )
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Give the state of the model: shards, or all of it on rank 0; buffers are those of rank 0."""
        reshard(given(self.model))
        self.share_buffers()
        return super().lightning_module_state_dict()

    def share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0, such as the statistics of batch normalizations."""
        broadcast_tensors(plain(given(self.model).buffers()), self.root_device)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Give the state of an optimizer: shards, or all of it on rank 0.

        Args:
            optimizer: The optimizer.
        """
        model = given(self.model)
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        reshard(model)
        if self._save_distributed_checkpoint:
            return ShardedState(state.named_optimizer_state(inner, model))  # type: ignore[return-value]
        gathered: dict[str, Any] = state.gathered_optimizer_state(inner, keep=self.is_global_zero)
        return gathered

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: State of model and trainer.
            filepath: Where to; of interest on rank 0.
            storage_options: For the checkpoint plugin.
        """
        path = self.broadcast(filepath)
        io = self.checkpoint_io
        if isinstance(io, WrappingCheckpointIO):  # what needs all ranks, before one of them writes
            io.complete(checkpoint)
        if self._save_distributed_checkpoint:
            io.save_checkpoint(checkpoint, path, storage_options)
        elif self.is_global_zero:
            if is_checkpoint_folder(path):
                shutil.rmtree(path)
            io.save_checkpoint(checkpoint, path, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, folder or file, into the model and its optimizers.

        Args:
            checkpoint_path: Where from.
            weights_only: Whether to refuse pickled objects.

        Returns:
            What is neither the model's nor an optimizer's.
        """
        path = self.broadcast(checkpoint_path)
        checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        model, strict = given(self.model), given(self.lightning_module).strict_loading
        if is_checkpoint_folder(path):
            state.load_shards(Path(path), model, self.optimizers, strict)
        else:
            state.load_whole(checkpoint, Path(path), model, self.optimizers, strict)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing: it is loaded along with the checkpoint."""


def is_checkpoint_folder(path: Any) -> bool:
    """Tell whether a path is the folder of a sharded checkpoint.

    Args:
        path: The path.

    Example:
        >>> is_checkpoint_folder("nowhere")
        False
    """
    return "://" not in str(path) and (Path(path) / META).is_file()


def _replace(final: Path, temporary: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    _remove(old)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier(device_ids=[npu().current_device()])
