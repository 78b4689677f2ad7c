"""Proving exported files equal to the model that they were exported from."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from amct_lightning.amct.data_parallel import unwrap
from amct_lightning.conversion.plan import find_plan
from amct_lightning.export.integer.arithmetic import check_bits
from amct_lightning.export.tracing.prepared import kept_bits, trained_part
from amct_lightning.export.tracing.signature import input_tensors
from amct_lightning.export.verify.expected import ExpectedLayer, expected_layer
from amct_lightning.export.verify.form import FormVerification
from amct_lightning.export.verify.report import FormReport, VerifyReport
from amct_lightning.export.verify.torch_side import run_model, tensors_in
from amct_lightning.files import location
from amct_lightning.graph.forward import InputData
from amct_lightning.record import QuantRecord
from amct_lightning.wording import closest

FORMS = ("deploy", "fake_quant", "qdq")


def compare(
    model: nn.Module,
    files: Mapping[str, str | Path],
    batches: Iterable[InputData],
    *,
    deq_bits: int = 19,
) -> VerifyReport:
    """Do what :func:`amct_lightning.verify_export` says.

    Args:
        model: The converted model.
        files: Form -> file.
        batches: What the model is called with.
        deq_bits: 19 or 32.
    """
    check_bits(deq_bits)
    _check(files, batches)
    record = QuantRecord.from_model(model)
    found = find_plan(model)
    assert found is not None
    root, plan = found[0], trained_part(*found)
    bits = kept_bits(plan)
    layers = {layer.name: expected_layer(root, layer, record[layer.name], bits) for layer in plan.layers}
    given = list(batches)
    if not given:
        raise ValueError("There is no batch to verify the export on; give at least one, as the model takes it.")
    # One after the other, the model run again for each: what a file takes in memory is not kept for the next.
    reports = []
    for form in [form for form in FORMS if form in files]:
        reports.append(
            _compared(model, layers, FormVerification(form, _local(files[form]), layers, deq_bits, bits), given)
        )
        gc.collect()
    return VerifyReport(len(given), sum(map(_samples, given)), deq_bits, tuple(reports))


def _compared(
    model: nn.Module,
    layers: Mapping[str, ExpectedLayer],
    verification: FormVerification,
    batches: list[InputData],
) -> FormReport:
    order: list[str] = []
    for batch in batches:
        given = input_tensors(unwrap(model), tuple(batch) if isinstance(batch, list) else batch)
        verification.check(given)
        with torch.no_grad():
            run = run_model(model, layers, batch)
            order += [name for name in run.calls if name not in order]
            verification.add(given, run)
    return verification.report(order)


def _local(file: str | Path) -> Path:
    place = location(file)
    if isinstance(place, str):
        raise ValueError(f"'{place}' is on a remote file system. Copy the file to this machine to verify it.")
    return place


def _samples(batch: InputData) -> int:
    first = tensors_in(batch)[0]
    return first.shape[0] if first.dim() else 1


def _check(files: object, batches: object) -> None:
    if not isinstance(files, Mapping):
        raise TypeError(f"files is a {type(files).__name__}; it must map forms to files: {{'deploy': 'net.onnx'}}.")
    for form in files:
        if form not in FORMS:
            raise ValueError(f"There is no form {form!r}, only {', '.join(FORMS)}.{closest(form, FORMS)}")
    if not files:
        raise ValueError(f"There is no file to verify; files maps one or more of {', '.join(FORMS)} to files.")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is a {type(batches).__name__}; give several in a list or a DataLoader, one of them as [batch]."
        )
