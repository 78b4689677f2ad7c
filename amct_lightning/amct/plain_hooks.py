"""What a converted model does by itself in plain PyTorch: write its record file, agree on the calibration.

In Lightning the callback does both, and these hooks are not installed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amct_lightning.conversion.plan import find_plan
from amct_lightning.files import is_file
from amct_lightning.modules import activation_quantizers
from amct_lightning.modules.calibration import Agreement, take_nonfinite
from amct_lightning.quantizers import WeightQuantizer
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
    hook = _PlainHook(record_file, Agreement(quantizers, found[1].config.batch_num if found else 1))
    model.register_forward_hook(hook)


class _PlainHook:
    """Forward hook of the converted model; a class, so that it survives pickle.

    A deep copy of the model agrees on its calibration as well, but writes no record: the file is the original's.
    """

    def __init__(self, record_file: str | None, agreement: Agreement) -> None:
        self.record_file = record_file
        self.agreement = agreement
        self.written_state: tuple[int, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _PlainHook:
        return _PlainHook(None, copy.deepcopy(self.agreement, memo))

    def __call__(self, model: nn.Module, _args: Any, _output: Any) -> None:
        if not model.training:
            self._write_record(model)
            return
        if self.written_state is not None:
            self.written_state = None  # whatever the training changes, and however: the next evaluation writes
        if not self.agreement.done:
            self._end_batch(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end_batch(self, model: nn.Module) -> None:
        self.agreement.end_batch(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _write_record(self, model: nn.Module) -> None:
        if self.record_file is None or not all(
            quantizer.has_range for quantizer in activation_quantizers(model).values()
        ):
            return
        state = tuple(number for tensor in _factors_of(model) for number in (id(tensor), tensor._version))
        if (state == self.written_state and is_file(self.record_file)) or find_plan(model) is None:
            return
        nonfinite = take_nonfinite(activation_quantizers(model))
        if nonfinite:
            warnings.warn(
                f"NaN or infinite values reached the activation quantizers of {cut_off(nonfinite)} in training. Check "
                "the input data, lower the learning rate, or clip gradients.",
                stacklevel=2,
            )
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            QuantRecord.from_model(model).save(self.record_file)
        self.written_state = state


def _factors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield all state that the record depends on; a change in place, by an optimizer or by loading, raises its version.

    The scales that a weight quantizer notes in every forward follow from the weight and are left out.
    """
    yield from model.parameters()
    for module in model.modules():
        if not isinstance(module, WeightQuantizer):
            yield from module.buffers(recurse=False)
