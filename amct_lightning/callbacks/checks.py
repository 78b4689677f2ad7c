"""What the callback checks and says: its arguments, its place in the Trainer, and plans that do not agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from amct_lightning.config import QuantChoices, RetrainConfig
from amct_lightning.conversion.plan import LayerPlan, QuantPlan, find_plan
from amct_lightning.files import Location, is_file
from amct_lightning.modules import activation_quantizers, quantized_layers
from amct_lightning.modules.calibration import missed_layers
from amct_lightning.modules.degenerate import check_on_degenerate
from amct_lightning.quantizers.executors import check_execution
from amct_lightning.wording import abbreviated, cut_off


def find_submodule(pl_module: nn.Module, name: str | None) -> nn.Module:
    """Return the part of a LightningModule with a dotted name, all of it for ``None``."""
    if name is None:
        return pl_module
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        known = ", ".join(f"'{child}'" for child, _ in pl_module.named_children())
        raise ValueError(
            f"QuantRetrainCallback(submodule='{name}'): {type(pl_module).__name__} has no such module. "
            f"Its children are {known or 'none'}."
        ) from None


def check_neighbours(callbacks: Sequence[object], callback: object) -> None:
    """Refuse a Trainer with two callbacks of this kind, or with one before it that copies the float model."""
    if any(type(other) is type(callback) and other is not callback for other in callbacks):
        raise ValueError(
            "The Trainer has two QuantRetrainCallbacks. Use one; to quantize several parts of a LightningModule, "
            "convert all of it and disable the other layers in the config."
        )
    for other in callbacks[: callbacks.index(callback)]:
        # By name: Lightning before 2.6 has no WeightAveraging.
        if {kind.__name__ for kind in type(other).__mro__} & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise ValueError(
                f"{type(other).__name__} stands before QuantRetrainCallback and would average the float model. Put "
                "QuantRetrainCallback first in the Trainer's callbacks."
            )


def check_arguments(callback: Any) -> None:
    """Refuse arguments of the callback that have a wrong type or value."""
    config, input_data, on_nonfinite = callback.config, callback.input_data, callback.on_nonfinite
    for name in ("record_file", "submodule", "float_checkpoint"):
        value = getattr(callback, name)
        if value is not None and (not isinstance(value, (str, Path)) or not str(value)):
            raise TypeError(f"QuantRetrainCallback({name}={value!r}): must be a non-empty text or None.")
    for name in ("allow_reuse", "search_n", "deploy_grid"):
        if not isinstance(getattr(callback, name), bool):
            raise TypeError(f"QuantRetrainCallback({name}={getattr(callback, name)!r}): must be True or False.")
    check_execution(callback.execution, "QuantRetrainCallback")
    if callback.batch_to_input is not None and not callable(callback.batch_to_input):
        raise TypeError("QuantRetrainCallback(batch_to_input=...) must be a function of a batch, or None.")
    if config is not None and not isinstance(config, (str, Path, RetrainConfig, QuantChoices, Mapping)):
        raise TypeError(
            'QuantRetrainCallback(config=...) must be a preset such as "INT8", the path of a .json, .cfg or .yaml '
            f"file, a dict, RetrainConfig, QuantChoices or None, got {type(config).__name__}."
        )
    if input_data is not None and not isinstance(input_data, (Tensor, tuple, Mapping)):
        raise TypeError(
            "QuantRetrainCallback(input_data=...) must be a tensor, a tuple of positional or a dict of keyword "
            f"arguments, got {type(input_data).__name__}."
        )
    for name in ("quant_lr_scale", "quant_weight_decay"):
        value = getattr(callback, name)
        if value is None and name == "quant_weight_decay":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"QuantRetrainCallback({name}={value!r}): must be a finite number >= 0.")
    if on_nonfinite not in ("warn", "raise"):
        raise ValueError(f"QuantRetrainCallback(on_nonfinite={on_nonfinite!r}): must be 'warn' or 'raise'.")
    check_on_degenerate(callback.on_degenerate, "QuantRetrainCallback")


def warn_left_out(optimizers: Iterable[torch.optim.Optimizer], clips: list[nn.Parameter]) -> None:
    """Warn of clips that no optimizer trains."""
    known = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    left_out = sum(clip.requires_grad and id(clip) not in known for clip in clips)
    if left_out and known:
        rank_zero_warn(
            f"{left_out} of {len(clips)} learned clip values are in no optimizer and stay as calibrated. Make the "
            "optimizer in configure_optimizers() from self.parameters() to train them."
        )


def explain_matrices_only(exception: BaseException) -> None:
    """Add the remedy to the error of an optimizer that refuses parameters which are no matrices, as Muon does."""
    trace = exception.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    optimizer = None if trace is None else trace.tb_frame.f_locals.get("self")
    constructing = trace is not None and trace.tb_frame.f_code.co_name == "__init__"
    if isinstance(optimizer, torch.optim.Optimizer) and constructing and isinstance(exception, ValueError):
        name = type(optimizer).__name__
        exception.args = (
            f"{exception} The learned factors of a quantized model are parameters with no or one dimension. If {name} "
            f"takes matrices only, give it [p for p in self.parameters() if p.ndim == 2], and the others to another "
            f"optimizer, such as AdamW.",
        )


def describe_difference(model: QuantPlan, checkpoint: QuantPlan) -> str:
    """Say in what two plans differ: only the settings that do, of the first layer where some do."""
    for aspect in (_settings, _data_flow):
        here, there = aspect(model), aspect(checkpoint)
        for owner in dict.fromkeys([*there, *here]):
            ours, theirs = here.get(owner), there.get(owner)
            if ours is None or theirs is None:
                return f"{owner}it is missing {'here' if ours is None else 'there'}"
            different = [key for key in theirs if theirs[key] != ours.get(key)]
            if different:
                return owner + cut_off(f"{key} is {theirs[key]} there and {ours.get(key)} here" for key in different)
    return "the layers do not run in the same order"


def _settings(plan: QuantPlan) -> dict[str, dict[str, Any]]:
    """Return the configuration of a plan by layer, with what belongs to no layer under an empty name."""
    config = plan.config
    run = {"batch_num": config.batch_num, "fakequant_precision_mode": config.fakequant_precision_mode}
    layers = {f"layer '{name}': ": _flat(asdict(layer)) for name, layer in config.items()}
    return layers | {"": run | {"search_n": plan.search_n, "deploy_grid": plan.deploy_grid, "serving": plan.serving}}


def _data_flow(plan: QuantPlan) -> dict[str, dict[str, Any]]:
    """Return what a plan says of the data flow, by layer."""
    compared = [item.name for item in fields(LayerPlan) if item.compare and item.name != "name"]
    return {
        f"data flow of layer '{layer.name}': ": {key: getattr(layer, key) for key in compared} for layer in plan.layers
    }


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return flat


def warn_spawned(trainer: pl.Trainer) -> None:
    """Warn that the model of the main process stays float when others are started to train theirs."""
    # Private in Lightning (2.5, 2.6): nothing public tells a strategy that spawns or forks from the others.
    if getattr(trainer.strategy, "_start_method", "popen") != "popen" and trainer.is_global_zero:
        rank_zero_warn(
            "This strategy trains in processes of its own, so the model in the main process stays float. Get the "
            "trained one with load_qat_checkpoint(MyModule, trainer.checkpoint_callback.best_model_path)."
        )


def warn_unfinished(model: nn.Module, steps: int, record: Location) -> None:
    """Say at the end of a training why there is no record, or what it lacks."""
    quantizers = activation_quantizers(model)
    waiting = [name for name, quantizer in quantizers.items() if not (quantizer.has_range or quantizer.missed)]
    found, missed = find_plan(model), missed_layers(model)
    if missed and not waiting:
        number = len(quantized_layers(model))
        rank_zero_info(
            f"The record '{record}' has {number - len(missed)} of {number} layers: {abbreviated(missed)} left out."
        )
    if waiting and found is not None:
        never = [name for name in waiting if not (quantizers[name].batches or quantizers[name].observed)]
        remedy = "lower batch_num"
        if any(quantizers[name].waits for name in waiting):
            remedy = "let more than zeros reach them (on_degenerate='wait')"
        elif never == waiting and steps >= found[1].config.batch_num:
            remedy = "as no training batch has reached these layers, leave them out: skip_layers in the config"
        old = " The file that is there is an older one." if is_file(record) else ""
        rank_zero_warn(
            f"No record was written: {len(waiting)} of {len(quantizers)} activation quantizers are not calibrated "
            f"after {steps} training batches ({abbreviated(waiting)}); batch_num is "
            f"{found[1].config.batch_num}. Train longer, or {remedy}.{old}"
        )
