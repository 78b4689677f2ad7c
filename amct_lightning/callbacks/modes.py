"""Switching the quantized layers of a model between what training, evaluation and the sanity check ask of them."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from amct_lightning.conversion.convert import fold_norms
from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules import QATLayer, quantized_layers
from amct_lightning.modules.shift_hook import follow_batch_norm, shift_searches


def expect_float(model: nn.Module, expected: bool) -> None:
    """Say whether layers may run in float before their calibration without anybody being told."""
    for layer in quantized_layers(model).values():
        cast(QATLayer, layer).float_expected_of = id(layer) if expected else 0


def begin_evaluation(model: nn.Module, searches: bool) -> None:
    """Take note of BatchNorms that were replaced, and start the search of the shifts anew, or let it rest.

    Args:
        model: A converted model, or a wrapper around one.
        searches: Whether the coming evaluation searches the shifts.
    """
    found = find_plan(model)
    if found is not None:
        fold_norms(*found)
    if found is not None and found[1].search_n:
        root, plan = found
        for layer in plan.layers:
            if layer.batch_norm is not None:
                twin = cast(QATLayer, root.get_submodule(layer.name))
                follow_batch_norm(twin, root.get_submodule(layer.batch_norm))
    for search in shift_searches(model):
        search.enabled = searches
        if searches:
            search.reset()


def compile_anew(pl_module: nn.Module) -> None:
    """Let a compiled module be compiled as a whole again.

    A calibration runs outside of compiled graphs. What was compiled around it is cut at every layer, and would stay in
    use for the rest of the training, as it is right for that, too.

    Args:
        pl_module: The LightningModule.
    """
    # Private in Lightning (2.5, 2.6) and torch: where they note that a module was compiled. The check spares others
    # the import of the compiler, and its caches.
    own = (getattr(module, "_compiled_call_impl", None) for module in pl_module.modules())
    if getattr(pl_module, "_compiler_ctx", None) is not None or any(call is not None for call in own):
        torch.compiler.reset()
