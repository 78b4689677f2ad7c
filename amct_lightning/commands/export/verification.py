"""What ``amct-lightning verify`` does: exported files are read, run, and compared with the model in a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from torch import nn

from amct_lightning.commands.export.batches import fitted, random_batches, read_batches
from amct_lightning.commands.export.checkpoint import load_part
from amct_lightning.commands.export.files import Network, need_onnx, read_networks
from amct_lightning.commands.export.inputs import example_input
from amct_lightning.commands.output import short_warnings, show
from amct_lightning.export import verify_export
from amct_lightning.files import check_writable
from amct_lightning.graph.forward import InputData

if TYPE_CHECKING:
    from amct_lightning.export.forms import Form


def verify_files(options: Namespace) -> int:
    """Verify the files that the options name.

    Args:
        options: The options of the command.

    Returns:
        The exit status: 1 if a file departs from the model.
    """
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
