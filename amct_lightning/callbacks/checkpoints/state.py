"""What a checkpoint holds of a quantized model beside its tensors: writing it, and bringing a model into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from amct_lightning.callbacks.checks import describe_difference
from amct_lightning.conversion.convert import convert_layers, revert_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.modules import activation_quantizers
from amct_lightning.modules.folding import is_sharded
from amct_lightning.record import QuantRecord


def make_entry(model: nn.Module, submodule: str | None, calibration_steps: int) -> dict[str, Any] | None:
    """Return the entry of a checkpoint, plain data and tensors, or ``None`` if ``model`` is not converted.

    Args:
        model: The converted module.
        submodule: Its name in the LightningModule, ``None`` if it is all of it.
        calibration_steps: Number of training batches so far.
    """
    found = find_plan(model)
    if found is None:
        return None
    root = next(name for name, module in model.named_modules() if module is found[0])  # one converted by hand is inside
    return {
        "plan": found[1].to_dict(),
        "submodule": ".".join(filter(None, (submodule, root))) or None,
        "record": record_text(model),
        "calibration_steps": calibration_steps,
        "observed": {name: q.observed for name, q in activation_quantizers(model).items() if q.observed},
    }


def adopt_plan(model: nn.Module, entry: dict[str, Any], source: str, replace: bool = False) -> None:
    """Convert a float model as the checkpoint's plan says; refuse a model that was converted differently.

    Args:
        model: The module, float or converted.
        entry: What :func:`make_entry` gave.
        source: The checkpoint's path, for messages.
        replace: Convert a model that was converted differently again, instead of refusing it.

    Raises:
        ValueError: If model and checkpoint are quantized differently, or the plan is damaged.
    """
    plan = QuantPlan.from_dict(entry["plan"], source)
    found = find_plan(model)
    if is_sharded(model) and (found is None or (replace and found[1] != plan)):
        raise ValueError(
            f"The checkpoint '{source}' was quantized differently from the model, which is sharded already when this "
            f"strategy reads a checkpoint. Give QuantRetrainCallback the `config` of the training that wrote it."
        )
    if found is not None and found[1] != plan and replace:
        revert_layers(model)
        found = None
    if found is None:
        convert_layers(model, plan)
    elif found[1] != plan:
        raise ValueError(
            f"The checkpoint '{source}' was quantized differently from the model: "
            f"{describe_difference(found[1], plan)}. "
            "Leave `config` out to have it taken from the checkpoint, or start a new run with the new configuration."
        )


def restore_observed(model: nn.Module, entry: dict[str, Any]) -> None:
    """Take back the batches that a calibration in progress had observed.

    Args:
        model: The converted module, its tensors loaded.
        entry: What :func:`make_entry` gave.
    """
    observed = entry.get("observed", {})
    for name, quantizer in activation_quantizers(model).items():
        quantizer.observed = [batch.to(quantizer.clip_max.device) for batch in observed.get(name, [])]


def record_of(model: nn.Module, tensors: Mapping[str, Tensor], text: str | None) -> str | None:
    """Return the record of a checkpoint, whose tensors weight averaging may have put in place of the model's.

    Args:
        model: The converted module.
        tensors: What the checkpoint holds of its state_dict.
        text: The record of the model as it is.
    """
    live = model.state_dict()
    is_plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in live.values())
    if not is_plain or not live.keys() <= tensors.keys():
        return text  # a sharded or partial state, which this process cannot look into
    if all(tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in live.items()):
        return text
    quantizers = activation_quantizers(model).values()
    kept = {name: tensor.clone() for name, tensor in live.items()}
    books = [(quantizer.observed, quantizer.poison, quantizer.batches) for quantizer in quantizers]
    try:
        model.load_state_dict({name: tensors[name] for name in live})
        return record_text(model)
    finally:
        model.load_state_dict(kept)
        for quantizer, book in zip(quantizers, books, strict=True):
            quantizer.observed, quantizer.poison, quantizer.batches = book


def record_text(model: nn.Module) -> str | None:
    """Return the present record, or ``None`` while calibrating or when a factor is not finite.

    Args:
        model: The converted module.
    """
    if not all(quantizer.has_range for quantizer in activation_quantizers(model).values()):
        return None
    try:
        return QuantRecord.from_model(model).to_text()
    except ValueError as error:
        rank_zero_warn(f"The record was not written, the last good one stays: {error}")
        return None
