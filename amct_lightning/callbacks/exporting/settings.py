"""What to export at the end of a training, and where to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import lightning.pytorch as pl

from amct_lightning.export.libraries import need
from amct_lightning.files import Location, beside

ExportForm = Literal["deploy", "fake_quant", "qdq"]
_FORMS = get_args(ExportForm)


@dataclass(frozen=True)
class ExportSettings:
    """The export of a training.

    Attributes:
        forms: The forms to write, see :func:`~amct_lightning.export_onnx`.
        folder: The folder; ``None`` for ``export`` in the Trainer's ``default_root_dir``.
        verify_batches: On how many evaluation batches to verify what is written; 0 for none.
    """

    forms: tuple[ExportForm, ...]
    folder: str | Path | None
    verify_batches: int

    @classmethod
    def of(
        cls, export: str | Sequence[str] | None, folder: str | Path | None, verify_batches: int
    ) -> ExportSettings | None:
        """Check the arguments of the callback.

        Args:
            export: One form or several; ``None`` or none for no export.
            folder: Where the files go.
            verify_batches: The number of batches.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a value is not allowed.
            ModuleNotFoundError: If ONNX's libraries are needed and not installed.

        Example:
            >>> ExportSettings.of("qdq", None, 0)
            ExportSettings(forms=('qdq',), folder=None, verify_batches=0)
        """
        forms = [export] if isinstance(export, str) else list(export or ())
        unknown = [form for form in forms if form not in _FORMS]
        if unknown:
            raise ValueError(
                f"QuantRetrainCallback: export has {unknown[0]!r}; the forms are {', '.join(map(repr, _FORMS))}."
            )
        if isinstance(verify_batches, bool) or not isinstance(verify_batches, int):
            raise TypeError(
                f"QuantRetrainCallback: verify_batches is {verify_batches!r}; it must be a number of batches."
            )
        if verify_batches < 0:
            raise ValueError(f"QuantRetrainCallback: verify_batches is {verify_batches}; it must be 0 or more.")
        if not forms:
            return None
        need("onnx", "onnx_ir", "onnxscript", *(["onnxruntime"] if verify_batches else []))
        return cls(tuple(dict.fromkeys(forms)), folder, verify_batches)  # type: ignore[arg-type]

    def file(self, trainer: pl.Trainer, name: str) -> Location:
        """Return where a file goes.

        Args:
            trainer: The Trainer.
            name: Its name.
        """
        folder = beside(trainer.default_root_dir, "export") if self.folder is None else self.folder
        return beside(folder, name)
