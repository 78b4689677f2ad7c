"""The layers a monitor looks at: their factors, and how far these have drifted since the calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn

from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules import QATLayer, quantized_layers
from amct_lightning.modules.folding import current_weight, is_sharded
from amct_lightning.quantizers import ActivationQuantizer, WeightQuantizer
from amct_lightning.quantizers.functions.weight import fake_quantize_weight

FACTORS = (
    "clip_max",
    "clip_min",
    "scale",
    "offset",
    "clip_drift",
    "weight_signal",
    "weight_noise",
    "weight_scale_mean",
    "weight_scale_drift",
)
"""What :func:`read_factors` gives per layer."""


@dataclass(frozen=True)
class MonitoredLayer:
    """One row of the monitor: a quantized tensor with the weight that it is multiplied with.

    Attributes:
        name: Name of the layer as in the record; that of a recurrent layer's second row ends in `` (hidden state)``.
        layer: The layer.
        quantizer: Its activation quantizer; ``None`` if its input has no range (algo: per_token or none).
        source: The layer in whose forward the activations are seen; ``None`` if another row shows them already,
            because the quantizer is shared, or if there is no range to measure with.
        weight_quantizer: Its weight quantizer.
        weight_name: Name of the weight in the layer.
        is_hidden: Whether the activations are the hidden states of a recurrent layer.
    """

    name: str
    layer: QATLayer
    quantizer: ActivationQuantizer | None
    source: QATLayer | None
    weight_quantizer: WeightQuantizer
    weight_name: str
    is_hidden: bool

    @property
    def num_bits(self) -> int:
        """Number of bits of the activations; 8 if they are in float, of which nothing is shown."""
        bits: int = getattr(self.layer.input_quantizer, "num_bits", 8)
        return bits

    @property
    def weight(self) -> Tensor | None:
        """The weight, or ``None`` where it is not there; of a sharded one all processes have to ask for it."""
        weight = current_weight(self.layer, self.weight_name)
        is_whole = type(weight) in (Tensor, nn.Parameter) and weight.numel() > 0
        return weight.detach().float() if is_whole else None

    def activations(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """Return the tensor that the quantizer has quantized in a forward.

        Args:
            args: Positional arguments of the forward.
            kwargs: Keyword arguments of the forward.
            output: Its result.
        """
        given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
        if not self.is_hidden:
            return cast(Tensor, given["input"])
        # Every state but the last, which no step reads.
        steps: Tensor = output[0].detach()
        if getattr(self.layer, "batch_first", False) and steps.dim() == 3:
            steps = steps.movedim(1, 0)
        initial = given.get("hx")
        if isinstance(initial, (tuple, list)):
            initial = initial[0]
        first = torch.zeros_like(steps[:1]) if initial is None else initial.detach().to(steps.dtype)
        return torch.cat((first, steps[:-1]))


def monitored_layers(model: nn.Module) -> list[MonitoredLayer]:
    """Return the rows of a monitor, in module order.

    Args:
        model: A converted model, or a wrapper around one such as a LightningModule.

    Example:
        >>> from amct_lightning import prepare_qat
        >>> model = prepare_qat(nn.Sequential(nn.Linear(4, 2), nn.GRU(2, 3)), None, torch.ones(2, 4))
        >>> [row.name for row in monitored_layers(model)]
        ['0', '1', '1 (hidden state)']
    """
    found = find_plan(model)
    layers = {} if found is None else {name: cast(QATLayer, at) for name, at in quantized_layers(found[0]).items()}
    # Of layers that share a quantizer, the one that feeds its calibration runs whenever the others do.
    sources = {id(layer.input_quantizer): layer for layer in layers.values() if layer.calibrates_input}
    rows: list[MonitoredLayer] = []
    seen: set[int] = set()
    for name, layer in layers.items():
        parts = zip_longest(layer.activation_quantizers, layer.weight_quantizers.items())
        for part, (weight_quantizer, weight_name) in parts:
            quantizer = None if part is None else layer.get_quantizer(part)
            is_hidden = part == "hidden_quantizer"
            rows.append(
                MonitoredLayer(
                    name=f"{name} (hidden state)" if is_hidden else name,
                    layer=layer,
                    quantizer=quantizer,
                    source=None if quantizer is None or id(quantizer) in seen else sources.get(id(quantizer), layer),
                    weight_quantizer=getattr(layer, weight_quantizer),
                    weight_name=weight_name,
                    is_hidden=is_hidden,
                )
            )
            seen.add(id(quantizer))
    return rows


class Drift:
    """How far factors have moved from where their calibration has left them.

    Attributes:
        clips: Name of a row -> upper and lower clip at the end of the last calibration, 1-d.
        weight_scales: Name of a row -> weight scales at that moment, 1-d.
    """

    def __init__(self) -> None:
        self.clips: dict[str, Tensor] = {}
        self.weight_scales: dict[str, Tensor] = {}
        self._fresh: set[str] = set()

    def note(self, rows: Iterable[MonitoredLayer]) -> None:
        """Take the factors of rows whose calibration has ended since the last call; forget those calibrating anew.

        Nothing is read from the device, and nothing is done for a row that was noted already.

        Args:
            rows: The rows.
        """
        for row in rows:
            if row.quantizer is None:  # which is quantized without a calibration
                begins = row.name not in self.weight_scales and row.layer.quant_mode == "quantized"
                weight = row.weight if begins else None
                if weight is not None:
                    self.weight_scales[row.name] = row.weight_quantizer.compute_scale(weight)
            elif row.quantizer.calibrating:
                self.clips.pop(row.name, None)
                self.weight_scales.pop(row.name, None)
            elif row.quantizer.fresh or row.name in self._fresh or row.name not in self.clips:
                self._take(row, row.quantizer)

    def _take(self, row: MonitoredLayer, quantizer: ActivationQuantizer) -> None:
        self.clips[row.name] = torch.stack(quantizer.usable_clips())
        # Gathering a sharded weight takes all ranks, and not all of them may have calibrated the row yet.
        weight = None if quantizer.fresh and is_sharded(row.layer) else row.weight
        if weight is not None:
            self.weight_scales[row.name] = row.weight_quantizer.compute_scale(weight)
        if quantizer.fresh:  # the processes have yet to agree on the range, so look once more
            self._fresh.add(row.name)
        else:
            self._fresh.discard(row.name)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint has to hold, apart from ranges that the processes have yet to agree on."""
        return {
            name: {row: value for row, value in values.items() if row not in self._fresh}
            for name, values in (("clips", self.clips), ("weight_scales", self.weight_scales))
        }

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what :meth:`state` gave; :meth:`adopt` has to follow.

        Args:
            state: From :meth:`state`.
        """
        self.clips, self.weight_scales = dict(state["clips"]), dict(state["weight_scales"])
        self._fresh = set()

    def adopt(self, rows: Iterable[MonitoredLayer]) -> None:
        """Move what was loaded from a checkpoint to where the layers are; drop what does not fit them.

        Args:
            rows: The rows.
        """
        by_name = {row.name: row for row in rows}
        self.clips = {
            name: t.to(quantizer.clip_max.device)
            for name, t in self.clips.items()
            if name in by_name and (quantizer := by_name[name].quantizer) is not None
        }
        self.weight_scales = {
            name: scales.to(by_name[name].weight_quantizer.scale.device)
            for name, scales in self.weight_scales.items()
            if (name in self.clips or (name in by_name and by_name[name].quantizer is None))
            and scales.shape == by_name[name].weight_quantizer.scale.shape
        }

    def of_clips(self, name: str, clips: Tensor) -> Tensor:
        """Return by how much both ends of a range have moved, relative to its width then; NaN if that is not known."""
        if name not in self.clips:
            return clips.new_full((), torch.nan)
        then = self.clips[name]
        return (clips - then).abs().sum() / (then[0] - then[1])

    def of_weight_scales(self, name: str, scales: Tensor) -> Tensor:
        """Return by how much weight scales have moved on average, relative to their mean then; NaN if not known."""
        if name not in self.weight_scales:
            return scales.new_full((), torch.nan)
        then = self.weight_scales[name]
        return (scales - then).abs().sum() / then.abs().sum()


@torch.no_grad()
def read_factors(row: MonitoredLayer, drift: Drift) -> Tensor:
    """Return the :data:`FACTORS` of a row as they are now, on its device; NaN for what is not known.

    Args:
        row: The row.
        drift: Where the factors come from.
    """
    quantizer = row.quantizer
    unknown = row.weight_quantizer.scale.new_full((), torch.nan)
    data = [unknown] * 5
    if row.source is not None and quantizer is not None and quantizer.has_range:
        clips = quantizer.usable_clips()
        factors = quantizer.factors_of(*clips)
        data = [*clips, *factors, drift.of_clips(row.name, torch.stack(clips))]
    weight = row.weight
    if weight is None:
        return torch.stack([*data, *[unknown] * 4])
    scales = row.weight_quantizer.compute_scale(weight)
    layout, by_channel = row.weight_quantizer.layout, row.weight_quantizer.channel_wise
    spread = layout.spread(scales, layout.view(weight), by_channel)
    noise = fake_quantize_weight(weight, spread, layout, row.weight_quantizer.num_bits).sub_(weight).square_().sum()
    moved = drift.of_weight_scales(row.name, scales)
    return torch.stack([*data, weight.square().sum(), noise, scales.mean(), moved])
