"""Proving exported files equal to the model that they were exported from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning.conversion.plan import find_plan
from amct_lightning.export.integer.arithmetic import check_bits
from amct_lightning.export.verify.expected import ExpectedLayer, expected_layer
from amct_lightning.export.verify.form import FormVerification
from amct_lightning.export.verify.report import VerifyReport
from amct_lightning.export.verify.torch_side import run_model, tensors_in
from amct_lightning.record import QuantRecord
from amct_lightning.wording import closest

FORMS = ("deploy", "fake_quant", "qdq")


def verify_export(
    model: nn.Module,
    files: Mapping[str, str | Path],
    batches: Iterable[Tensor | tuple[Any, ...] | Mapping[str, Any]],
    *,
    deq_bits: int = 19,
) -> VerifyReport:
    """Run a converted model and the files exported from it side by side, and say where a file departs.

    For every layer three things are compared. The *numbers* in the file (integers of weight and bias, factors,
    dequantization parameters) must be those that follow from the model. What the layer *reads* must be what the file's
    operators make of the model's outputs of the layers before. And the layer *alone*, given the very input that the
    model's layer had, must make the same codes and outputs. Differences that the export is known to make are allowed:
    a code may differ by one at a tie of rounding, an output by the rounding of the bias to an integer, by the bits of
    the scale that the device drops, and by the rounding of float sums. The files are also run as a whole: the deploy
    model in the device's arithmetic, the others by onnxruntime.

    Args:
        model: The converted model, or a wrapper around it that is called in the same way. It is evaluated, and
            afterwards in the mode it was in.
        files: Form (``"deploy"``, ``"fake_quant"``, ``"qdq"``) -> file; one or more of them.
        batches: What the model is called with, without labels: tensors, tuples or mappings.
        deq_bits: 19, or 32 to let the deploy model compute with the whole dequantization scale.

    Returns:
        The report.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the model is not converted or calibrated, a form is not known, a file is none of that form, or a
            batch does not fit it.
        ImportError: If onnxruntime is not installed.
    """
    check_bits(deq_bits)
    _check(files, batches)
    record = QuantRecord.from_model(model)
    found = find_plan(model)
    assert found is not None
    root, plan = found
    layers = {layer.name: expected_layer(root, layer, record[layer.name]) for layer in plan.layers}
    forms = [FormVerification(form, files[form], layers, deq_bits) for form in FORMS if form in files]
    order, count, samples = list[str](), 0, 0
    for batch in batches:
        with torch.no_grad():
            samples += _compared(model, layers, batch, forms, order)
        count += 1
    if not count:
        raise ValueError("There is no batch to verify the export on; give at least one, as the model takes it.")
    return VerifyReport(count, samples, deq_bits, tuple(form.report(order) for form in forms))


def _compared(
    model: nn.Module, layers: Mapping[str, ExpectedLayer], batch: Any, forms: list[FormVerification], order: list[str]
) -> int:
    for form in forms:
        form.check(batch)
    run = run_model(model, layers, batch)
    order += [name for name in run.calls if name not in order]
    for form in forms:
        form.add(batch, run)
    first = tensors_in(batch)[0]
    return first.shape[0] if first.dim() else 1


def _check(files: Mapping[str, str | Path], batches: object) -> None:
    for form in files:
        if form not in FORMS:
            raise ValueError(f"There is no form {form!r}, only {', '.join(FORMS)}.{closest(form, FORMS)}")
    if not files:
        raise ValueError(f"There is no file to verify; files maps one or more of {', '.join(FORMS)} to files.")
    if isinstance(batches, (Tensor, Mapping)):
        raise ValueError(
            f"batches is a {type(batches).__name__}; give several in a list or a DataLoader, one of them as [batch]."
        )
