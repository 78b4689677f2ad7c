"""The outputs of a file against those of the model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from amct_lightning.export.verify.expected import ExpectedLayer
from amct_lightning.export.verify.report import OutputReport

_SAME = 0.99
"""The least part of an output of integers, such as classes, that must be equal: a tie of floats may go either way."""


def output_step(layers: Iterable[ExpectedLayer]) -> float | None:
    """Return by how much one code of the last quantized layer's input can move an output at most.

    It is the scale of the input times the largest weight: ``s_d * s_w * |w|``.

    Args:
        layers: The layers from which the output is computed with no other one in between.
    """
    products = [product for layer in layers for product in (layer.input, layer.hidden) if product is not None]
    return max((float(np.abs(p.codes.astype(np.int64)).max() * p.scale.max()) for p in products), default=None)


class OutputComparison:
    """One output, compared as batches come.

    Args:
        name: Name of the output in the file.
        step: See :func:`output_step`.
    """

    def __init__(self, name: str, step: float | None) -> None:
        self.name, self.step = name, step
        self.values = self.rows = self.same = self.ties = 0
        self.largest = self.total = 0.0

    def add(self, found: np.ndarray, wanted: np.ndarray) -> None:
        """Compare the output of the whole network on a batch.

        Args:
            found: What the file gives.
            wanted: What the model gives.

        Raises:
            ValueError: If the shapes differ.
        """
        if found.shape != wanted.shape:
            raise ValueError(f"output '{self.name}' has shape {list(found.shape)} instead of {list(wanted.shape)}")
        with np.errstate(invalid="ignore"):
            difference = np.asarray(np.abs(found.astype(np.float64) - wanted.astype(np.float64)))
        difference[found == wanted] = 0.0  # infinities, of masks, among them
        self.values += difference.size
        self.total += float(difference.sum())
        self.largest = float(np.maximum(self.largest, difference.max(initial=0.0)))  # keeps NaN
        if wanted.dtype.kind == "f" and wanted.ndim >= 2 and wanted.shape[-1] >= 2:
            self._add_top(found.reshape(-1, wanted.shape[-1]), wanted.reshape(-1, wanted.shape[-1]))

    def glue_fault(self, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> str | None:
        """Say how an output differs that the file computes from the model's outputs of the last layers.

        Args:
            found: What the file gives.
            wanted: What the model gives.
            tolerance: Up to which part of the range that is rounding.
        """
        if found.shape != wanted.shape:
            return f"shape {list(found.shape)} instead of {list(wanted.shape)}"
        if wanted.dtype.kind != "f":
            same = float((found == wanted).mean()) if wanted.size else 1.0
            return None if same >= _SAME else f"{1 - same:.1%} of it differ"
        finite = np.isfinite(wanted)
        if not np.array_equal(finite, np.isfinite(found)) or not np.array_equal(found[~finite], wanted[~finite], True):
            return "infinite or NaN values differ"
        difference = np.abs(found[finite].astype(np.float64) - wanted[finite]).max(initial=0.0)
        largest = np.abs(wanted[finite]).max(initial=1e-30)
        return None if difference <= tolerance * largest else f"it differs by {difference / largest:.1%} of its range"

    def report(self) -> OutputReport:
        """Return what was found."""
        unit = self.step or 1.0
        mean = self.total / max(self.values, 1)
        return OutputReport(self.name, self.step, self.largest / unit, mean / unit, self.rows, self.same, self.ties)

    def _add_top(self, found: np.ndarray, wanted: np.ndarray) -> None:
        rows = np.arange(len(wanted))
        one, other = found.argmax(-1), wanted.argmax(-1)
        gap = np.abs(wanted[rows, one].astype(np.float64) - wanted[rows, other])
        self.rows += len(wanted)
        self.same += int((one == other).sum())
        self.ties += int(((one != other) & (gap <= 0.5 * (self.step or 0.0))).sum())
