"""What ``amct-lightning export`` does: the files, what is said of them, and the proof that they are the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from torch import nn

from amct_lightning.commands.base import UserError
from amct_lightning.commands.export.batches import random_batches, read_batches
from amct_lightning.commands.export.checkpoint import load_part
from amct_lightning.commands.export.device import find_device
from amct_lightning.commands.export.files import Network, need_onnx, prefix_of, written_along
from amct_lightning.commands.export.inputs import batch_axes, example_input
from amct_lightning.commands.export.table import remarks, written_table
from amct_lightning.commands.export.verification import verify
from amct_lightning.commands.output import short_warnings, show
from amct_lightning.conversion.plan import find_plan
from amct_lightning.export.atc import compile_command, compile_script
from amct_lightning.export.checks import check_forms
from amct_lightning.files import check_writable, location, write_text
from amct_lightning.graph.forward import InputData
from amct_lightning.record import QuantRecord

if TYPE_CHECKING:
    from amct_lightning.export.forms import Form
    from amct_lightning.export.report import ExportReport


def export(options: Namespace, forms: Sequence[Form]) -> int:
    """Export a checkpoint, and verify the files if that is asked for.

    Args:
        options: The options of the command.
        forms: The forms to write, in this order.

    Returns:
        The exit status: 1 if a file departs from the model.
    """
    is_verified = options.batches is not None or options.verify is not None
    need_onnx(*(["onnxruntime"] if is_verified else []))
    prefix = prefix_of(options.output, options.checkpoint)
    if is_verified and isinstance(location(prefix), str):
        raise UserError(
            f"--output {options.output}: files on a remote file system cannot be verified. Export to a folder here "
            "and copy them, or leave --batches and --verify out."
        )
    check_writable(_record_file(prefix), "record")
    with short_warnings():
        model = load_part(options)
        found = find_plan(model)
        if found is not None:
            check_forms(found[1], forms)
        input_data = example_input(options.input_shape or [], model, options.dynamic_batch)
        batches = [] if options.batches is None else read_batches(options.batches, model)
        target = find_device(model, options.target, options.soc_version)
        reports = _export(options, forms, model, input_data, prefix)
        _tell(reports, prefix, target, options.soc_version)
        if not is_verified:
            return 0
        sys.stdout.write("\n")
        networks = {form: Network(report.path, form, dict(report.inputs)) for form, report in reports.items()}
        given = batches or random_batches(input_data, options.verify)
        return verify(model, networks, given, options.verify, is_random=not batches)


def _export(
    options: Namespace, forms: Sequence[Form], model: nn.Module, input_data: InputData, prefix: str
) -> dict[Form, ExportReport]:
    from amct_lightning.export.onnx_file import Settings, export_forms  # noqa: PLC0415
    from amct_lightning.export.tracing.base_graph import Choices  # noqa: PLC0415  (needs ONNX, which may not be installed)

    axes = batch_axes(model, input_data) if options.dynamic_batch else None
    files = {form: f"{prefix}_{form}_model.onnx" for form in forms}
    record = None if options.record is None else QuantRecord.load(options.record)
    text = (record or QuantRecord.from_model(model)).to_text()
    with written_along(_record_file(prefix), text):
        settings = Settings(Choices(dynamic_axes=axes, opset=options.opset))
        return export_forms(model, files, input_data, record, settings, f"'{options.record}'")


def _tell(reports: Mapping[Form, ExportReport], prefix: str, target: str | None, soc_version: str | None) -> None:
    show(written_table(reports.values()))
    lines = remarks(next(iter(reports.values())))
    lines.append(f"The record of this checkpoint is in '{_record_file(prefix)}'.")
    if "deploy" in reports:
        command = compile_command(reports["deploy"], target, soc_version)
        write_text(f"{prefix}_atc.sh", compile_script(reports["deploy"], target, soc_version))
        lines.append(f"Compile it for the device where CANN is installed, with this or '{prefix}_atc.sh':\n{command}")
    sys.stdout.write("\n".join(lines) + "\n")


def _record_file(prefix: str) -> str:
    return f"{prefix}_record.txt"
