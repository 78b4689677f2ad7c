"""A network that computes as the server of a checkpoint does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning.export.libraries import need
from amct_lightning.serving.read import Checkpoint, read_checkpoint
from amct_lightning.serving.server import SERVER_LAYERS, ServerLinear
from amct_lightning.serving.source import CONFIG
from amct_lightning.wording import closest, cut_off


def loaded(folder: str | Path, model: nn.Module | None) -> nn.Module:
    """Return the network of a checkpoint, see :func:`amct_lightning.load_serving`."""
    checkpoint = read_checkpoint(folder)
    dtype = checkpoint.dtype()
    network = _from_config(checkpoint.folder) if model is None else copy.deepcopy(model)
    for module in network.eval().requires_grad_(False).modules():
        put_into(module, dtype, checkpoint.rounds_buffers)
    taken: set[str] = set()
    for name, kind, tensors in checkpoint.layers():
        _put(network, name, SERVER_LAYERS[kind](tensors, dtype), checkpoint)
        taken |= {f"{name}.{part}" for part in tensors}
    _load_floats(network, {n: t for n, t in checkpoint.tensors.items() if n not in taken}, checkpoint)
    return network


def put_into(module: nn.Module, dtype: torch.dtype, buffers: bool) -> None:
    """Put what floats in a module itself, without its children, into a dtype.

    Args:
        module: The module.
        dtype: The dtype.
        buffers: Whether to do so with what its checkpoints do not keep, such as the frequencies of rotary embeddings.
            transformers leaves these in float32 when it loads a model in another dtype, ``module.to(dtype)`` does not.
    """
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)  # the same object, which may be tied
    for name, buffer in module._buffers.items():
        kept = name not in module._non_persistent_buffers_set
        if buffer is not None and buffer.is_floating_point() and (kept or buffers):
            module._buffers[name] = buffer.to(dtype)


def _from_config(folder: Path) -> nn.Module:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"'{folder}' has no {CONFIG}, from which transformers could make the network. Give the float network: "
            "load_serving(folder, model)."
        )
    need("transformers", extra="serving")
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415  (an optional library)

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    make: Any = AutoModelForCausalLM.from_config
    network: nn.Module = make(config, trust_remote_code=False)
    return network


def _put(network: nn.Module, name: str, layer: ServerLinear, checkpoint: Checkpoint) -> None:
    modules = dict(network.named_modules())
    found = modules.get(name)
    if not isinstance(found, nn.Linear):
        what = "has no such layer" if found is None else f"has a {type(found).__name__} there"
        raise ValueError(
            f"'{checkpoint.folder}' has a quantized layer '{name}', but {type(network).__name__} {what}."
            f"{closest(name, list(modules))} Give the float network that was converted."
        )
    ours, theirs = tuple(found.weight.shape), (layer.out_features, layer.in_features)
    if ours != theirs:
        raise ValueError(
            f"'{checkpoint.folder}': the weight of layer '{name}' has the shape {theirs}, in {type(network).__name__} "
            f"it is {ours}. Give the float network that was converted."
        )
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)


def _load_floats(network: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    ours = {
        name: tensor
        for module_name, module in network.named_modules()
        if type(module) not in SERVER_LAYERS.values()
        for name, tensor in _named(module_name, module)
    }
    tied = {id(ours[name]) for name in tensors if name in ours}
    missing = [repr(name) for name, tensor in ours.items() if name not in tensors and id(tensor) not in tied]
    extra = [repr(name) for name in tensors if name not in ours]
    if missing or extra:
        what = f"lacks {cut_off(missing)}, which the network has" if missing else ""
        also = f"has {cut_off(extra)}, which the network lacks" if extra else ""
        raise ValueError(
            f"'{checkpoint.folder}' {' and '.join(filter(None, (what, also)))}. Give the float network that was "
            "converted."
        )
    for name, tensor in tensors.items():
        if tensor.shape != ours[name].shape:
            raise ValueError(
                f"'{checkpoint.folder}': tensor '{name}' has the shape {tuple(tensor.shape)}, in the network it is "
                f"{tuple(ours[name].shape)}. Give the float network that was converted."
            )
        with torch.no_grad():
            ours[name].copy_(tensor)


def _named(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    own = {**module._parameters, **kept}
    return [(f"{prefix}.{name}" if prefix else name, tensor) for name, tensor in own.items() if tensor is not None]
