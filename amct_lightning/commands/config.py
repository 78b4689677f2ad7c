"""``amct-lightning config``: a configuration for a model, and the table that explains what it does."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import get_args

from jsonargparse import ArgumentParser, Namespace
from torch import nn
from typing_extensions import override

from amct_lightning.commands.base import ParsedCommand
from amct_lightning.commands.choices_text import in_few_words, to_simple, to_yaml
from amct_lightning.commands.model_input import find_part, make_input, make_model
from amct_lightning.commands.output import check_output, deliver, short_warnings
from amct_lightning.config import config_source, load_config
from amct_lightning.conversion.convert import convert_layers
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.on_target import OnUnsupported, TargetRules
from amct_lightning.conversion.plan import QuantPlan
from amct_lightning.conversion.report import conversion_report
from amct_lightning.graph.forward import Forward
from amct_lightning.targets import TARGETS

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
        parser.add_argument(
            "--model",
            required=True,
            metavar="CLASS_PATH|YAML",
            help="Class path of a LightningModule or any module, or the YAML of a run, whose model is taken.",
        )
        parser.add_argument(
            "--init-arg",
            action="append",
            metavar="KEY=VALUE",
            help="An argument of the class; may be repeated. --model.KEY=VALUE is the same.",
        )
        parser.add_argument("--ckpt", metavar="FILE", help="Load the weights of this checkpoint (of the float model).")
        parser.add_argument(
            "--input-shape",
            action="append",
            metavar="[NAME=]SHAPE[:DTYPE]",
            help="Shape of an argument of forward, such as 1,3,32,32 or ids=1,128:int64; repeat it for each. Without "
            "it, the example_input_array of the model is used.",
        )
        parser.add_argument("--submodule", metavar="NAME", help="Quantize this part of the model only.")
        parser.add_argument(
            "--choices",
            metavar="FILE|PRESET",
            help="Begin with these choices (.yaml, .cfg, .json, or a preset such as A4W4), not with INT8 for all.",
        )
        parser.add_argument(
            "--target", choices=[*TARGETS], help="Check that this hardware runs the layers with these types."
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
        result: list[str] = []
        waiting = ""
        for argument in arguments:
            found = re.fullmatch(r"--model\.([^=]+)(=.*)?", argument, re.DOTALL)
            if waiting:
                result.append(f"{waiting}={argument}")
                waiting = ""
            elif found is None:
                result.append(argument)
            else:
                result.append("--init-arg")
                waiting = "" if found[2] else found[1]
                result += [f"{found[1]}{found[2]}"] if found[2] else []
        return [*result, waiting] if waiting else result

    @override
    def run(self, options: Namespace) -> int:
        """Make the configuration."""
        if options.output is not None:
            check_output(options.output, options.force, "configuration")
        with short_warnings():
            part, plan = _plan(options)
            text = _text(part, plan, options)
            table = _explanation(part, plan) if options.explain else None
        if options.output is not None or table is None:
            deliver(text, options.output, options.force, "configuration")
        if table is not None:
            sys.stdout.write(f"{table}\n")
        return 0


def _plan(options: Namespace) -> tuple[nn.Module, QuantPlan]:

    choices = load_config(options.choices)
    model = make_model(options.model, options.init_arg or [], options.ckpt)
    part = find_part(model, options.submodule)
    # The shapes are for the part; the example input of the model is for all of it, and the part runs inside.
    run = part if options.input_shape else model
    input_data = make_input(options.input_shape or [], model)
    source = config_source(options.choices) if options.choices else "config"
    target = TargetRules.of(options.target, options.on_unsupported, "config")
    return part, make_plan(part, choices, Forward(run, input_data), source, target=target)


def _text(part: nn.Module, plan: QuantPlan, options: Namespace) -> str:
    if options.format == "json":
        return plan.config.to_text()
    layers = {name: part.get_submodule(name) for name in plan.config}
    choices = in_few_words(plan.config, layers)
    listed = "\n".join(f"#   {name}  {type(layer).__name__}" for name, layer in layers.items())
    head = f"# What is quantized in {type(part).__name__}. Its layers that can be:\n{listed}\n"
    return head + (to_yaml(choices) if options.format == "yaml" else to_simple(choices))


def _explanation(part: nn.Module, plan: QuantPlan) -> str:
    """Convert the model, which nobody needs after this, and return the table."""
    convert_layers(part, plan)
    return str(conversion_report(part))
