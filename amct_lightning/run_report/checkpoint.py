"""What a report takes from a checkpoint or a record: plan, weight scales and factors. No model is built for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amct_lightning.checkpoint_file import CHECKPOINT_KEY, read_foreign_checkpoint
from amct_lightning.conversion.plan import QuantPlan
from amct_lightning.conversion.plan_check import check_entry
from amct_lightning.conversion.report_rows import MISSED, ReportRow, quantized_row
from amct_lightning.record import LayerRecord, QuantRecord

_KINDS = {2: "Linear", 3: "1-d convolution", 4: "2-d convolution", 5: "3-d convolution"}


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint tells about the quantization.

    Attributes:
        path: The file.
        epoch: The epoch in which it was written; ``None`` if it does not tell.
        step: The number of training steps before.
        rows: One per layer of a supported type: quantized ones in the order of execution, then those in float.
        scales: The weight scales by layer, of recurrent ones also ``<layer> (recurrent)``.
        record: The record that belongs to the weights; ``None`` while they are calibrated.
        float_parts: What is in float and has no row: kinds and how many of each.
    """

    path: Path
    epoch: int | None
    step: int | None
    rows: tuple[ReportRow, ...]
    scales: dict[str, list[float]]
    record: QuantRecord | None
    float_parts: tuple[tuple[str, int], ...]


def read_facts(path: Path, notes: list[str]) -> CheckpointFacts:
    """Read a checkpoint; nothing in it is executed.

    Args:
        path: A file that a Trainer with QuantRetrainCallback wrote.
        notes: Takes a line about a part of it that cannot be used.

    Returns:
        The facts.

    Raises:
        OSError: If it cannot be read.
        RuntimeError: If it is damaged or no checkpoint.
        ValueError: If it was written without the callback, or its plan is damaged.
    """
    if path.is_dir():
        raise IsADirectoryError(
            f"'{path}' is a folder, a sharded checkpoint. Make one file of it first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path} (it runs code that a "
            "stranger may have put into the folder: only do so if you trust it)."
        )
    content, _ = read_foreign_checkpoint(path)
    entry, state = content.get(CHECKPOINT_KEY), content.get("state_dict")
    if not isinstance(entry, Mapping) or "plan" not in entry:
        raise ValueError(
            f"'{path}' was written without QuantRetrainCallback: it has no entry '{CHECKPOINT_KEY}' with a "
            "quantization plan. Give a checkpoint of a training with the callback."
        )
    check_entry(entry, str(path))
    plan = QuantPlan.from_dict(entry["plan"], str(path))
    prefix = f"{entry['submodule']}." if entry.get("submodule") else ""
    tensors = {
        name.removeprefix(prefix): value
        for name, value in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(name, str) and name.startswith(prefix) and isinstance(value, Tensor)
    }
    return CheckpointFacts(
        path=path,
        epoch=_integer(content.get("epoch")),
        step=_integer(content.get("global_step")),
        rows=tuple(_rows(plan, tensors, entry.get("missed_layers", ()))),
        scales=dict(_scales(plan, tensors)),
        record=_record(entry.get("record"), path, notes),
        float_parts=plan.float_parts,
    )


def _rows(plan: QuantPlan, tensors: Mapping[str, Tensor], missed: Collection[str]) -> list[ReportRow]:
    kinds = {layer.name: layer.type or _kind(layer.name, tensors) for layer in plan.layers}
    sharing = plan.sharing()
    planned = [
        ReportRow(layer.name, kinds[layer.name], reason=MISSED)
        if layer.name in missed
        else quantized_row(layer, kinds[layer.name], plan, sharing)
        for layer in plan.layers
    ]
    names = {layer.name for layer in plan.layers}
    disabled = [
        ReportRow(name, _kind(name, tensors), reason="disabled in the config")
        for name in plan.config
        if name not in names
    ]
    return [*planned, *disabled, *(ReportRow(layer.name, layer.type, reason=layer.reason) for layer in plan.refused)]


def _kind(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Tell from the shape of the weight what a layer is; convolutions and their transposed ones look alike."""
    hidden = tensors.get(f"{name}.weight_hh_l0")
    if hidden is not None and hidden.dim() == 2 and hidden.shape[1]:
        return {4: "LSTM", 3: "GRU"}.get(hidden.shape[0] // hidden.shape[1], "")
    weight = tensors.get(f"{name}.weight")
    return "" if weight is None else _KINDS.get(weight.dim(), "")


def _scales(plan: QuantPlan, tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    found = {}
    for layer in plan.layers:
        for quantizer, suffix in (("weight_quantizer", ""), ("recurrent_weight_quantizer", " (recurrent)")):
            scale = tensors.get(f"{layer.name}.{quantizer}.scale")
            if scale is not None and scale.numel():
                found[layer.name + suffix] = scale.detach().to(torch.float64).flatten().tolist()
    return found


def _record(text: Any, path: Path, notes: list[str]) -> QuantRecord | None:
    if not isinstance(text, str):
        return None
    try:
        return QuantRecord.from_text(text, f"the record in {path}")
    except ValueError as error:
        notes.append(str(error))
        return None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def scales_of_record(record: Mapping[str, LayerRecord]) -> dict[str, list[float]]:
    """Return the weight scales in a record, by layer, of recurrent ones also ``<layer> (recurrent)``.

    Args:
        record: The record; a BatchNorm that is folded is contained in its scales.
    """
    found: dict[str, list[float]] = {}
    for name, layer in record.items():
        found |= {name: layer.scale_w, f"{name} (recurrent)": layer.scale_r}
    return {name: scales for name, scales in found.items() if scales}
