"""Exporting a converted model: one graph, as many forms of it as asked for, each in a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from torch import nn

from amct_lightning.export.axes import name_axes
from amct_lightning.export.checks import check_exportable, check_forms, check_record
from amct_lightning.export.forms import FORMS, Form, write_form
from amct_lightning.export.report import ExportReport
from amct_lightning.export.tracing.base_graph import BaseGraph, Choices, build_graph
from amct_lightning.export.tracing.prepared import Prepared, prepare, uncompiled
from amct_lightning.export.trial import RunsAsTrained
from amct_lightning.export.write import save_models
from amct_lightning.files import check_writable
from amct_lightning.graph.forward import InputData
from amct_lightning.record import QuantRecord

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How networks are written.

    Attributes:
        choices: Names of inputs and outputs, their dynamic axes, opset and exporter.
        external_data_threshold: Networks whose constants take more bytes have them in a file beside them.
    """

    choices: Choices = field(default_factory=Choices)
    external_data_threshold: int = 2**31 - 2**20


def export_forms(
    model: nn.Module,
    files: Mapping[Form, str | Path],
    input_data: InputData,
    record: QuantRecord | None = None,
    settings: Settings | None = None,
    source: str = "record",
) -> dict[Form, ExportReport]:
    """Write a converted model in several forms: all files, or none.

    Args:
        model: A calibrated model in eval mode.
        files: Form -> file.
        input_data: Input for which it works.
        record: The factors to use; ``None`` for those that the model has now.
        settings: How the networks are written; ``None`` for the defaults.
        source: Where the record comes from, for messages.

    Returns:
        What was written, by form.
    """
    for form, path in files.items():
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; it must be one of {', '.join(map(repr, FORMS))}.")
        check_writable(path, f"{form} network")
    settings = settings or Settings()
    model = uncompiled(model)
    plan = check_exportable(model)
    check_forms(plan, files)
    if record is not None:
        check_record(record, model, plan, source)
    prepared = prepare(model, record)
    check = RunsAsTrained.of(prepared, input_data, settings.choices.inputs)
    base = build_graph(prepared, input_data, settings.choices, check)
    name_axes(base, prepared, settings.choices.dynamic_axes)
    reports: dict[Form, ExportReport] = {}

    def models() -> Iterator[tuple[str, ir.Model]]:
        for form, path in files.items():
            made = write_form(base, prepared, form)
            reports[form] = _report(form, path, base, prepared, made)
            yield str(path), made

    save_models(models(), settings.external_data_threshold)
    for report in reports.values():
        _logger.info("%s", report)
    return reports


def _report(form: Form, path: str | Path, base: BaseGraph, prepared: Prepared, model: ir.Model) -> ExportReport:
    return ExportReport(
        path=str(path),
        form=form,
        opset=model.opset_imports[""],
        exporter=base.exporter,
        layers=len(prepared.plan.layers),
        inputs={str(value.name): _shape(value) for value in model.graph.inputs},
        outputs={str(value.name): _shape(value) for value in model.graph.outputs},
        failed=dict(base.failed),
        dropped=tuple(base.dropped),
    )


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    axes = () if value.shape is None else tuple(value.shape)
    return tuple(axis if isinstance(axis, int) else axis.value or "?" for axis in axes)
