"""``amct-lightning export``: the quantized network of a checkpoint as ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from typing_extensions import override

from amct_lightning.commands.base import ParsedCommand, UserError
from amct_lightning.commands.model_options import add_model_options, spelled_out
from amct_lightning.targets import ATC_TARGETS

if TYPE_CHECKING:
    from amct_lightning.export.forms import Form

_FORMS: tuple[Form, ...] = ("deploy", "fake_quant", "qdq")
_FOR_SERVERS = "ascend_v1"
_EPILOG = """\
examples:
  amct-lightning export last.ckpt --model run.yaml --input-shape 1,3,32,32
  amct-lightning export last.ckpt --model my_module.Classifier --form deploy fake_quant qdq --output out/
  amct-lightning export last.ckpt --model my_module.Classifier --target A2 --soc-version Ascend910B3
  amct-lightning export last.ckpt --model my_module.Classifier --batches test_images.pt
  amct-lightning export last.ckpt --model run.yaml --form ascend_v1 --hf-source Qwen2-0.5B/ -o served/
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

With --form ascend_v1 one folder is written, which servers of language models load (vllm-ascend, SGLang, MindIE), from
a model that was converted with target 'serving': --output, or PREFIX_ascend_v1.
"""


class ExportCommand(ParsedCommand):
    """Export a checkpoint."""

    name = "export"
    summary = "Write the quantized network of a checkpoint as ONNX files, or for servers."
    description = (
        "Write the quantized network of a checkpoint as ONNX files: for the Ascend compiler, for onnxruntime, for\n"
        "other compilers; or as a folder for servers. The model is made from its class, with the arguments that the\n"
        "checkpoint has. Nothing in the checkpoint is executed. Needs: pip install 'amct-lightning[onnx]', or for\n"
        "servers 'amct-lightning[serving]'"
    )
    epilog = _EPILOG

    @override
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments to the parser of the command."""
        parser.add_argument("checkpoint", metavar="CKPT", help="A checkpoint of QuantRetrainCallback.")
        add_model_options(parser, "Export this part of the model only; shapes and batches are for it.")
        parser.add_argument(
            "--form",
            nargs="+",
            choices=[*_FORMS, _FOR_SERVERS],
            default=["deploy", "fake_quant"],
            help="The forms to write.",
        )
        parser.add_argument(
            "--hf-source",
            metavar="FOLDER",
            help="For ascend_v1: where transformers keeps the float network; its configuration, tokenizer and "
            "generation files are copied.",
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
            choices=list(ATC_TARGETS),
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
        if options.verify is not None and options.verify < 1:
            raise UserError(f"--verify {options.verify}: must be a number of batches, 1 or more.")
        if _FOR_SERVERS in options.form:
            from amct_lightning.commands.export.serving import export_for_servers  # noqa: PLC0415

            return export_for_servers(options)
        if options.hf_source is not None:
            raise UserError("--hf-source goes with --form ascend_v1 only.")
        from amct_lightning.commands.export.exporting import export  # noqa: PLC0415  (torch; not for help and errors)

        return export(options, [form for form in _FORMS if form in options.form])
