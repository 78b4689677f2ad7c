"""Keeps an eye on the modules of a LightningModule: what was added, and what belongs to a training step."""

from __future__ import annotations

from torch import nn

from amct_lightning.callbacks.converting.module_setup import LateLayers
from amct_lightning.modules.convert import quantizers_of
from amct_lightning.quantizers import Quantizer
from amct_lightning.quantizers.gate import TrainingGate


class ModuleWatch:
    """Tells all quantizers of a LightningModule which forwards are those of a training step, those of copies as guests.

    Args:
        pl_module: The LightningModule, in which copies of the model or of parts may stand.
        model: The converted module.
    """

    def __init__(self, pl_module: nn.Module, model: nn.Module) -> None:
        self._pl_module = pl_module
        self._model = model
        self._late_layers = LateLayers(model)
        self._gate = TrainingGate(pl_module)
        self.look()

    def look(self, hooks: str | None = None) -> None:
        """Take care of quantizers that came meanwhile, with a checkpoint or a copy; warn of float layers that did.

        Args:
            hooks: Where the user may have made such layers; ``None`` does not look for any.
        """
        for quantizer in quantizers_of(self._model):
            quantizer.is_copy = False  # the model itself may have been copied before
        for module in self._pl_module.modules():
            if isinstance(module, Quantizer):
                module.gate = self._gate
        if hooks is not None:
            self._late_layers.warn(hooks)

    def start_batch(self, batch: int) -> None:
        """Begin a training batch.

        Args:
            batch: Its number in the epoch.
        """
        if batch == 0:
            self.look("a hook of the training")
        self._gate.open()

    def end_batch(self) -> None:
        """End a training batch."""
        self._gate.close()

    def end(self) -> None:
        """Let the quantizers go by their own mode again."""
        self._gate.end()
