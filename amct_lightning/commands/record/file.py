"""Reading a record for the command: from a record file, or out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amct_lightning.commands.base import UserError
from amct_lightning.record import QuantRecord, proto_text

_ZIP = b"PK\x03\x04"  # what torch.save writes begins like this


def read_text(path: str) -> tuple[bytes, str]:
    """Return the text of a record, and what it is called in messages.

    Args:
        path: A record file, or a checkpoint that has a record in it.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is a folder, or a checkpoint without a record.
    """
    if Path(path).is_dir():
        raise UserError(f"'{path}' is a folder. Give a record file or a checkpoint.")
    try:
        with Path(path).open("rb") as file:
            content = file.read(len(_ZIP))
            if content != _ZIP:
                return content + file.read(), path
    except FileNotFoundError:
        raise UserError(f"there is no file '{path}'. Give a record file or a checkpoint.") from None
    return extract(path).encode(), f"the record in {path}"


def read_record(path: str) -> QuantRecord:
    """Return the record in a record file or checkpoint.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not a valid record.
    """
    return QuantRecord.from_text(*read_text(path))


def find_problems(text: bytes) -> tuple[int, list[str]]:
    """Check the text of a record.

    Args:
        text: The text.

    Returns:
        The number of its layers, and what is wrong: the first problem of each layer, or that of the text.

    Example:
        >>> find_problems(b'record { key: "fc" value { scale_d: 0 offset_d: 0 scale_w: 1 offset_w: 0 } }')
        (1, ["layer 'fc': scale_d is 0.0; a scale must be finite and greater than 0 in float32."])
    """
    try:
        layers, _ = proto_text.read(text)
    except ValueError as error:
        return 0, [str(error)]
    problems = []
    for name, layer in layers.items():
        try:
            QuantRecord({name: layer}).validate()
        except ValueError as error:
            problems.append(str(error))
    return len(layers), problems


def extract(path: str) -> str:
    """Return the text of the record in a checkpoint; nothing in the file is executed.

    Args:
        path: The checkpoint.

    Raises:
        UserError: If it has none.
        RuntimeError: If it is no checkpoint, or cannot be read without running code.
    """
    from amct_lightning.checkpoint_file import CHECKPOINT_KEY, read_foreign_checkpoint  # noqa: PLC0415  (torch)

    entry: Any = read_foreign_checkpoint(path)[0].get(CHECKPOINT_KEY)
    if not isinstance(entry, dict):
        raise UserError(
            f"'{path}' has no record: it was not written in training with QuantRetrainCallback. (The record of a model "
            "without Lightning is the record_file of create_quant_retrain_model.)"
        )
    text = entry.get("record")
    if not isinstance(text, str):
        raise UserError(
            f"'{path}' has no record: it was saved before the calibration was complete, or with factors that are not "
            "finite. Take a later checkpoint."
        )
    QuantRecord.from_text(text, f"the record in {path}")
    return text
