"""AMCT's function that ends its scripts, which this package does not have yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn


def save_quant_retrain_model(
    config_file: str,
    model: nn.Module,
    record_file: str,
    save_path: str,
    input_data: Tensor | tuple[Any, ...],
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Say that there is no ONNX export yet, and what to do instead.

    It has AMCT's signature, so that a script for AMCT gets here and ends with a remedy. Nothing is written.

    Args:
        config_file: The configuration file.
        model: The converted model.
        record_file: Its record file.
        save_path: Where AMCT would put the ONNX files.
        input_data: Input for which the model works.
        input_names: See AMCT.
        output_names: See AMCT.
        dynamic_axes: See AMCT.

    Raises:
        NotImplementedError: Always.

    Example:
        >>> import torch
        >>> save_quant_retrain_model("config.json", nn.Linear(2, 2), "record.txt", "out/net", torch.ones(1, 2))
        Traceback (most recent call last):
        ...
        NotImplementedError: save_quant_retrain_model: amct_lightning has no ONNX export yet, so nothing was written ...
    """
    raise NotImplementedError(
        f"save_quant_retrain_model: amct_lightning has no ONNX export yet, so nothing was written to '{save_path}'. "
        f"Leave the call out. The factors are in '{record_file}', which an evaluation pass of the model writes: "
        "model.eval(); model(input). Save the trained state for AMCT, whose own save_quant_retrain_model can export "
        "it: torch.save(convert_amct_state_dict(model.state_dict(), model, to_amct=True), 'for_amct.pth')."
    )
