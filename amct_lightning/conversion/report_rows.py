"""The layers in a conversion report: what is known of each, and how a table shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from amct_lightning.conversion.plan import LayerPlan, QuantPlan
from amct_lightning.wording import TEXT_BOX, cut_off

MISSED = "no training batch has reached it, so that it has no range: evaluated in float, not in the record"
TITLES = ("Layer", "Type", "Quantized", "Notes")

_NOTES_WIDTH = 22
_GAP = 2
_INPUTS = {"per_token": "input scale per token", "none": "input in float"}


@dataclass(frozen=True)
class ReportRow:
    """One layer of a supported type. Of a layer in float only the name, the type and the reason are known.

    Attributes:
        name: Its dotted name, as in the config and the record.
        type: Name of its float class.
        bits: Widths of activations and weights, such as ``"A8W8"``; ``"W8"`` if activations stay in float.
        weight_algo: ``"arq_retrain"`` or ``"ulq_retrain"``.
        channel_wise: Whether each output channel has its own weight scale.
        group_size: How many inputs of an output channel share a weight scale; 0 for all.
        fixed_min: Whether the lower end of its input range stays 0.
        batch_norm: Name of the BatchNorm whose factor its weight scales in the record contain.
        shares_with: Names of the other layers that use the same activation quantizer.
        calls: How often it is called in one forward.
        reason: Why it stays in float; ``None`` if it is quantized.
        input: How its input is quantized if that is not by a range whose ends are both learned.
    """

    name: str
    type: str
    bits: str = ""
    weight_algo: str = ""
    channel_wise: bool = False
    group_size: int = 0
    fixed_min: bool = False
    batch_norm: str | None = None
    shares_with: tuple[str, ...] = ()
    calls: int = 1
    reason: str | None = None
    input: str = ""

    @property
    def quantized(self) -> bool:
        """Whether the layer is quantized."""
        return self.reason is None


def quantized_row(layer: LayerPlan, kind: str, plan: QuantPlan, sharing: Mapping[str, Sequence[str]]) -> ReportRow:
    """Return the row of a quantized layer.

    Args:
        layer: Its plan.
        kind: Name of its float class.
        plan: The plan that it belongs to.
        sharing: What :meth:`QuantPlan.sharing` says.
    """
    data, weight = plan.config[layer.name].retrain_data_config, plan.config[layer.name].retrain_weight_config
    others = list(sharing[layer.shares_input_of])
    others.remove(layer.name)
    return ReportRow(
        name=layer.name,
        type=kind,
        bits=f"A{data.num_bits}W{weight.num_bits}" if data.is_quantized else f"W{weight.num_bits}",
        weight_algo=weight.algo,
        channel_wise=bool(weight.channel_wise),
        group_size=weight.group_size or 0,
        fixed_min=layer.fixed_min,
        batch_norm=layer.batch_norm,
        shares_with=tuple(others),
        calls=layer.calls,
        input=_INPUTS.get(data.algo, "symmetric input" if data.symmetric else ""),
    )


class LayerTable:
    """The rows as a table that breaks names at their dots where the width demands it."""

    def __init__(self, rows: tuple[ReportRow, ...]) -> None:
        self.cells = [as_cells(row) for row in rows]
        self.quantized = [row.quantized for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        longest = [max((len(cell) for cell in column), default=0) for column in zip(*self.cells, strict=True)]
        free = options.max_width - max(longest[1], 4) - max(longest[2], 9) - 3 * _GAP
        notes = min(longest[3], max(_NOTES_WIDTH, free - longest[0]))
        table = Table(box=TEXT_BOX, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        for title in TITLES[:-1]:
            table.add_column(title, no_wrap=True)
        table.add_column(TITLES[-1], overflow="fold")
        for (name, *others), quantized in zip(self.cells, self.quantized, strict=True):
            table.add_row(*map(Text, (_broken(name, free - notes), *others)), style=None if quantized else "dim")
        yield table


def as_cells(row: ReportRow) -> tuple[str, str, str, str]:
    """Return what a table shows of a layer, see :data:`TITLES`.

    Args:
        row: The layer.
    """
    return row.name, row.type, _settings(row), _notes(row)


def _broken(name: str, width: int) -> str:
    """Break a dotted name before dots so that its lines are no longer than ``width``, if its components allow that."""
    lines = [""]
    for part in name.replace(".", "\n.").splitlines():
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append(" ")
        lines[-1] += part
    return "\n".join(lines)


def _settings(row: ReportRow) -> str:
    if not row.quantized:
        return "float"
    scales = f"/g{row.group_size}" if row.group_size else "/ch" if row.channel_wise else ""
    return f"{row.bits} {row.weight_algo.split('_')[0].upper()}{scales}"


def _notes(row: ReportRow) -> str:
    if row.reason is not None:
        return row.reason
    notes = []
    if row.fixed_min:
        notes.append("input >= 0")
    if row.input:
        notes.append(row.input)
    if row.batch_norm is not None:
        notes.append(f"folds {_relative(row.batch_norm, row.name)}")
    if row.shares_with:
        notes.append(f"shares input with {cut_off(row.shares_with, partial(_relative, to=row.name))}")
    if row.calls > 1:
        notes.append(f"called {row.calls} times")
    return "; ".join(notes)


def _relative(name: str, to: str) -> str:
    """Leave out what a name has in common with its neighbour's, whole components only; a dot stands for it."""
    parts, others = name.split("."), to.split(".")
    common = 0
    while common < min(len(parts), len(others)) - 1 and parts[common] == others[common]:
        common += 1
    return ("." if common else "") + ".".join(parts[common:])
