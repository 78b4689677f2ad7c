"""What ``amct-lightning export --form ascend_v1`` does: the folder for servers, and the proof that it is the model."""

from __future__ import annotations

import sys

from jsonargparse import Namespace

from amct_lightning.commands.base import UserError
from amct_lightning.commands.export.batches import random_batches, read_batches
from amct_lightning.commands.export.checkpoint import load_part
from amct_lightning.commands.export.files import prefix_of
from amct_lightning.commands.export.inputs import example_input
from amct_lightning.commands.output import short_warnings, show
from amct_lightning.serving import save_serving, verify_serving

_FOR_ONNX = ("record", "opset", "soc_version", "target", "dynamic_batch")


def export_for_servers(options: Namespace) -> int:
    """Write the folder, and verify it if that is asked for.

    Args:
        options: The options of the command.

    Returns:
        The exit status: 1 if it departs from the model.

    Raises:
        UserError: If an option does not go with the form, or a library is not installed.
    """
    if len(options.form) > 1:
        raise UserError("--form ascend_v1 is written alone: a model that computes as a server does has no other form.")
    wrong = [f"--{name.replace('_', '-')}" for name in _FOR_ONNX if getattr(options, name) not in (None, False)]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: for ONNX files only, not for --form ascend_v1.")
    folder = options.output or f"{prefix_of(None, options.checkpoint)}_ascend_v1"
    with short_warnings():
        model = load_part(options)
        batches = [] if options.batches is None else read_batches(options.batches, model)
        try:
            path = save_serving(model, folder, "ascend_v1", options.hf_source)
        except ModuleNotFoundError as error:
            raise UserError(str(error)) from error
        size = sum(file.stat().st_size for file in path.iterdir())
        sys.stdout.write(f"Written: '{path}', {size / 1e6:,.1f} MB in {len(list(path.iterdir()))} files.\n")
        if options.hf_source is None:
            sys.stdout.write("It has no tokenizer; --hf-source copies that of the float network.\n")
        if not batches and options.verify is None:
            return 0
        if not batches:
            batches = random_batches(example_input(options.input_shape or [], model), options.verify)
        report = verify_serving(model, path, batches[: options.verify])
        show(report)
        return 0 if report.ok else 1
