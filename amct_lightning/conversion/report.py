"""What the conversion did to a model, layer by layer, as a table for people; and what of it is worth a second look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.conversion.report_rows import MISSED, TITLES, LayerTable, ReportRow, as_cells, quantized_row
from amct_lightning.graph.eligibility import NOT_REACHED
from amct_lightning.layer_types import supported_class
from amct_lightning.modules import QATLayer
from amct_lightning.modules.fused.choice import execution_of, without_integers
from amct_lightning.wording import abbreviated, as_html, as_text, cut_off

_NARROW = 17
_ON_GRID = "They compute with what the device computes with (deploy_grid=True)."
_SERVED = "Linear layers of INT8 compute with what servers compute with, in {} (target serving)."
_EXECUTED = {
    "compiled": "Their quantizers run as compiled kernels",
    "integer": "Their products are computed in integers in forward",
}
_LEGEND = "A8W8: bits of activations and weights; ARQ, ULQ: weight scales, /ch: per channel"


@dataclass(frozen=True, repr=False)
class ConversionReport:
    """The result of a conversion; it shows itself as a table, in a notebook as HTML, in rich in colours.

    Attributes:
        rows: One per layer of a supported type, in module order.
        warnings: What often costs accuracy or speed, one line per kind.
        float_parts: Products, softmax, norms and modules with parameters that are no such layers and stay in float,
            and how many of each.
        target: The generation of hardware that the settings were checked for, if that was asked for.
        deploy_grid: Whether the layers compute with what the device computes with.
        serving: The dtype that servers have, if the layers compute with what these compute with.
        execution: What runs their quantizers, where the model was when the report was made.
    """

    rows: tuple[ReportRow, ...]
    warnings: tuple[str, ...] = ()
    float_parts: tuple[tuple[str, int], ...] = ()
    target: str | None = None
    deploy_grid: bool = False
    serving: str | None = None
    execution: str = "composite"

    def __rich__(self) -> RenderableType:
        """Give rich what it shows."""
        notes = "\n".join(self._notes)
        table = LayerTable(self.rows)
        return Group(Text(f"{self._head}\n"), table, *([Text(f"\n{notes}", style="yellow")] if notes else []))

    def __str__(self) -> str:
        """Give the table as plain text that fits the terminal."""
        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Give the table to a notebook."""
        return as_html(self._head, TITLES, map(as_cells, self.rows), self._notes)

    @property
    def _head(self) -> str:
        aim = "" if self.target is None else f" for target {self.target}"
        head = f"{sum(row.quantized for row in self.rows)} of {len(self.rows)} layers are quantized{aim} ({_LEGEND})."
        grid = [_ON_GRID] if self.deploy_grid else [_SERVED.format(self.serving)] if self.serving else []
        if self.execution in _EXECUTED:
            grid.append(f"{_EXECUTED[self.execution]} (execution='{self.execution}').")
        return "\n".join([head, *grid, *([f"{beside(self.float_parts)}."] if self.float_parts else [])])

    @property
    def _notes(self) -> list[str]:
        return [f"Note: {warning}." for warning in self.warnings]


def conversion_report(model: nn.Module) -> ConversionReport:
    """Tell what the conversion did to each layer of a model.

    Args:
        model: A converted model, or a wrapper around one such as a LightningModule.

    Returns:
        The report, which shows itself as a table.

    Raises:
        ValueError: If the model is not converted.

    Example:
        >>> import torch
        >>> from amct_lightning import prepare_qat
        >>> model = nn.Sequential(nn.Conv2d(32, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
        >>> report = conversion_report(prepare_qat(model, {"skip_layers": ["4"]}, torch.randn(1, 32, 3, 3)))
        >>> [(row.name, row.bits, row.batch_norm, row.reason) for row in report.rows]
        [('0', 'A8W8', '1', None), ('4', '', None, 'disabled in the config')]
    """
    found = find_plan(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} is not converted, so there is nothing to report. Convert it first, e.g. with "
            "prepare_qat(model, config, input_data)."
        )
    root, plan = found
    modules: dict[str, nn.Module] = dict(root.named_modules())
    rows = {layer.name: ReportRow(layer.name, layer.type, reason=layer.reason) for layer in plan.refused}
    planned = {layer.name: layer for layer in plan.layers}
    missed = {name for name in planned if cast(QATLayer, modules[name]).is_missed}
    sharing = plan.sharing()
    for name in (name for name in plan.config if name not in rows):
        kind = supported_class(modules[name]).__name__
        rows[name] = (
            quantized_row(planned[name], kind, plan, sharing)
            if name in planned and name not in missed
            else ReportRow(name, kind, reason=MISSED if name in missed else "disabled in the config")
        )
    ordered = tuple(rows[name] for name in modules if name in rows)
    notes = *_warnings(ordered, plan, modules), *_in_float(root)
    computes_as = plan.deploy_grid, plan.serving, execution_of(root)
    return ConversionReport(ordered, notes, plan.float_parts, plan.target, *computes_as)


def beside(float_parts: Iterable[tuple[str, int]]) -> str:
    """Say what stays in float and is no layer of the table.

    Args:
        float_parts: Kinds and how many of each.

    Example:
        >>> beside([("scaled_dot_product_attention", 2), ("LayerNorm", 5)])
        'In float beside these layers: 2 scaled_dot_product_attention, 5 LayerNorm'
    """
    return f"In float beside these layers: {cut_off(f'{count} {kind}' for kind, count in float_parts)}"


def _warnings(rows: tuple[ReportRow, ...], plan: QuantPlan, modules: dict[str, nn.Module]) -> Iterator[str]:
    def quantized(condition: Callable[[ReportRow, nn.Module], bool]) -> list[str]:
        return [row.name for row in rows if row.quantized and condition(row, modules[row.name])]

    if names := quantized(lambda _, layer: _input_channels(layer) < _NARROW):
        yield (
            f"fewer than {_NARROW} input channels: often loses more accuracy than it saves time: {abbreviated(names)}"
        )
    if names := quantized(lambda row, _: row.name in plan.ends):
        yield f"first or last layer is quantized: these are commonly kept in higher precision: {abbreviated(names)}"
    if names := quantized(lambda row, layer: _is_depthwise(layer) and not row.channel_wise):
        yield f"depthwise with one weight scale for all channels: channel_wise is more accurate: {abbreviated(names)}"
    if names := [layer.name for layer in plan.layers if plan.wastes_integers(layer)]:
        yield f"input never negative, yet integers for values below 0: set fixed_min to true: {abbreviated(names)}"
    if names := [layer.name for layer in plan.layers if plan.is_half_used(layer)]:
        yield f"input never negative, yet its range is around 0: set symmetric to false: {abbreviated(names)}"
    if names := [row.name for row in rows if row.reason == NOT_REACHED]:
        yield f"never reached by input_data, so in float: give one that reaches all branches: {abbreviated(names)}"
    if names := [row.name for row in rows if row.reason == MISSED]:
        yield f"never reached in training, so in float: train them, or add them to skip_layers: {abbreviated(names)}"


def _in_float(root: nn.Module) -> Iterator[str]:
    for why, names in without_integers(root).items():
        yield f"products in float in spite of execution='integer': {why}: {abbreviated(names)}"


def _input_channels(layer: nn.Module) -> int:
    sizes = (getattr(layer, name, None) for name in ("in_channels", "in_features", "input_size"))
    return int(next(size for size in sizes if size is not None))


def _is_depthwise(layer: nn.Module) -> bool:
    groups = getattr(layer, "groups", 1)
    return bool(groups > 1 and groups == getattr(layer, "in_channels", None))
