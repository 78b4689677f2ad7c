"""Translating the state_dict of a model that AMCT converted into that of a model converted here, and back.

Only names and tensors: reading a file is the business of ``restore_quant_retrain_model``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from amct_lightning.amct.layout import (
    CLIPS,
    COUNTED,
    PREVIOUS,
    Entry,
    PlannedLayer,
    State,
    amct_layout,
    join,
    planned_layers,
)
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.quantizers import LearnedWeightQuantizer, RatioWeightQuantizer, ShiftSearch, WeightQuantizer
from amct_lightning.wording import abbreviated


def convert_amct_state_dict(state_dict: State, model: nn.Module, *, to_amct: bool = False) -> dict[str, Tensor]:
    """Translate the state_dict of a model that AMCT converted into that of this package's model, or back.

    Calibration state is taken over: a quantizer is calibrated if AMCT's was, so learned clips stay. Of an LSTM or
    GRU, AMCT trains the biases of ``comp_module`` only, and computes with them and with the weights of
    ``replaced_module``; these become the parameters here. What AMCT keeps for its record (``scale_w``,
    ``acts_scale``, ``quant_layer_num`` and so on) follows from the rest and is not needed.

    Args:
        state_dict: The state_dict of AMCT's model; its keys may all begin with ``module.``. ``wts_mask`` and the
            copies of shared quantizers (``acts_comp_reuse``) may be missing. With ``to_amct`` that of ``model``.
        model: The model converted by this package with the configuration that AMCT was given; of a wrapper, the
            converted model in it counts. It tells names and shapes; its values are not used.
        to_amct: Translate to AMCT's names instead. What has no counterpart here is as AMCT starts with it.

    Returns:
        The translated state_dict, in the order of the model it is for. Tensors are shared where nothing changes.

    Raises:
        ValueError: If the model is not converted or has layers that AMCT does not quantize, or if names or shapes
            are missing, unexpected or wrong.

    Example:
        >>> from amct_lightning import prepare_qat
        >>> model = prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, torch.ones(1, 4))
        >>> state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        >>> list(state)[:3]
        ['0.scale_w', '0.offset_w', '0.quant_module.acts_clip_max']
        >>> model.load_state_dict(convert_amct_state_dict(state, model))
        <All keys matched successfully>
    """
    found = find_plan(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} is not converted. Convert it first with the configuration that AMCT was given: "
            "create_quant_retrain_model(...) or prepare_qat(model, config, input_data)."
        )
    root, plan = found
    _refuse_unknown_layers(root, plan)
    layout = amct_layout(root, plan)
    given, own = strip_module_prefix(state_dict, root), root.state_dict()
    if to_amct:
        _check(given, own, (), f"of the converted {type(root).__name__}")
        return {entry.amct: entry.make(given) for entry in layout}
    expected = {entry.amct: entry.make(own) for entry in layout}
    optional = {entry.amct for entry in layout if entry.optional}
    _check(given, expected, optional, f"of {type(root).__name__} as AMCT converts it")
    return _from_amct(given, root, plan, layout)


def is_amct_state_dict(state_dict: Mapping[str, object]) -> bool:
    """Tell AMCT's names from those of this package.

    Example:
        >>> is_amct_state_dict({"fc.quant_module.acts_clip_max": 1.0})
        True
    """
    return any(".quant_module." in f".{key}" for key in state_dict)


def strip_module_prefix(state_dict: State, model: nn.Module) -> State:
    """Remove the prefix ``module.`` that DDP gives to all names, unless the model's own names have it.

    Args:
        state_dict: The state_dict.
        model: The model that it is for.

    Returns:
        The state_dict with the names of ``model``.
    """
    prefix = "module."
    named = all(str(key).startswith(prefix) for key in state_dict)
    if not named or all(key.startswith(prefix) for key in model.state_dict()):
        return state_dict
    return {key.removeprefix(prefix): value for key, value in state_dict.items()}


def _from_amct(state: State, root: nn.Module, plan: QuantPlan, layout: list[Entry]) -> dict[str, Tensor]:
    own = root.state_dict()
    result = {entry.ours: state[entry.amct] for entry in layout if entry.ours is not None}
    layers = planned_layers(root, plan).values()
    for layer in layers:
        _complete_layer(result, layer, float(state[layer.path("quant_module.cur_batch")]))
    for layer in layers:
        for name in (*CLIPS, *PREVIOUS, "calibrated_batches"):
            tensor = join("input_quantizer", name)
            result[layer.path(tensor)] = result[join(layer.owner, tensor)]
    # The search for shifts is no part of AMCT's state: it starts anew.
    searches = [name for name, module in root.named_modules() if isinstance(module, ShiftSearch)]
    result |= {key: torch.zeros_like(own[key]) for key in own if key.rpartition(".")[0] in searches}
    return {key: result[key] for key in own if key in result}


def _complete_layer(result: dict[str, Tensor], layer: PlannedLayer, forwards: float) -> None:
    """Add what AMCT does not store, and replace the NaN that it has before its first forward."""
    for name in layer.own_activations:
        quantizer, path = layer.module.get_quantizer(name), layer.path(name)
        calibrated = layer.clip_given or forwards >= min(quantizer.batch_num, COUNTED)
        result[f"{path}.calibrated_batches"] = torch.tensor(quantizer.batch_num if calibrated else int(forwards))
        for clip, previous in zip(CLIPS, PREVIOUS, strict=True):
            value = result[f"{path}.{previous}"]
            result[f"{path}.{previous}"] = torch.where(value.isnan(), result[f"{path}.{clip}"], value)
    for name, parameter in layer.module.weight_quantizers.items():
        weights, path = cast(WeightQuantizer, getattr(layer.module, name)), layer.path(name)
        # A single scale of a recurrent layer is stored there once per gate.
        scale, offset = (result[f"{path}.{field}"][: weights.scale.numel()] for field in ("scale", "offset"))
        fresh = weights.max_abs_scale(result[layer.path(parameter)])
        result[f"{path}.scale"] = torch.where(scale.isnan(), fresh.to(scale.device), scale)
        result[f"{path}.offset"] = torch.nan_to_num(offset)
        if isinstance(weights, LearnedWeightQuantizer):
            result[f"{path}.initialized"] = torch.tensor(int(forwards > 0))
        else:
            result[f"{path}.scale_frozen"] = torch.tensor(0)


def _refuse_unknown_layers(root: nn.Module, plan: QuantPlan) -> None:
    for layer in plan.layers:
        module = root.get_submodule(layer.name)
        reason = f"it is called {layer.calls} times in one forward" if layer.calls > 1 else None
        if not LAYER_TYPES[supported_class(module)].by_default:
            reason = f"it is a {type(module).__name__}"
        elif isinstance(module, nn.RNNBase) and not module.bias:
            reason = "it has no bias"
        if isinstance(getattr(module, "weight_quantizer", None), RatioWeightQuantizer):
            reason = "its weight scales start from the least squared error (init: mse) and follow the largest value"
        if reason is not None:
            raise ValueError(
                f"AMCT cannot quantize layer '{layer.name}' ({reason}), so its state has no place for this layer. Set "
                "retrain_enable to false for it."
            )


def _check(given: Mapping[str, object], expected: State, optional: Collection[str], what: str) -> None:
    missing = [key for key in expected if key not in given and key not in optional]
    unexpected = [key for key in given if key not in expected]
    shapes = {key: (getattr(given[key], "shape", None), expected[key].shape) for key in given if key in expected}
    wrong = [f"{key} {tuple(a or ())} instead of {tuple(b)}" for key, (a, b) in shapes.items() if a != b]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    faults = "; ".join(f"{kind} ({len(keys)}): {abbreviated(keys)}" for kind, keys in found.items() if keys)
    if faults:
        raise ValueError(
            f"This is not the state_dict {what}. Tensors {faults}. Both models must be converted with the same "
            "configuration: convert the model again with the config file that belongs to the state_dict."
        )
