"""What a converted model does by itself in plain PyTorch: write its record file, agree on the calibration.

In Lightning the callback does both, and these hooks are not installed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.files import is_file, write_text
from amct_lightning.modules import QATLayer, activation_quantizers, quantized_layers
from amct_lightning.modules.calibration import Agreement, is_calibrated, take_nonfinite
from amct_lightning.modules.shift_hook import shift_searches
from amct_lightning.modules.skipped import SkippedLayers
from amct_lightning.quantizers import ShiftSearch, WeightQuantizer, is_exporting
from amct_lightning.quantizers.shift_search import best_shifts
from amct_lightning.record import QuantRecord
from amct_lightning.wording import cut_off


def install_hooks(model: nn.Module, record_file: str) -> None:
    """Make a converted model keep its record file up to date.

    Args:
        model: The converted model.
        record_file: The file to write after evaluation passes.
    """
    found = find_plan(model)
    quantizers = list(activation_quantizers(model).values())
    agreement = Agreement(quantizers, found[1].config.batch_num if found else 1)
    layers = [cast(QATLayer, layer) for layer in quantized_layers(model).values()]
    hook = _PlainHook(record_file, agreement, SkippedLayers(layers))
    model.register_forward_hook(hook)


class _PlainHook:
    """Forward hook of the converted model; a class, so that it survives pickle.

    A deep copy of the model agrees on its calibration as well, but writes no record: the file is the original's.
    """

    def __init__(self, record_file: str | None, agreement: Agreement, skipped: SkippedLayers) -> None:
        self.record_file = record_file
        self.agreement = agreement
        self.skipped = skipped
        self.written_text = ""
        self.seen_state: tuple[int, ...] | None = None
        self.seen_factors: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _PlainHook:
        return _PlainHook(None, copy.deepcopy(self.agreement, memo), copy.deepcopy(self.skipped, memo))

    def __call__(self, model: nn.Module, _args: Any, _output: Any) -> None:
        if is_exporting():
            return
        if not model.training:
            self._write_record(model)
            return
        if self.seen_state is not None:
            self.seen_state = None  # whatever the training changes, and however: the next evaluation looks anew
        if self.agreement.unsettled:
            self._end_batch(model)
        if dist.is_available() and dist.is_initialized():
            self._catch_up()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end_batch(self, model: nn.Module) -> None:
        self.agreement.end_batch(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _catch_up(self) -> None:
        self.skipped.catch_up()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _write_record(self, model: nn.Module) -> None:
        found = find_plan(model)
        if self.record_file is None or found is None or not self._has_changed(*found):
            return
        nonfinite = take_nonfinite(activation_quantizers(model))
        if nonfinite:
            warnings.warn(
                f"NaN or infinite values reached the activation quantizers of {cut_off(nonfinite)} in training. Check "
                "the input data, lower the learning rate, or clip gradients.",
                stacklevel=2,
            )
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            text = QuantRecord.from_model(model).to_text()
            if text != self.written_text or not is_file(self.record_file):
                write_text(self.record_file, text)
                self.written_text = text

    @torch.no_grad()
    def _has_changed(self, root: nn.Module, plan: QuantPlan) -> bool:
        """Tell whether the record may differ from the last one, and take note of what it depends on."""
        if not is_calibrated(root):
            return False
        state, factors = tuple(_state_of(root)), _factors_of(root, plan)
        before, known = self.seen_state, self.seen_factors
        self.seen_state, self.seen_factors = state, factors
        if state != before or not is_file(str(self.record_file)):
            return True
        # Weights can change without a trace on the host: p.data.copy_(average). So the factors are compared, too.
        return known is None or not torch.equal(known, factors)


def _state_of(model: nn.Module) -> Iterator[int]:
    """Yield what changes on the host with the state that the record depends on, in place or by another tensor.

    The scales that a weight quantizer notes in every forward follow from the weight and are left out, as are the sums
    of the search of the shifts, which grow with every batch.
    """
    tensors: list[Tensor] = list(model.parameters())
    for module in model.modules():
        if not isinstance(module, (WeightQuantizer, ShiftSearch)):
            tensors += module.buffers(recurse=False)
    for tensor in tensors:
        yield from (id(tensor), tensor._version, tensor.data_ptr())


def _factors_of(root: nn.Module, plan: QuantPlan) -> Tensor:
    """Return the numbers of which the record is made, 1-d, as this forward has left them; nothing is read."""
    factors: list[Tensor] = []
    for layer_plan in plan.layers:
        layer = cast(QATLayer, root.get_submodule(layer_plan.name))
        for name in layer.activation_quantizers:
            factors += layer.get_quantizer(name).usable_clips()
        factors += [cast(WeightQuantizer, getattr(layer, name)).scale for name in layer.weight_quantizers]
        if layer_plan.batch_norm is not None:
            norm = root.get_submodule(layer_plan.batch_norm)
            factors += [factor for factor in (norm.weight, norm.running_var) if isinstance(factor, Tensor)]
    factors += [best_shifts(search.errors) for search in shift_searches(root)]
    return torch.cat([factor.detach().flatten().to(factors[0].device, torch.float32) for factor in factors])
