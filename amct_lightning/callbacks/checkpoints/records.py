"""Records in files: that of the run, those beside checkpoints, and the text of the record that they hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import Self

from amct_lightning.files import Location, atomic_path, beside, check_writable, location, read_bytes, remove, write_text
from amct_lightning.modules import activation_quantizers
from amct_lightning.modules.calibration import is_calibrated
from amct_lightning.modules.folding import is_sharded
from amct_lightning.protocols import ShardingStrategy
from amct_lightning.record import QuantRecord


@dataclass(frozen=True)
class RecordFile:
    """Where the record of a run goes.

    Attributes:
        path: The file; as text the address of one on a remote file system.
        is_written: Whether it is; a ``fast_dev_run`` leaves nothing behind.
    """

    path: Location
    is_written: bool

    @classmethod
    def of(cls, trainer: pl.Trainer, path: str | Path | None, config: object) -> Self:
        """Return the file of a Trainer's run, after a look whether it can be written.

        Args:
            trainer: The Trainer.
            path: The user's choice; ``None`` means ``record.txt`` in the Trainer's ``default_root_dir``. ``~``
                is the home folder; both may be remote, such as ``s3://bucket/record.txt``.
            config: The configuration, which may be a file.

        Raises:
            OSError: If it cannot be written.
            ValueError: If it is the file of the configuration.
        """
        final = location(path) if path else beside(trainer.default_root_dir, "record.txt")
        if isinstance(final, Path):
            final = final.absolute()  # now: a run may change the current folder
        if trainer.is_global_zero:
            check_writable(final, "record file")
            if isinstance(config, (str, Path)) and Path(location(config)).resolve() == Path(final).resolve():
                raise ValueError(
                    f"record_file '{final}' is the configuration file, which would be overwritten. Give the record a "
                    "path of its own."
                )
        return cls(final, not trainer.fast_dev_run)  # type: ignore[attr-defined]

    def write(self, text: str | None) -> None:
        """Write a record; without a usable one, and in a ``fast_dev_run``, the last written one stays.

        Args:
            text: The record, or ``None``.
        """
        if text is not None and self.is_written:
            with unwritten_told(self.path):
                write_text(self.path, text)


def record_path(checkpoint_path: str | Path) -> Location:
    """Return where the record of a checkpoint is.

    Example:
        >>> record_path("run/epoch=3.ckpt"), record_path("s3://bucket/epoch=3.ckpt")
        (PosixPath('run/epoch=3.record.txt'), 's3://bucket/epoch=3.record.txt')
    """
    place = location(checkpoint_path)
    if isinstance(place, str):
        return place.removesuffix(".ckpt") + ".record.txt"
    return place.with_name(place.name.removesuffix(".ckpt") + ".record.txt")


def put_record(checkpoint_path: str | Path, text: str | None) -> None:
    """Write the record beside a checkpoint, or remove the one that is there.

    Args:
        checkpoint_path: The checkpoint.
        text: The record, ``None`` if there is none.
    """
    if text is None:
        remove(record_path(checkpoint_path))
    else:
        write_text(record_path(checkpoint_path), text)


@contextmanager
def record_along(checkpoint_path: str | Path, text: str | None) -> Iterator[None]:
    """Put the record beside a checkpoint in its place when a block has written that; if it fails the old one stays.

    The record is on the disk, under another name, before the block begins. A kill between the two leaves a checkpoint
    with another record beside it, which whoever loads it notices. A record that cannot be written costs a warning.

    Args:
        checkpoint_path: The checkpoint.
        text: The record, ``None`` if there is none.
    """
    final, waiting = record_path(checkpoint_path), None
    is_kept_apart = text is not None and isinstance(final, Path)
    if is_kept_apart:
        with unwritten_told(final):
            waiting = _prepared(final, text)
    try:
        yield
    except BaseException:
        if waiting is not None:
            waiting.__exit__(*sys.exc_info())
        raise
    with unwritten_told(final):
        if waiting is not None:
            waiting.close()
        elif not is_kept_apart:
            put_record(checkpoint_path, text)


def _prepared(path: Location, text: str | None) -> ExitStack:
    """Write a record under another name; closing what is returned puts it in its place."""
    with ExitStack() as stack:
        stack.enter_context(atomic_path(path)).write_text(text or "", encoding="utf-8")
        return stack.pop_all()


@contextmanager
def unwritten_told(path: Location) -> Iterator[None]:
    """Turn an error of a record file into a warning: a run goes on without, as the checkpoint has the record.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        rank_zero_warn(
            f"The record '{path}' could not be written: {error.strerror or error}. The checkpoint has it as well: "
            "'amct-lightning record extract' takes it out."
        )


@rank_zero_only
def copy_records_of_links(checkpoint_callbacks: Iterable[Any]) -> None:
    """Give a last checkpoint that is a link (``save_last="link"``), which no CheckpointIO saves, its record.

    Args:
        checkpoint_callbacks: The Trainer's checkpoint callbacks.
    """
    for callback in checkpoint_callbacks:
        path = Path(getattr(callback, "last_model_path", ""))
        if path.is_symlink():
            original = read_bytes(record_path(path.resolve()))
            put_record(path, None if original is None else original.decode())


def record_text(model: nn.Module) -> str | None:
    """Return the present record, or ``None`` while calibrating or when a factor is not finite.

    Layers that no training batch reaches are not waited for; it lacks them, and a warning names each once.

    Args:
        model: The converted module.
    """
    if not is_calibrated(model):
        return None
    try:
        return QuantRecord.from_model(model).to_text()
    except ValueError as error:
        rank_zero_warn(f"The record was not written, the last good one stays: {error}")
        return None


def present_record(trainer: pl.Trainer, model: nn.Module) -> str | None:
    """Return the present record on rank zero; with sharded weights a collective.

    Args:
        trainer: The Trainer.
        model: The converted module.

    Returns:
        The record, or ``None`` if there is none yet, or on other ranks.
    """
    everywhere = is_sharded(model)
    if everywhere and isinstance(trainer.strategy, ShardingStrategy):
        trainer.strategy.share_buffers()  # statistics differ among ranks, and all must gather the same weights
    text = record_text(model) if everywhere or trainer.is_global_zero else None
    return text if trainer.is_global_zero else None


def record_of(model: nn.Module, submodule: str | None, tensors: Mapping[str, Tensor], text: str | None) -> str | None:
    """Return the record of a checkpoint, whose tensors weight averaging may have put in place of the model's.

    Args:
        model: The converted module.
        submodule: Its dotted name in the LightningModule, ``None`` if it is all of it.
        tensors: The ``state_dict`` in the checkpoint.
        text: The record of the model as it is.
    """
    prefix, live = f"{submodule}." if submodule else "", model.state_dict()
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    is_plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in live.values())
    if not is_plain or not live.keys() <= tensors.keys():
        return text  # a sharded or partial state, which this process cannot look into
    if all(tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in live.items()):
        return text
    quantizers = activation_quantizers(model).values()
    kept = {name: tensor.clone() for name, tensor in live.items()}
    books = [(quantizer.observed, quantizer.poison, quantizer.batches, quantizer.missed) for quantizer in quantizers]
    try:
        model.load_state_dict({name: tensors[name] for name in live})
        return record_text(model)
    finally:
        model.load_state_dict(kept)
        for quantizer, book in zip(quantizers, books, strict=True):
            quantizer.observed, quantizer.poison, quantizer.batches, quantizer.missed = book
