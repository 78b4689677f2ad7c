"""What a LightningModule in float says when it is given the state of a quantized one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from amct_lightning.conversion.plan import find_plan


def name_the_way_to_load() -> None:
    """Let the error of a LightningModule in float that gets a quantized state name ``load_qat_checkpoint``.

    ``load_from_checkpoint``, a Trainer without the callback and ``load_state_dict`` end in torch's list of unexpected
    keys, and no object of this package takes part. That is why a method is put into the base class; it changes the text
    of this one error and nothing else.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> state = BoringModel().state_dict()
        >>> state["layer.input_quantizer.clip_max"] = state["layer.bias"][0]
        >>> try:
        ...     BoringModel().load_state_dict(state)
        ... except RuntimeError as error:
        ...     print(str(error).splitlines()[-1])
        load_qat_checkpoint(BoringModel, path), or give the Trainer a QuantRetrainCallback.
    """
    pl.LightningModule.load_state_dict = _load_state_dict  # type: ignore[assignment, method-assign]


def _load_state_dict(self: pl.LightningModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load as torch does; explain the state of a quantized module to one in float."""
    try:
        return super(pl.LightningModule, self).load_state_dict(state_dict, *args, **kwargs)
    except RuntimeError as error:
        unexpected = state_dict.keys() - self.state_dict().keys()
        quantized = any(part in name for name in unexpected for part in ("input_quantizer.", "weight_quantizer."))
        if find_plan(self) is not None or not quantized:
            raise
        name = type(self).__name__
        raise RuntimeError(
            f"{error}\nThis is the state of a quantized module, and {name} is in float. Load the checkpoint with\n"
            f"load_qat_checkpoint({name}, path), or give the Trainer a QuantRetrainCallback."
        ) from error
