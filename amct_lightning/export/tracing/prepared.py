"""What is exported of a model: a copy in eval mode, on the CPU and in float32, and the numbers of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from amct_lightning.amct.data_parallel import unwrap
from amct_lightning.conversion.plan import LayerPlan, QuantPlan, find_plan
from amct_lightning.export.numbers import LayerNumbers, layer_numbers
from amct_lightning.export.tracing.placeholder import LayerCall
from amct_lightning.graph.forward import copy_to_run
from amct_lightning.graph.preserve import preserved
from amct_lightning.modules.deployed import DEVICE_BITS
from amct_lightning.modules.layers import QATLayer
from amct_lightning.record import QuantRecord


@dataclass(frozen=True)
class Prepared:
    """A model that can be exported.

    Attributes:
        model: What is called: the copy of the model that the user gave.
        root: The converted module in it.
        plan: The plan by which it was converted.
        record: The factors of its layers.
    """

    model: nn.Module
    root: nn.Module
    plan: QuantPlan
    record: QuantRecord

    @property
    def layers(self) -> dict[str, QATLayer]:
        """The quantized layers by name, in the order of their first execution."""
        return {layer.name: cast(QATLayer, self.root.get_submodule(layer.name)) for layer in self.plan.layers}

    @property
    def dequant_bits(self) -> int:
        """How many bits of the dequantization scales the files hold."""
        return DEVICE_BITS if self.plan.config.fakequant_precision_mode == "FORCE_FP16_QUANT" else 32

    def numbers(self, call: LayerCall) -> LayerNumbers:
        """Return the numbers of a layer.

        Args:
            call: A call of it.
        """
        plan = next(layer for layer in self.plan.layers if layer.name == call.name)
        batch_norm = self._batch_norm(plan)
        return layer_numbers(call.name, call.layer, self.record[call.name], batch_norm, self.dequant_bits)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Bring the model into the state in which it is traced: in eval mode, without the BatchNorms that fold."""
        folded = [norm for norm in map(self._batch_norm, self.plan.layers) if norm is not None]
        with preserved(self.model), torch.no_grad():
            for norm in folded:
                norm.forward = lambda x: x
            try:
                yield
            finally:
                for norm in folded:
                    del norm.forward

    def _batch_norm(self, plan: LayerPlan) -> nn.Module | None:
        return None if plan.batch_norm is None else self.root.get_submodule(plan.batch_norm)


def prepare(model: nn.Module, record: QuantRecord | None = None) -> Prepared:
    """Make a copy of a converted model for the export.

    Parameters are shared with the model if they are on the CPU in float32 already, so that it takes little memory.

    Args:
        model: A calibrated model that :func:`~amct_lightning.export.checks.check_model` has let pass.
        record: The factors to export; ``None`` for those that the model has now.
    """
    model = uncompiled(unwrap(model))
    factors = record if record is not None else QuantRecord.from_model(model)
    plain = _is_plain(model)
    copied = copy_to_run(model, share_parameters=plain)
    if copied is None:
        copied = model  # nothing of it changes but for the time of the export
    elif not plain:
        copied = copied.cpu().float()
    found = find_plan(copied)
    if found is None:  # pragma: no cover: the copy has what the model has
        raise RuntimeError("The copy of a converted model has no plan.")
    root, plan = found
    return Prepared(copied, root, trained_part(root, plan), factors)


def trained_part(root: nn.Module, plan: QuantPlan) -> QuantPlan:
    """Return a plan without the layers that no training batch has reached, which run in float.

    Args:
        root: The converted module.
        plan: Its plan.
    """
    return plan.only([layer for layer in plan.layers if not cast(QATLayer, root.get_submodule(layer.name)).is_missed])


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was given, or the model itself."""
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def _is_plain(model: nn.Module) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return all(t.device.type == "cpu" and not (t.is_floating_point() and t.dtype != torch.float32) for t in tensors)
