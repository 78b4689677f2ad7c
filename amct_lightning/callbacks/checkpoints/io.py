"""Checkpoints with their record: a CheckpointIO that keeps both together, whoever saves or removes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pickle import UnpicklingError
from typing import Any

from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from amct_lightning.callbacks.checkpoints.records import (
    put_record,
    record_along,
    record_of,
    record_path,
)
from amct_lightning.callbacks.checkpoints.state import QuantState, warn_of_float_phase
from amct_lightning.checkpoint_file import CHECKPOINT_KEY
from amct_lightning.files import atomic_path, location, read_bytes


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
        if isinstance(location(path), str):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_path(path) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


class RecordCheckpointIO(CheckpointIO):
    """Write ``<name>.record.txt`` beside each ``<name>.ckpt``, and remove both together.

    Lightning calls this on rank zero only, and lets all ranks wait for it. Strategies that shard weights call
    :meth:`complete` on all ranks before, and all of it on all ranks to write a folder.

    Args:
        inner: The CheckpointIO that does the actual reading and writing; Lightning's default one is replaced by
            :class:`AtomicCheckpointIO`. Of an earlier run's ``RecordCheckpointIO`` it is the one inside.
        state: The quantized model.
    """

    def __init__(self, inner: CheckpointIO, state: QuantState) -> None:
        own: CheckpointIO = inner.inner if isinstance(inner, RecordCheckpointIO) else inner
        self.inner: CheckpointIO = AtomicCheckpointIO() if type(own) is TorchCheckpointIO else own
        self.state = state
        self._saved: set[str] = set()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint with its record: both are on the disk under other names before one takes its place.

        A record that cannot be written costs a warning, not the checkpoint, which holds it as well.
        """
        self.complete(checkpoint)
        entry = checkpoint.get(CHECKPOINT_KEY, {})
        if entry:
            model, submodule = self.state.converted(), self.state.submodule
            entry["record"] = record_of(model, submodule, checkpoint.get("state_dict", {}), entry["record"])
        self._saved.add(str(path))
        with self._with_record(entry.get("record"), path):
            self.inner.save_checkpoint(checkpoint, path, storage_options)

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Put the callback's entry into a checkpoint that has none: Lightning leaves it out with ``save_weights_only``.

        Args:
            checkpoint: The checkpoint.
        """
        entry = None if CHECKPOINT_KEY in checkpoint else self.state.entry()
        if entry is not None:
            checkpoint[CHECKPOINT_KEY] = entry

    @contextmanager
    def _with_record(self, text: str | None, path: Any) -> Iterator[None]:
        if not _is_main():
            yield
            return
        with record_along(path, text):
            yield
        self.state.record.write(text)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint and let the callback convert the model before the weights are loaded into it."""
        try:
            checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise RuntimeError(f"The checkpoint '{path}' cannot be read: {type(error).__name__}: {error}") from error
        entry = checkpoint.get(CHECKPOINT_KEY)
        self.state.adopt(entry, str(path))
        if entry is not None and str(path) not in self._saved:  # a search puts back what it has saved before
            warn_of_float_phase(entry, str(path))
        _heal_record(path, checkpoint)
        return checkpoint

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its record."""
        self.inner.remove_checkpoint(path)
        put_record(path, None)

    @override
    def teardown(self) -> None:
        """Let the wrapped CheckpointIO finish."""
        self.inner.teardown()


def _is_main() -> bool:
    return bool(getattr(rank_zero_only, "rank", 0) == 0)  # what the decorator itself asks


@rank_zero_only
def _heal_record(path: Any, checkpoint: dict[str, Any]) -> None:
    """Write the record beside a checkpoint again if a kill between the two writes has left another one there."""
    text = checkpoint.get(CHECKPOINT_KEY, {}).get("record")
    if text is None or isinstance(location(path), str):  # a remote one may be public, and cost a request
        return
    with suppress(OSError):  # a folder that may only be read is no reason not to load from it
        if read_bytes(record_path(path)) not in (None, text.encode()):
            put_record(path, text)
