"""``amct-lightning verify``: exported files against the checkpoint that they were made from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from torch import nn
from typing_extensions import override

from amct_lightning.commands.base import ParsedCommand, UserError
from amct_lightning.commands.export.batches import fitted, random_batches, read_batches
from amct_lightning.commands.export.checkpoint import load_part
from amct_lightning.commands.export.files import Network, need_onnx, read_networks
from amct_lightning.commands.export.inputs import example_input
from amct_lightning.commands.model_input import add_model_options, spelled_out
from amct_lightning.commands.output import short_warnings, show
from amct_lightning.export import verify_export
from amct_lightning.files import check_writable
from amct_lightning.graph.forward import InputData

if TYPE_CHECKING:
    from amct_lightning.export.forms import Form

_EPILOG = """\
examples:
  amct-lightning verify last.ckpt last_*_model.onnx --model run.yaml --batches test_images.pt
  amct-lightning verify last.ckpt net_qdq_model.onnx --model my_module.Classifier --batches test.npz --json report.json
  amct-lightning verify last.ckpt net_deploy_model.onnx --model my_module.Classifier --random 2 --input-shape 1,3,32,32

--batches takes what the model is called with, without labels:
  .pt           of torch.save: a tensor, a tuple of the arguments, a mapping of their names, or a list of such batches
  .npz, .npy    of NumPy; arrays of several arguments have their names, float64 is taken as float32
  .safetensors  tensors with the names of the arguments
A batch of more samples than the file takes at a time is cut into several.

The exit status is 0 if all files compute what the model does, 1 if one departs from it, 2 after an error.
"""


class VerifyCommand(ParsedCommand):
    """Verify exported files."""

    name = "verify"
    summary = "Compare exported ONNX files with the checkpoint that they were made from."
    description = (
        "Compare exported ONNX files with the model in the checkpoint: the integers and scales of every layer, what\n"
        "every layer computes, and the outputs. The deploy form runs in the integer arithmetic of the device, the\n"
        "others in onnxruntime. The first layer that departs is named. Needs: pip install 'amct-lightning[onnx]'"
    )
    epilog = _EPILOG

    @override
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments to the parser of the command."""
        parser.add_argument("checkpoint", metavar="CKPT", help="The checkpoint that was exported.")
        parser.add_argument("files", metavar="FILE", nargs="+", help="Files of the export, one of each form at most.")
        add_model_options(parser, "The part of the model that was exported.")
        parser.add_argument("--batches", metavar="FILE", help="Inputs of the model, best real ones.")
        parser.add_argument(
            "--random", type=int, metavar="N", help="Take N batches of random numbers instead, which show little."
        )
        parser.add_argument(
            "--deq-bits",
            choices=["19", "32"],
            default="19",
            help="How many bits of the dequantization scale the device computes with.",
        )
        parser.add_argument("--json", metavar="FILE", help="Write the report to this file as well.")

    @override
    def prepare(self, arguments: Sequence[str]) -> list[str]:
        """Spell ``--model.width=16`` as ``--init-arg width=16``."""
        return spelled_out(arguments)

    @override
    def run(self, options: Namespace) -> int:
        """Verify the files."""
        if (options.batches is None) == (options.random is None):
            raise UserError(
                "give real inputs of the model with --batches FILE, or ask for random numbers with --random N; one of "
                "the two."
            )
        if options.random is not None and options.random < 1:
            raise UserError(f"--random {options.random}: must be a number of batches, 1 or more.")
        need_onnx("onnxruntime")
        if options.json is not None:
            check_writable(options.json, "report")
        networks = read_networks(options.files)
        with short_warnings():
            model = load_part(options)
            if options.batches is not None:
                given = read_batches(options.batches, model)
            else:
                given = random_batches(example_input(options.input_shape or [], model), options.random)
            is_random = options.batches is None
            return verify(model, networks, given, None, is_random, int(options.deq_bits), options.json)


def verify(
    model: nn.Module,
    networks: Mapping[Form, Network],
    batches: Sequence[InputData],
    most: int | None,
    is_random: bool,
    deq_bits: int = 19,
    json: str | None = None,
) -> int:
    """Verify exported files and show what was found.

    Args:
        model: The model that was exported.
        networks: The files.
        batches: What the model is called with.
        most: The number of batches to take; ``None`` for all.
        is_random: Whether they are random numbers.
        deq_bits: How many bits of the dequantization scales count.
        json: A file for the report.

    Returns:
        The exit status: 1 if a file departs from the model.

    Raises:
        UserError: If a batch does not fit.
    """
    notes: list[str] = []
    inputs = next(iter(networks.values())).inputs
    given = islice(fitted(batches, inputs, notes.append), most)
    report = verify_export(model, {form: one.path for form, one in networks.items()}, given, deq_bits=deq_bits)
    if json is not None:
        report.save(json)
    if sys.stdout.isatty():
        show(report)
    else:
        sys.stdout.write(f"{report}\n")
    if is_random:
        notes.append(
            "The batches were random numbers, which show little: on them classes are near a tie, and ranges are not "
            "those of the data. Give real inputs with --batches FILE."
        )
    sys.stdout.writelines(f"Note: {note}\n" for note in notes)
    return 0 if report.ok else 1
