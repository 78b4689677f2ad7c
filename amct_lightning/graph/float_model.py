"""What a model must be before its layers can be looked at and replaced: a plain float module, unwrapped."""

from __future__ import annotations

import torch
from torch import nn

from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.modules.layers import QATLayer
from amct_lightning.wording import cut_off


def check_float_model(model: nn.Module) -> None:
    """Refuse what is not a module, and a model whose layers cannot be replaced.

    Args:
        model: The model to be quantized.

    Raises:
        TypeError: If it is not a :class:`torch.nn.Module`.
        RuntimeError: If it contains QAT layers, compiled or scripted layers, or is wrapped for several devices.

    Example:
        >>> check_float_model(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
        Traceback (most recent call last):
        ...
        RuntimeError: The model is a TorchScript module, whose layers are fixed and cannot be quantized. Give the \
Python module it was made from, and script the model after training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
    quantized = [name for name, module in model.named_modules() if isinstance(module, QATLayer)]
    if quantized:
        raise RuntimeError(
            f"The model cannot be quantized because {len(quantized)} of its layers are quantized already "
            f"({cut_off(quantized)}). Give the float model, or go on with the one you have."
        )
    for name, module in model.named_modules():
        obstacle = _obstacle(module)
        if obstacle and any(_is_layer(inner) for inner in module.modules()):
            raise RuntimeError(f"{f'Module {name!r}' if name else 'The model'} {obstacle}")


def _obstacle(module: nn.Module) -> str | None:
    """Say why the layers inside a module cannot be replaced, and what to do; ``None`` if they can."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "is a TorchScript module, whose layers are fixed and cannot be quantized. Give the Python module it was "
            "made from, and script the model after training."
        )
    if "_orig_mod" in module._modules:
        return (
            "was compiled with torch.compile before its layers were replaced. Give the module that was compiled (its "
            "attribute _orig_mod), and compile the converted model; with a Trainer, in on_fit_start."
        )
    if module._compiled_call_impl is not None:
        return (
            f"was compiled in place ({kind}.compile()) before its layers were replaced. Call compile() on the "
            "converted model instead; with a Trainer, in on_fit_start."
        )
    if isinstance(module, nn.parallel.DistributedDataParallel) or kind == "FullyShardedDataParallel":
        return (
            f"is wrapped in {kind} already, which would not synchronize the parameters that quantization adds. "
            "Convert the module inside (its attribute module), and wrap the converted model."
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return (
            "is wrapped in DataParallel, whose copies of the model forget their calibration after each step. Convert "
            "the module inside (its attribute module), and train it with DistributedDataParallel."
        )
    return None


def _is_layer(module: nn.Module) -> bool:
    original = getattr(module, "original_name", None)  # how TorchScript calls the class
    return isinstance(module, tuple(LAYER_TYPES)) or original in {kind.__name__ for kind in LAYER_TYPES}
