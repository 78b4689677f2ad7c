"""What an export has written, as a table."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from amct_lightning.commands.output import new_table
from amct_lightning.files import location

if TYPE_CHECKING:
    from amct_lightning.export.report import ExportReport


def written_table(reports: Iterable[ExportReport]) -> Table:
    """Return a table of exported networks, one a line.

    Args:
        reports: What was written.
    """
    table = new_table("form", "file", ">size", ">opset", "exporter", ">layers")
    for report in reports:
        row = (report.form, report.path, _size(report.path), str(report.opset), report.exporter, str(report.layers))
        table.add_row(*row)
    return table


def remarks(report: ExportReport) -> list[str]:
    """Return what is to be said of an export besides, a line each.

    Args:
        report: One of its networks; these things are the same for all forms.
    """
    known = {axis for shape in report.inputs.values() for axis in shape}
    lines = [f"Input: {_values(report.inputs, known)}. Output: {_values(report.outputs, known)}."]
    lines += [f"Not possible with {attempt}: {error}" for attempt, error in report.failed.items()]
    if report.dropped:
        lines.append(f"The network returns tensors only, not {', '.join(report.dropped)}.")
    return lines


def _values(shapes: Mapping[str, tuple[int | str, ...]], known: Container[int | str]) -> str:
    """List inputs or outputs; an axis of any length of which no input tells is a question mark."""
    listed = []
    for name, shape in shapes.items():
        axes = [str(axis) if isinstance(axis, int) or axis in known else "?" for axis in shape]
        listed.append(f"{name} {'x'.join(axes) or 'scalar'}")
    return ", ".join(listed)


def _size(path: str) -> str:
    """Return the size of a network with its file of constants, if it has one; of a remote one nothing is known."""
    place = location(path)
    if not isinstance(place, Path):
        return ""
    files = [file for file in (place, place.with_name(f"{place.name}.data")) if file.exists()]
    size, units = float(sum(file.stat().st_size for file in files)), ["GB", "MB", "KB", "B"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop()
    return f"{size:.3g} {units[-1]}"
