"""What has to happen to a LightningModule before its layers can be converted, and what must not happen after it."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.wording import abbreviated


def set_up_now(pl_module: pl.LightningModule, stage: str) -> None:
    """Call ``LightningModule.setup``, which may make layers and data, and let Lightning pass it by this once.

    Lightning calls the callbacks' ``setup`` first. Calling it from here gives callbacks that copy the model in their
    own ``setup``, as those that average weights do, a model that is complete and converted.

    Args:
        pl_module: The LightningModule.
        stage: The stage that Lightning sets up.
    """
    pl_module.__dict__.pop("setup", None)  # left by a setup that was broken off
    if not is_overridden("setup", pl_module):
        return
    pl_module.setup(stage)

    def pass_by(stage: str) -> None:
        pl_module.__dict__.pop("setup", None)

    pl_module.setup = pass_by  # type: ignore[method-assign]


class LateLayers:
    """Looks for layers that were made after the conversion, and so stay in float.

    Args:
        model: The module that was converted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = set(_layers(model))

    def warn(self, hooks: str) -> None:
        """Warn of such layers if they are trained; each is named once.

        Args:
            hooks: Where the user may have made them, for the message.
        """
        found = _layers(self._model)
        late = [name for layer, name in found.items() if layer not in self._known and _is_trained(layer.parameters())]
        self._known.update(found)
        if late:
            rank_zero_warn(
                f"In {type(self._model).__name__} {abbreviated(late)} came after the conversion and stays in float. "
                f"Make layers in __init__, setup or configure_model instead of {hooks} to have them quantized."
            )


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules() if type(module) in LAYER_TYPES}


def _is_trained(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)
