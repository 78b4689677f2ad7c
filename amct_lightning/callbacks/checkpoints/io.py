"""Checkpoints with their record: a CheckpointIO that keeps both together, whoever saves or removes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from amct_lightning.checkpoint_file import CHECKPOINT_KEY
from amct_lightning.files import atomic_path, write_text


class CheckpointOwner(Protocol):
    """What :class:`RecordCheckpointIO` needs of the callback."""

    def checkpoint_state(self) -> dict[str, Any] | None:
        """Return the entry for :data:`CHECKPOINT_KEY`, or ``None`` if the model is not converted."""

    def record_of(self, tensors: Mapping[str, Tensor], text: str | None) -> str | None:
        """Return the record that belongs to the tensors of a checkpoint; ``text`` is that of the live model."""

    def record_saved(self, text: str | None) -> None:
        """Take note that a checkpoint with this record is being saved."""

    def checkpoint_loaded(self, state: dict[str, Any] | None, source: str) -> None:
        """Bring the model into the structure that the checkpoint about to be loaded has."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's default CheckpointIO, made safe against kills and power cuts for local files.

    The checkpoint is written to a temporary file in its folder, flushed to disk, and renamed.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/last.ckpt"
        >>> AtomicCheckpointIO().save_checkpoint({"epoch": 3}, path)
        >>> AtomicCheckpointIO().load_checkpoint(path)
        {'epoch': 3}
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save like :class:`TorchCheckpointIO`, atomically."""
        if not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_path(path, mode=None) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


class RecordCheckpointIO(CheckpointIO):
    """Write ``<name>.record.txt`` beside each ``<name>.ckpt``, and remove both together.

    Lightning calls this on rank zero only, and lets all ranks wait for it. Strategies that shard weights call
    :meth:`complete` on all ranks before, and all of it on all ranks to write a folder.

    Args:
        inner: The CheckpointIO that does the actual reading and writing; Lightning's default one is replaced by
            :class:`AtomicCheckpointIO`.
        owner: The callback.
    """

    def __init__(self, inner: CheckpointIO, owner: CheckpointOwner) -> None:
        self.inner = AtomicCheckpointIO() if type(inner) is TorchCheckpointIO else inner
        self.owner = owner

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the record, then the checkpoint: a checkpoint that exists has its record."""
        self.complete(checkpoint)
        entry = checkpoint.get(CHECKPOINT_KEY, {})
        if entry:
            entry["record"] = self.owner.record_of(checkpoint.get("state_dict", {}), entry["record"])
        text = entry.get("record")
        self._write_record(text, path)
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Put the callback's entry into a checkpoint that has none: Lightning leaves it out with ``save_weights_only``.

        Args:
            checkpoint: The checkpoint.
        """
        state = None if CHECKPOINT_KEY in checkpoint else self.owner.checkpoint_state()
        if state is not None:
            checkpoint[CHECKPOINT_KEY] = state

    @rank_zero_only
    def _write_record(self, text: str | None, path: Any) -> None:
        self.owner.record_saved(text)
        if _is_local(path) and text is not None:
            write_text(record_path(path), text)
        elif _is_local(path):
            record_path(path).unlink(missing_ok=True)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint and let the callback convert the model before the weights are loaded into it."""
        try:
            checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise RuntimeError(f"The checkpoint '{path}' cannot be read: {type(error).__name__}: {error}") from error
        self.owner.checkpoint_loaded(checkpoint.get(CHECKPOINT_KEY), str(path))
        _heal_record(path, checkpoint)
        return checkpoint

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its record."""
        self.inner.remove_checkpoint(path)
        if _is_local(path):
            record_path(path).unlink(missing_ok=True)

    @override
    def teardown(self) -> None:
        """Let the wrapped CheckpointIO finish."""
        self.inner.teardown()


def record_path(checkpoint_path: str | Path) -> Path:
    """Return where the record of a checkpoint is.

    Example:
        >>> record_path("run/epoch=3.ckpt").name
        'epoch=3.record.txt'
    """
    path = Path(checkpoint_path)
    return path.with_name(path.name.removesuffix(".ckpt") + ".record.txt")


@rank_zero_only
def copy_records_of_links(checkpoint_callbacks: Iterable[Any]) -> None:
    """Give a last checkpoint that is a link (``save_last="link"``), which no CheckpointIO saves, its record.

    Args:
        checkpoint_callbacks: The Trainer's checkpoint callbacks.
    """
    for callback in checkpoint_callbacks:
        path = Path(getattr(callback, "last_model_path", ""))
        if path.is_symlink():
            record, original = record_path(path), record_path(path.resolve())
            if original.is_file():
                write_text(record, original.read_bytes().decode())
            else:
                record.unlink(missing_ok=True)


@rank_zero_only
def _heal_record(path: Any, checkpoint: dict[str, Any]) -> None:
    """Write the record beside a checkpoint again if a kill between the two writes has left another one there."""
    text = checkpoint.get(CHECKPOINT_KEY, {}).get("record")
    record = record_path(path)
    if text is not None and _is_local(path) and record.exists() and record.read_bytes() != text.encode():
        with suppress(OSError):  # a folder that may only be read is no reason not to load from it
            write_text(record, text)


def _is_local(path: Any) -> bool:
    return "://" not in str(path)
