"""``amct-lightning export``: the quantized network of a checkpoint as ONNX files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from torch import nn
from typing_extensions import override

from amct_lightning.commands.base import ParsedCommand, UserError
from amct_lightning.commands.export.batches import random_batches, read_batches
from amct_lightning.commands.export.checkpoint import load_part
from amct_lightning.commands.export.device import find_device
from amct_lightning.commands.export.files import FORMS, Network, need_onnx, prefix_of, written_along
from amct_lightning.commands.export.inputs import batch_axes, example_input
from amct_lightning.commands.export.table import remarks, written_table
from amct_lightning.commands.export.verification import verify
from amct_lightning.commands.model_input import add_model_options, spelled_out
from amct_lightning.commands.output import short_warnings, show
from amct_lightning.export.atc import compile_command, compile_script
from amct_lightning.files import check_writable, location, write_text
from amct_lightning.graph.forward import InputData
from amct_lightning.record import QuantRecord
from amct_lightning.targets import TARGETS

if TYPE_CHECKING:
    from amct_lightning.export.forms import Form
    from amct_lightning.export.report import ExportReport

_EPILOG = """\
examples:
  amct-lightning export last.ckpt --model run.yaml --input-shape 1,3,32,32
  amct-lightning export last.ckpt --model my_module.Classifier --form deploy fake_quant qdq --output out/
  amct-lightning export last.ckpt --model my_module.Classifier --target A2 --soc-version Ascend910B3
  amct-lightning export last.ckpt --model my_module.Classifier --batches test_images.pt
  amct-lightning export last.ckpt --model my_module.Bert --dynamic-batch \\
      --input-shape input_ids=1,128:int64 --input-shape attention_mask=1,128:int64

The files; PREFIX is the name of the checkpoint unless --output says otherwise:
  PREFIX_deploy_model.onnx      what ATC, the Ascend compiler, takes
  PREFIX_fake_quant_model.onnx  the deployed network computed in float, for onnxruntime
  PREFIX_qdq_model.onnx         QuantizeLinear and DequantizeLinear, for onnxruntime and other compilers
  PREFIX_record.txt             the record of this very checkpoint
  PREFIX_atc.sh                 the command line of ATC, beside the deploy form

The networks appear together, or none does; files of these names are replaced. With --batches or --verify they are
compared with the model, layer by layer, and the exit status is 1 if one departs from it; 'amct-lightning verify' does
the same later, and its help says what is in the file of batches.
"""


class ExportCommand(ParsedCommand):
    """Export a checkpoint."""

    name = "export"
    summary = "Write the quantized network of a checkpoint as ONNX files."
    description = (
        "Write the quantized network of a checkpoint as ONNX files: for the Ascend compiler, for onnxruntime, for\n"
        "other compilers. The model is made from its class, with the arguments that the checkpoint has. Nothing in\n"
        "the checkpoint is executed. Needs: pip install 'amct-lightning[onnx]'"
    )
    epilog = _EPILOG

    @override
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments to the parser of the command."""
        parser.add_argument("checkpoint", metavar="CKPT", help="A checkpoint of QuantRetrainCallback.")
        add_model_options(parser, "Export this part of the model only; shapes and batches are for it.")
        parser.add_argument(
            "--form", nargs="+", choices=FORMS, default=["deploy", "fake_quant"], help="The forms to write."
        )
        parser.add_argument(
            "-o", "--output", metavar="PREFIX|FOLDER", help="What the names of the files begin with, or their folder."
        )
        parser.add_argument(
            "--record", metavar="FILE", help="Take the factors from this record, if it is that of the checkpoint."
        )
        parser.add_argument(
            "--dynamic-batch", action="store_true", help="Let the first axis of all inputs have any length."
        )
        parser.add_argument(
            "--opset", type=int, metavar="N", help="The only ONNX opset to try, not the lowest that fits."
        )
        parser.add_argument(
            "--target",
            choices=list(TARGETS),
            help="The generation of the device, by default that of the training: for the command line of ATC, and to "
            "tell what it does not run.",
        )
        parser.add_argument("--soc-version", metavar="SOC", help="The processor, such as Ascend910B3, for ATC as well.")
        parser.add_argument("--batches", metavar="FILE", help="Verify the files on the inputs in this file.")
        parser.add_argument(
            "--verify",
            type=int,
            metavar="N",
            help="Verify on that many batches of --batches; without --batches on random numbers, which show little.",
        )

    @override
    def prepare(self, arguments: Sequence[str]) -> list[str]:
        """Spell ``--model.width=16`` as ``--init-arg width=16``."""
        return spelled_out(arguments)

    @override
    def run(self, options: Namespace) -> int:
        """Export the checkpoint."""
        is_verified = options.batches is not None or options.verify is not None
        if options.verify is not None and options.verify < 1:
            raise UserError(f"--verify {options.verify}: must be a number of batches, 1 or more.")
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
            input_data = example_input(options.input_shape or [], model, options.dynamic_batch)
            batches = [] if options.batches is None else read_batches(options.batches, model)
            target = find_device(model, options.target, options.soc_version)
            reports = _export(options, model, input_data, prefix)
            _tell(reports, prefix, target, options.soc_version)
            if not is_verified:
                return 0
            sys.stdout.write("\n")
            networks = {form: Network(report.path, form, dict(report.inputs)) for form, report in reports.items()}
            given = batches or random_batches(input_data, options.verify)
            return verify(model, networks, given, options.verify, is_random=not batches)


def _export(options: Namespace, model: nn.Module, input_data: InputData, prefix: str) -> dict[Form, ExportReport]:
    from amct_lightning.export.onnx_file import Settings, export_forms  # noqa: PLC0415
    from amct_lightning.export.tracing.base_graph import Choices  # noqa: PLC0415  (needs ONNX, which may not be installed)

    axes = batch_axes(model, input_data) if options.dynamic_batch else None
    files = {form: f"{prefix}_{form}_model.onnx" for form in FORMS if form in options.form}
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
