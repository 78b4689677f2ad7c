"""``amct-lightning verify``: exported files against the checkpoint that they were made from."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from typing_extensions import override

from amct_lightning.commands.base import ParsedCommand, UserError
from amct_lightning.commands.model_options import add_model_options, spelled_out

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
        # torch; not for help and errors
        from amct_lightning.commands.export.verification import verify_files  # noqa: PLC0415

        return verify_files(options)
