"""Calibration outside of a training step, and its one collective when there are several processes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amct_lightning.modules.convert import activation_quantizers, quantized_layers
from amct_lightning.modules.degenerate import warn_degenerate
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer
from amct_lightning.quantizers.base import several_processes
from amct_lightning.wording import abbreviated, cut_off


def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Calibrate the activation quantizers on given inputs, without training anything.

    The model runs in eval mode without gradients. Quantizers that are calibrated already stay as they are.

    Args:
        model: A converted model.
        batches: Inputs for the model: tensors, tuples of positional or mappings of keyword arguments. No more
            than the configured ``batch_num`` are used.

    Raises:
        TypeError: If a batch is none of these; a DataLoader of ``(x, y)`` gives lists, pass ``(x for x, _ in loader)``.
        ValueError: If the model has no quantized layers, a batch leads to NaN or infinite activations, or the batches
            end before every quantizer is calibrated.

    Example:
        >>> from amct_lightning import RetrainConfig, prepare_qat
        >>> x = torch.linspace(-1, 1, 8).view(2, 4)
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> model = prepare_qat(model, RetrainConfig.default(model, x), x)
        >>> calibrate(model, [x])
        >>> model[0].input_quantizer.calibrating
        False
    """
    quantizers = activation_quantizers(model)
    if not quantized_layers(model):
        raise ValueError(f"{type(model).__name__} has no quantized layers; convert it first, e.g. with prepare_qat().")
    if isinstance(batches, Tensor):
        raise TypeError("calibrate(model, batches) takes an iterable of batches, got one tensor; pass [tensor].")
    flags = [(module, module.training) for module in model.modules()]
    gates = [(quantizer, quantizer.gate) for quantizer in quantizers.values()]
    waiting = {name: quantizer for name, quantizer in quantizers.items() if quantizer.calibrating}
    try:
        model.eval()
        for quantizer in waiting.values():
            quantizer.train()
            quantizer.gate = None
        supply = iter(batches)
        with torch.no_grad():
            while any(quantizer.calibrating for quantizer in waiting.values()):
                batch = next(supply, None)
                if batch is None:
                    break
                _call(model, batch)
        synchronize_calibration(model)
    finally:
        for module, training in flags:
            module.training = training
        for quantizer, gate in gates:
            quantizer.gate = gate
    warn_degenerate(model)
    nonfinite = take_nonfinite(waiting)
    if nonfinite:
        raise ValueError(
            f"NaN or infinite values reached the activation quantizers of {abbreviated(nonfinite)} in the "
            "calibration; they were left out. Check the batches, convert again and calibrate on finite ones."
        )
    left = [name for name, quantizer in quantizers.items() if quantizer.calibrating]
    if left:
        raise ValueError(
            f"The batches ended before these layers were calibrated: {cut_off(left)}. Give at least `batch_num` "
            "batches that reach every quantized layer (with on_degenerate='wait': in which it gets more than zeros)."
        )


def take_nonfinite(quantizers: Mapping[str, ActivationQuantizer]) -> list[str]:
    """Name the quantizers whose input was NaN or infinite since the last look, and start anew."""
    found = [name for name, quantizer in quantizers.items() if bool(quantizer.nonfinite)]
    for name in found:
        quantizers[name].forget_nonfinite()
    return found


@torch.no_grad()
def synchronize_calibration(model: nn.Module) -> list[ActivationQuantizer]:
    """Give every process the mean of the freshly calibrated clips, with one collective for all layers.

    A layer that only some processes have calibrated takes the mean of those; clips that the processes have agreed on
    before stay as they are. Without a process group nothing is to be done.

    Args:
        model: A converted model; the same on every process.

    Returns:
        The quantizers that no training batch has reached yet, on any process.
    """
    quantizers = list(activation_quantizers(model).values())
    reached: list[Any] = [quantizer.reached for quantizer in quantizers]
    if several_processes() and quantizers:
        # Observing is Python state, so building this table costs no host synchronization.
        table = torch.stack([_row(quantizer) for quantizer in quantizers])
        dist.all_reduce(table)
        numbers = table[:, 2::2].tolist()  # the one read of the device
        reached = [anywhere for _, anywhere in numbers]
        for quantizer, row, (count, _) in zip(quantizers, table, numbers, strict=True):
            if count:
                quantizer.finish_calibration(row[0] / count, row[1] / count, row[3])
    for quantizer in quantizers:
        quantizer.settle()
    return [quantizer for quantizer, anywhere in zip(quantizers, reached, strict=True) if not anywhere]


def is_calibrated(model: nn.Module) -> bool:
    """Tell whether there is a record to take of a model: layers that no training batch reaches are not waited for.

    Args:
        model: A converted model.
    """
    quantizers = activation_quantizers(model).values()
    if not quantizers:
        return bool(quantized_layers(model))  # of which none has a range
    return all(q.has_range or q.missed for q in quantizers) and any(q.has_range for q in quantizers)


def missed_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that no training batch has reached in the time of the calibration, nor since.

    Args:
        model: A converted model, or a wrapper around one.

    Example:
        >>> missed_layers(nn.Linear(2, 2))
        []
    """
    return [name for name, layer in quantized_layers(model).items() if cast(QATLayer, layer).is_missed]


def warn_missed(model: nn.Module) -> None:
    """Warn of layers that the record lacks as no training batch reaches them, and of each of them once.

    Args:
        model: A converted model, or a wrapper around one.
    """
    missed = [quantizer for quantizer in activation_quantizers(model).values() if quantizer.missed]
    told = all(quantizer.is_told for quantizer in missed)
    for quantizer in missed:
        quantizer.is_told = True
    if not told and not (several_processes() and dist.get_rank()):
        names = missed_layers(model)
        warnings.warn(
            f"The record lacks {len(names)} of {len(quantized_layers(model))} layers: no training batch has reached "
            f"{abbreviated(names)}, so no range is known for their inputs, and they are evaluated in float. If "
            "training_step is not to run them, leave them out: skip_layers in the config. If it is, let it call them: "
            "they calibrate then, and enter the record.",
            stacklevel=3,
        )


class Agreement:
    """Counts the training batches of a calibration, after which the processes agree on its ranges.

    A quantizer that no batch has reached by then, on any process, is given up. It may still be reached later: a process
    alone takes note of its range at once; several do so after 1, 2, 4, ... batches, as they have to come together.

    Whether a calibration is in progress, the quantizers say. How many batches they have seen is no guide: it differs
    among processes if one of them gets an empty batch or does not reach a layer. Counting the batches of the training
    makes all of them enter the collective together.

    Attributes:
        quantizers: The quantizers that may calibrate; the same ones on every process.
        batch_num: Number of batches of a calibration.
        steps: Number of training batches since the calibration in progress began; 0 if all have settled.
    """

    def __init__(self, quantizers: Collection[ActivationQuantizer] = (), batch_num: int = 1) -> None:
        self.quantizers = quantizers
        self.batch_num = batch_num
        self.steps = 0

    @property
    def done(self) -> bool:
        """Whether all quantizers that may calibrate have done so, or were given up; the same on every process."""
        return all(quantizer.missed for quantizer in self.unsettled)

    @property
    def unsettled(self) -> list[ActivationQuantizer]:
        """The quantizers whose ranges the processes have not agreed on, with those given up; the same on all."""
        return [quantizer for quantizer in self.quantizers if quantizer.calibrating or quantizer.fresh]

    def end_batch(self, model: nn.Module, last: bool = False) -> bool:
        """Let the processes agree if a calibration ends with this batch.

        Args:
            model: The converted module.
            last: Whether it is the last one of an epoch.

        Returns:
            Whether any quantizer has come further by that.
        """
        unsettled = self.unsettled
        if not unsettled:
            return False
        self.steps += 1
        for quantizer in unsettled:
            quantizer.end_batch()
        late = self.steps - self.batch_num
        if late < 0 or not self._is_due(late, last, fresh=any(quantizer.fresh for quantizer in unsettled)):
            return False
        return self._agree(model)

    def _is_due(self, late: int, last: bool, fresh: bool) -> bool:
        """Tell whether the processes look for new ranges; all of them answer alike."""
        if last:
            return True
        return not late & (late - 1) if several_processes() else late == 0 or fresh

    def _agree(self, model: nn.Module) -> bool:
        before = self._progress()
        unreached = synchronize_calibration(model)
        if any(quantizer.has_range for quantizer in activation_quantizers(model).values()):  # else nothing is left
            for quantizer in unreached:
                if quantizer in self.quantizers and not quantizer.missed:
                    quantizer.give_up()
        if not self.unsettled:
            self.steps = 0
        return self._progress() != before

    def _progress(self) -> list[tuple[bool, bool]]:
        return [(quantizer.settled, quantizer.missed) for quantizer in self.quantizers]


def _row(quantizer: ActivationQuantizer) -> Tensor:
    one = torch.ones_like(quantizer.clip_max)
    zero = torch.zeros_like(one)
    if not quantizer.fresh:
        return torch.stack((zero, zero, zero, zero, one if quantizer.reached else zero))
    degenerate = zero if quantizer.degenerate is None else quantizer.degenerate
    return torch.stack((quantizer.clip_max, quantizer.clip_min, one, degenerate, one))


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        raise TypeError(
            f"A calibration batch must be a tensor, a tuple of positional or a mapping of keyword arguments, got a "
            f"{type(batch).__name__}. From a DataLoader of (x, y) batches pass (x for x, _ in loader)."
        )
