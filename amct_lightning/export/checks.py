"""What has to be right before anything is exported, so that no file begins to be written that cannot be finished."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # torch has no public name for what all of them are

from amct_lightning.config import RetrainConfig
from amct_lightning.config.fit import without_int4
from amct_lightning.config.layer import LayerConfig
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.export.tracing.prepared import trained_part
from amct_lightning.modules.folding import is_sharded
from amct_lightning.modules.layers import QATLayer
from amct_lightning.record import QuantRecord
from amct_lightning.wording import cut_off

_TOLERANCE = 2e-3
"""By how much the scales of a record may differ from those of the model, relative: more than float16 rounds off."""


def check_exportable(model: nn.Module) -> QuantPlan:
    """Check that a model can be exported as it is.

    Args:
        model: The model.

    Returns:
        The plan by which it was converted.

    Raises:
        ValueError: If it is not converted, or layers run in float at present.
        RuntimeError: If its weights are spread over processes or have no values, or a BatchNorm is in training mode.
    """
    found = find_plan(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no quantized layers, so there is nothing to export as quantized. Convert it "
            "first, with prepare_qat(model, config, input_data), and train it; or load a checkpoint with "
            "load_qat_checkpoint(path, model)."
        )
    if is_sharded(model):
        raise RuntimeError(
            f"The parameters of {type(model).__name__} are spread over several processes (FSDP). Export from the "
            "checkpoint instead, in one process: amct-lightning export CKPT ..., or load_qat_checkpoint(path, model)."
        )
    without = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if without:
        raise RuntimeError(
            f"{cut_off(without)} are on the meta device and have no values. Load the weights, e.g. "
            "load_qat_checkpoint(path, model), before the export."
        )
    training = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if training:
        raise RuntimeError(
            f"BatchNorm {cut_off(repr(name) for name in training)} is in training mode, in which it has no fixed "
            "statistics to export. Call model.eval() first."
        )
    root = found[0]
    plan = trained_part(*found)
    in_float = [layer.name for layer in plan.layers if _mode(root.get_submodule(layer.name)) != "quantized"]
    if in_float:
        raise ValueError(
            f"{cut_off(repr(name) for name in in_float)} run in float at present (quant_mode), so the exported network "
            "would not be the model. Train until the schedule quantizes them, or set their quant_mode to 'quantized'."
        )
    return plan


def check_forms(plan: QuantPlan, forms: Collection[str]) -> None:
    """Check that a model that is converted by a plan can be exported in some forms.

    Args:
        plan: The plan.
        forms: The forms.

    Raises:
        ValueError: If it cannot, with the layers that are in the way.
    """
    if forms and plan.serving is not None:
        raise ValueError(
            f"The model was converted for servers (target serving), with their arithmetic in {plan.serving}, which no "
            f"ONNX file has: {', '.join(sorted(forms))}. Write it with save_serving (form ascend_v1), or convert it "
            "without this target."
        )
    if forms:
        _check_ranges(plan)
    weights = {layer.name: plan.config[layer.name].retrain_weight_config for layer in plan.layers}
    grouped = [repr(name) for name, weight in weights.items() if weight.group_size]
    if grouped and set(forms) - {"qdq"}:
        raise ValueError(
            "The forms 'deploy' and 'fake_quant' have no weights in groups (group_size), because their sums are those "
            f"of integers with one scale per output channel at most: {cut_off(grouped)}. Export the form 'qdq', or "
            "convert without group_size."
        )
    linear = [
        repr(layer.name)
        for layer in plan.layers
        if layer.type == nn.Linear.__name__ and weights[layer.name].channel_wise
    ]
    if linear and "deploy" in forms:
        raise ValueError(
            "The form 'deploy' has no weight scale per output channel (channel_wise: true) for a Linear, because the "
            f"Ascend compiler (ATC) takes one scale for its MatMul: {cut_off(linear)}. Convert with channel_wise: "
            "false for Linear, as AMCT does, or export the forms 'qdq' or 'fake_quant'."
        )


def _check_ranges(plan: QuantPlan) -> None:
    """Refuse layers whose input has no fixed scale, which all forms have."""
    data = {layer.name: plan.config[layer.name].retrain_data_config for layer in plan.layers}
    without = {
        "a scale per token (algo: per_token)": [repr(name) for name, d in data.items() if d.algo == "per_token"],
        "float activations (algo: none)": [repr(name) for name, d in data.items() if not d.is_quantized],
    }
    found = [f"{what} in {cut_off(names)}" for what, names in without.items() if names]
    if found:
        raise ValueError(
            f"The ONNX forms have one fixed scale for the input of a layer, and the model has {', '.join(found)}. "
            "Convert with algo: ulq_quantize for these layers, or leave them in float (skip_layers)."
        )


def check_config(config: RetrainConfig, model: nn.Module, source: str) -> None:
    """Check that a model was converted by a configuration.

    Args:
        config: The configuration.
        model: The model; one that is not converted passes.
        source: The file of the configuration, for messages.

    Raises:
        RuntimeError: If it was not, with the first layer and setting that differ.
    """
    found = find_plan(model)
    used = found[1].config if found else {}
    config = found[1].undisputed(config) if found else config
    for name, layer in used.items():
        given = config[name] if name in config else LayerConfig(retrain_enable=False)
        if layer.retrain_enable or given.retrain_enable:
            _check_layer(name, given, layer, source)
    unknown = [name for name in config if used and name not in used and config[name].retrain_enable]
    if unknown:
        raise RuntimeError(
            f"'{source}' quantizes {cut_off(repr(name) for name in unknown)}, which the model does not have. It is the "
            "configuration of another model; give the one that this was converted with."
        )


def _check_layer(name: str, given: LayerConfig, used: LayerConfig, source: str) -> None:
    # What cannot be packed was converted with INT8 where the file says INT4.
    differences = [_differences(asdict(candidate), asdict(used)) for candidate in (given, without_int4(given))]
    if all(differences):
        raise RuntimeError(
            f"'{source}' is not the configuration that the model was converted with. Layer '{name}': "
            f"{differences[0][0]}. Give the file of the conversion, or convert the float model anew."
        )


def _differences(given: dict[str, Any], used: dict[str, Any]) -> list[str]:
    found = []
    for key, value in used.items():
        other = given[key]
        if isinstance(value, dict):
            found += _differences(other, value)
        elif other != value and not (key == "channel_wise" and other is None):
            found.append(f"{key} is {other} there and {value} in the model")
    return found


def check_record(record: QuantRecord, model: nn.Module, plan: QuantPlan, source: str) -> None:
    """Check that a record is that of a model as it is now.

    Args:
        record: The record.
        model: The model.
        plan: Its plan.
        source: Where the record comes from, for messages.

    Raises:
        RuntimeError: If it is not, with what differs.
    """
    if len(record) == 0:
        raise RuntimeError(
            f"The record in {source} is empty. It is written by an evaluation pass of the trained model: "
            "model.eval(); model(input)."
        )
    planned = [layer.name for layer in plan.layers]
    differing = {"missing": [n for n in planned if n not in record], "unknown": [n for n in record if n not in planned]}
    for what, names in differing.items():
        if names:
            listed = cut_off(repr(name) for name in names)
            raise RuntimeError(
                f"The record in {source} is not that of this model: {listed} "
                + ("are quantized and not in it." if what == "missing" else "are in it and not quantized in the model.")
                + " Write it anew with QuantRecord.from_model(model).save(...)."
            )
    now = QuantRecord.from_model(model)
    if not record.allclose(now, _TOLERANCE):
        first = next(iter(record.differences(now, _TOLERANCE)))
        raise RuntimeError(
            f"The record in {source} does not belong to the model as it is now: {first} (here: the record, there: the "
            "model). The model was trained on after the record was written, or it is the record of another one. "
            "Evaluate the model once more, or write the record with QuantRecord.from_model(model).save(...)."
        )


def _mode(layer: nn.Module) -> str:
    return layer.quant_mode if isinstance(layer, QATLayer) else "quantized"
