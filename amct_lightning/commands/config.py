"""``amct-lightning config``: a configuration for a model, and the table that explains what it does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import get_args

from jsonargparse import ArgumentParser, Namespace
from typing_extensions import override

from amct_lightning.commands.base import ParsedCommand
from amct_lightning.commands.model_options import add_model_options, spelled_out
from amct_lightning.commands.output import check_output, deliver, short_warnings
from amct_lightning.targets import TARGETS, OnUnsupported

_EPILOG = """\
examples:
  amct-lightning config --model my_module.Classifier --input-shape 1,3,32,32 --explain
  amct-lightning config --model my_module.Classifier --model.width=16 -o config.json
  amct-lightning config --model run.yaml --choices choices.yaml -o config.json
  amct-lightning config --model run.yaml --choices A4W4 --target 950 --on-unsupported fallback --explain
  amct-lightning config --model my_module.Bert --input-shape input_ids=1,128:int64 \\
      --input-shape attention_mask=1,128:int64 --format yaml -o choices.yaml

The formats:
  json  AMCT's configuration, every layer that can be quantized listed
  cfg   AMCT's simple configuration: what is common to all layers, and what differs
  yaml  the same as YAML; it can also stand inline in the YAML of a run, below quant.config

Any of them goes to training with: amct-lightning fit --quant.config FILE
"""


class ConfigCommand(ParsedCommand):
    """Make a configuration."""

    name = "config"
    summary = "Make a configuration for a model, or explain what would be quantized."
    description = (
        "Make a configuration for a model: which layers can be quantized, and how. The model is made from its class\n"
        "and run once on an input, which shows its data flow; nothing is trained."
    )
    epilog = _EPILOG

    @override
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments to the parser of the command."""
        add_model_options(parser, "Quantize this part of the model only.")
        parser.add_argument("--ckpt", metavar="FILE", help="Load the weights of this checkpoint (of the float model).")
        parser.add_argument(
            "--choices",
            metavar="FILE|PRESET",
            help="Begin with these choices (.yaml, .cfg, .json, or a preset such as A4W4), not with INT8 for all.",
        )
        parser.add_argument(
            "--target", choices=[*TARGETS], help="Check that this hardware, or servers, run these types and layers."
        )
        parser.add_argument(
            "--on-unsupported",
            choices=[*get_args(OnUnsupported)],
            default="error",
            help="What to do about layers that the target does not run; fallback takes INT8 or leaves them in float.",
        )
        parser.add_argument("--format", choices=["json", "cfg", "yaml"], default="json", help="Format of the result.")
        parser.add_argument(
            "--explain", action="store_true", help="Print the table: which layers are quantized, how, why others not."
        )
        parser.add_argument("-o", "--output", metavar="FILE", help="The file to write; without it, stdout.")
        parser.add_argument("--force", action="store_true", help="Replace the file if it exists.")

    @override
    def prepare(self, arguments: Sequence[str]) -> list[str]:
        """Spell ``--model.width=16`` as ``--init-arg width=16``."""
        return spelled_out(arguments)

    @override
    def run(self, options: Namespace) -> int:
        """Make the configuration."""
        if options.output is not None:
            check_output(options.output, options.force, "configuration")
        from amct_lightning.commands.make_config import make_config  # noqa: PLC0415  (torch; not for help and errors)

        with short_warnings():
            text, table = make_config(options)
        if options.output is not None or table is None:
            deliver(text, options.output, options.force, "configuration")
        if table is not None:
            sys.stdout.write(f"{table}\n")
        return 0
