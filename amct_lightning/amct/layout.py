"""The state of a model as AMCT converts it: every tensor in AMCT's order, and where it comes from here.

AMCT replaces a layer by a wrapper. The wrapper's ``quant_module`` computes and holds the layer as
``replaced_module`` (a recurrent one also as ``comp_module``), its ``record_module`` writes the record, and a
BatchNorm behind the layer moves into it as ``bn_module``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from amct_lightning.conversion.plan import LayerPlan, QuantPlan
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from amct_lightning.quantizers.functional import repair_clips

State = Mapping[str, Tensor]

COUNTED = 100
"""AMCT stops counting forwards here, so a full counter says that any calibration is over."""

CLIPS = {"clip_max": "clip_max", "clip_min": "clip_min"}
PREVIOUS = {"clip_max_previous": "clip_max_pre", "clip_min_previous": "clip_min_pre"}
_ACTIVATIONS = {"input_quantizer": "acts", "hidden_quantizer": "acts_h"}
_WEIGHTS = {"weight_quantizer": ("wts", "w"), "recurrent_weight_quantizer": ("rec_wts", "r")}


@dataclass(frozen=True)
class Entry:
    """One tensor of AMCT's state.

    Attributes:
        amct: Its name there.
        make: Makes it from the state here.
        ours: The name here of the tensor that it becomes, ``None`` if it is not needed here.
        optional: Whether it may be missing.
    """

    amct: str
    make: Callable[[State], Tensor]
    ours: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class PlannedLayer:
    """A quantized layer with its plan.

    Attributes:
        plan: Its plan.
        module: The layer.
        tensors: Names of its own parameters and buffers.
        clip_given: Whether its clips start from the configuration and need no calibration.
    """

    plan: LayerPlan
    module: QATLayer
    tensors: list[str]
    clip_given: bool

    @property
    def owner(self) -> str:
        """Name of the layer that owns the quantizer of its input in AMCT."""
        return self.plan.shares_in_amct or self.plan.shares_input_of

    @property
    def own_activations(self) -> list[str]:
        """Names of its activation quantizers, without one that another layer owns in AMCT."""
        shared = self.owner != self.plan.name
        return [name for name in self.module.activation_quantizers if not (shared and name == "input_quantizer")]

    def path(self, *parts: str) -> str:
        """Return the name of something in the layer."""
        return join(self.plan.name, *parts)


def planned_layers(root: nn.Module, plan: QuantPlan) -> dict[str, PlannedLayer]:
    """Return the quantized layers of a converted model by name."""
    tensors = _tensors_by_module(root)
    return {
        layer.name: PlannedLayer(
            layer,
            cast(QATLayer, root.get_submodule(layer.name)),
            tensors[layer.name],
            plan.config[layer.name].retrain_data_config.clip_max is not None,
        )
        for layer in plan.layers
    }


def amct_layout(root: nn.Module, plan: QuantPlan) -> list[Entry]:
    """List the state that AMCT's model has, in its order.

    Args:
        root: The model as converted by this package.
        plan: Its plan.

    Returns:
        One entry per tensor.
    """
    layers, tensors = planned_layers(root, plan), _tensors_by_module(root)
    absorbed = {layer.batch_norm for layer in plan.layers}
    entries = []
    for name, module in root.named_modules(remove_duplicate=False):
        if name in layers:
            entries += _wrapper(root, layers, layers[name])
        elif name not in absorbed and not isinstance(module, Quantizer):
            entries += [_copy(join(name, tensor), join(name, tensor)) for tensor in tensors.get(name, ())]
    return entries


def join(*parts: str) -> str:
    """Join the parts of a dotted name; the name of a model itself is empty."""
    return ".".join(part for part in parts if part)


def _tensors_by_module(root: nn.Module) -> dict[str, list[str]]:
    tensors: dict[str, list[str]] = {}
    for key in root.state_dict():
        module, _, tensor = key.rpartition(".")
        tensors.setdefault(module, []).append(tensor)
    return tensors


def _wrapper(root: nn.Module, layers: Mapping[str, PlannedLayer], layer: PlannedLayer) -> list[Entry]:
    suffixes = [_WEIGHTS[name][1] for name in layer.module.weight_quantizers]
    batch_norm = None if layer.plan.batch_norm is None else root.get_submodule(layer.plan.batch_norm)
    scales = _amct_scales(layer.module, "weight_quantizer")
    if batch_norm is not None and scales == 1:
        scales = cast(int, batch_norm.num_features)
    entries = [_fill(layer.path(f"scale_{suffix}"), 1.0, scales) for suffix in suffixes]
    entries += [_fill(layer.path(f"offset_{suffix}"), 0.0, scales) for suffix in suffixes]
    entries += _quant_module(layer, layer.path("quant_module"))
    if layer.owner != layer.plan.name:
        shared = _quant_module(layers[layer.owner], layer.path("quant_module.acts_comp_reuse"))
        entries += [Entry(entry.amct, entry.make, optional=True) for entry in shared]
    entries.append(_quant_layer_num(layer, len(layers)))
    if batch_norm is not None:
        prefix = f"{layer.plan.batch_norm}."
        names = [key.removeprefix(prefix) for key in root.state_dict() if key.startswith(prefix)]
        entries += [_copy(layer.path("bn_module", name), prefix + name) for name in names]
    return entries


def _quant_module(layer: PlannedLayer, there: str) -> list[Entry]:
    """List the module that AMCT computes in; ``there`` is its name."""
    activations = [
        (layer.path(name), f"{there}.{_ACTIVATIONS[name]}", layer.module.get_quantizer(name))
        for name in layer.own_activations
    ]
    entries = [_copy(f"{amct}_{b}", f"{ours}.{a}") for ours, amct, _ in activations for a, b in CLIPS.items()]
    for name in layer.module.weight_quantizers:
        amct, ours, number = f"{there}.{_WEIGHTS[name][0]}", layer.path(name), _amct_scales(layer.module, name)
        entries += [_copy(f"{amct}_{field}s", f"{ours}.{field}", number) for field in ("scale", "offset")]
    entries.append(Entry(f"{there}.cur_batch", lambda state: torch.tensor(float(_forwards(layer, state)))))
    entries += [_copy(f"{amct}_{b}", f"{ours}.{a}") for ours, amct, _ in activations for a, b in PREVIOUS.items()]
    entries += [entry for activation in activations for entry in _latest_factors(*activation)]
    if not isinstance(layer.module, nn.RNNBase):
        entries.append(_fill(f"{there}.prune_cur_batch", 0.0))
        shape = cast(Tensor, layer.module.weight).shape
        entries.append(_fill(f"{there}.wts_mask", torch.nan, *shape, optional=True))
    entries.append(_fill(f"{there}.s_rec_flag", 0.0))
    return entries + _float_layer(layer, there)


def _float_layer(layer: PlannedLayer, there: str) -> list[Entry]:
    """List the layer's own tensors. A recurrent one has them twice; the copy that AMCT computes with counts."""
    if not isinstance(layer.module, nn.RNNBase):
        return [_copy(f"{there}.replaced_module.{name}", layer.path(name)) for name in layer.tensors]
    entries = []
    for part, live in (("replaced_module", "weight"), ("comp_module", "bias")):
        copies = [_copy(f"{there}.{part}.{name}", layer.path(name)) for name in layer.tensors]
        names = zip(copies, layer.tensors, strict=True)
        entries += [copy if name.startswith(live) else Entry(copy.amct, copy.make) for copy, name in names]
    return entries


def _latest_factors(ours: str, amct: str, quantizer: ActivationQuantizer) -> list[Entry]:
    """List the factors that AMCT notes in every forward, NaN before the first."""

    def factors(state: State) -> tuple[Tensor, Tensor]:
        clip_max, clip_min, *previous = (state[f"{ours}.{name}"].detach() for name in (*CLIPS, *PREVIOUS))
        usable = repair_clips(clip_max, clip_min, previous[0], previous[1], quantizer.fixed_min)
        if 0 <= int(state[f"{ours}.calibrated_batches"]) < quantizer.batch_num:
            return torch.tensor(torch.nan), torch.tensor(torch.nan)
        return quantizer.factors_of(*usable)

    return [Entry(f"{amct}_scale", lambda s: factors(s)[0]), Entry(f"{amct}_offset", lambda s: factors(s)[1])]


def _forwards(layer: PlannedLayer, state: State) -> int:
    """Return AMCT's counter of forwards, which tells whether clips are calibrated and learned scales initialized."""
    batches = int(state[layer.path("input_quantizer.calibrated_batches")])
    if batches < 0:  # AMCT does not calibrate twice, so it has no count for the second time
        batches = layer.module.input_quantizer.batch_num
    batches = min(batches, COUNTED if batches >= layer.module.input_quantizer.batch_num else COUNTED - 1)
    initialized = state.get(layer.path("weight_quantizer.initialized"))
    if initialized is None:
        return batches
    if initialized:
        return max(batches, 1)
    return 0 if layer.clip_given else batches


def _quant_layer_num(layer: PlannedLayer, layers: int) -> Entry:
    """The number of quantized layers, which AMCT finds in the first training forward."""
    name = layer.path("record_module.quant_layer_num")
    return Entry(name, lambda state: torch.tensor(float(layers if _forwards(layer, state) else 0)))


def _amct_scales(layer: QATLayer, quantizer: str) -> int:
    """Return how many scales AMCT stores: a single one of a recurrent layer once per gate."""
    number = cast(WeightQuantizer, getattr(layer, quantizer)).scale.numel()
    if number == 1 and isinstance(layer, nn.RNNBase):
        return cast(Tensor, layer.weight_hh_l0).shape[0] // layer.hidden_size
    return number


def _copy(amct: str, ours: str, number: int | None = None) -> Entry:
    """A tensor that both have; a single number is repeated to ``number`` of them."""

    def make(state: State) -> Tensor:
        tensor = state[ours]
        return tensor if number is None or tensor.numel() == number else tensor.repeat(number)

    return Entry(amct, make, ours)


def _fill(amct: str, value: float, *shape: int, optional: bool = False) -> Entry:
    return Entry(amct, lambda _: torch.full(shape, value), optional=optional)
