"""The state of a sharded model and its optimizers: gathered on rank 0, or in the shards of a checkpoint folder.

Imported when a checkpoint is written or read: ``torch.distributed.checkpoint`` takes its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from amct_lightning.ascend.fsdp.reading import SafePlanner, SafeReader
from amct_lightning.ascend.fsdp.units import keeps_whole, reshard
from amct_lightning.wording import cut_off

_MODEL = "model"


def gathered_optimizer_state(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """Return the state of an optimizer as one that is not sharded would give it; a collective.

    Args:
        optimizer: The optimizer.
        keep: Whether this rank wants it; the others get an empty one.

    Returns:
        The ``state_dict``, its tensors whole and on the CPU.
    """
    state = optimizer.state_dict()
    whole: dict[Any, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            everything = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                is_tensor = isinstance(everything, Tensor)
                whole.setdefault(number, {})[name] = everything.cpu() if is_tensor else everything
    return {**state, "state": whole} if keep else {}


def named_optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the state of an optimizer with names in place of its numbers, the tensors as they are.

    Args:
        optimizer: The optimizer.
        model: The model that has the parameters.

    Raises:
        ValueError: If it trains a parameter that the model does not have.
    """
    names, state = _names(optimizer, model), optimizer.state_dict()
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def save_shards(model_state: Any, optimizer_states: Sequence[Any], folder: Path) -> None:
    """Write the shards of all ranks into a folder; a collective.

    Args:
        model_state: The model's ``state_dict``.
        optimizer_states: What :func:`named_optimizer_state` gave.
        folder: An empty folder.
    """
    optimizers = {f"optimizer_{number}": state for number, state in enumerate(optimizer_states)}
    save({_MODEL: model_state, **optimizers}, checkpoint_id=folder)


def load_shards(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], strict: bool) -> None:
    """Read a folder into a model and its optimizers, whatever number of ranks has written it; a collective.

    Args:
        folder: The folder.
        model: The sharded model.
        optimizers: The optimizers of the training, none for an evaluation.
        strict: Whether the names must agree.

    Raises:
        RuntimeError: If they do not.
    """
    reshard(model)
    stored = SafeReader(folder).read_metadata().state_dict_metadata
    wanted = get_model_state_dict(model)
    # Lightning's FSDPStrategy and its consolidate_checkpoint call it one way, its ModelParallelStrategy the other.
    top = _MODEL if any(key.startswith(f"{_MODEL}.") for key in stored) else "state_dict"
    keys = {key.removeprefix(f"{top}.") for key in stored if key.startswith(f"{top}.")}
    _check_names(model, wanted, keys, strict, folder)
    state: dict[str, Any] = {top: {name: value for name, value in wanted.items() if name in keys}}
    for number, optimizer in enumerate(optimizers):
        _check_groups(f"optimizer_{number}", optimizer, stored, folder)
        state[f"optimizer_{number}"] = _template(f"optimizer_{number}", optimizer, model, stored)
    load(state, storage_reader=SafeReader(folder), planner=SafePlanner())
    model.load_state_dict(state[top], strict=False)  # what is missing was looked at
    for number, optimizer in enumerate(optimizers):
        _load_named(optimizer, model, state[f"optimizer_{number}"])


def load_whole(
    checkpoint: Mapping[str, Any], path: Path, model: nn.Module, optimizers: Sequence[Optimizer], strict: bool
) -> None:
    """Bring a checkpoint that every rank has read into a model and its optimizers.

    Args:
        checkpoint: The checkpoint, with or without optimizers.
        path: Its path, for messages.
        model: The sharded model.
        optimizers: The optimizers of the training, none for an evaluation.
        strict: Whether the names must agree.

    Raises:
        KeyError: If the states of the optimizers are missing.
        RuntimeError: If names do not agree.
    """
    reshard(model)
    state = checkpoint["state_dict"]
    _check_names(model, get_model_state_dict(model), set(state), strict, path)
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))
    if not optimizers:
        return
    if "optimizer_states" not in checkpoint:
        raise KeyError(
            f"'{path}' holds no state of an optimizer (save_weights_only=True), so a training cannot go on from it. "
            f"Load its weights into the LightningModule and fit without ckpt_path."
        )
    for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        if any(isinstance(key, str) for key in saved["state"]):  # of a folder that was made one file
            _load_named(optimizer, model, saved)
        else:
            _load(optimizer, saved)


def _load_named(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    numbers = {name: number for number, name in _names(optimizer, model).items()}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in saved["param_groups"]]
    _load(
        optimizer, {"state": {numbers[name]: value for name, value in saved["state"].items()}, "param_groups": groups}
    )


def _load(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state by position, as an optimizer does, and shard what is whole in it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    state = {
        number: {name: _like(value, by_number[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _like(value: Any, parameter: Any) -> Any:
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not is_whole or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    device = parameter.to_local().device
    # every rank has the whole tensor and takes its part: nothing is sent
    return distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _names(optimizer: Optimizer, model: nn.Module) -> dict[int, str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strange = sum(id(parameter) not in known for parameter in parameters)
    if strange:
        raise ValueError(
            f"{type(optimizer).__name__} trains {strange} of {len(parameters)} parameters that are not in the "
            f"LightningModule, so a sharded checkpoint has no name for them. Make them part of the module, or write "
            f"full checkpoints: AscendFSDPStrategy(save_distributed_checkpoint=False)."
        )
    return {number: known[id(parameter)] for number, parameter in enumerate(parameters)}


def _template(key: str, optimizer: Optimizer, model: nn.Module, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Make room for the state of an optimizer: for what is stored, no more and no less."""
    names = {name: number for number, name in _names(optimizer, model).items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[str, dict[str, Any]] = {}
    for path, entry in stored.items():
        owner, _, name = path.removeprefix(f"{key}.state.").rpartition(".")
        if path.startswith(f"{key}.state.") and owner in names:
            state.setdefault(owner, {})[name] = _room(entry, parameters[names[owner]])
    groups = named_optimizer_state(optimizer, model)["param_groups"]
    return {"state": state, "param_groups": groups}


def _room(entry: Any, parameter: Any) -> Any:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if isinstance(parameter, DTensor) and entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=entry.properties.dtype)
    return torch.zeros(entry.size, dtype=entry.properties.dtype)


def _check_groups(key: str, optimizer: Optimizer, stored: Iterable[str], folder: Path) -> None:
    prefix = f"{key}.param_groups."
    found = {path.removeprefix(prefix).split(".")[0] for path in stored if path.startswith(prefix)}
    if len(found) != len(optimizer.param_groups):
        raise RuntimeError(
            f"'{folder}' has {len(found) or 'no'} parameter groups for {type(optimizer).__name__} ({key}), which has "
            f"{len(optimizer.param_groups)} here. Go on with the optimizer, and the settings of QuantRetrainCallback, "
            f"that the checkpoint was written with; or load its weights only and fit without ckpt_path."
        )


def _check_names(model: nn.Module, own: Mapping[str, Any], stored: set[str], strict: bool, path: Path) -> None:
    """Refuse other names, apart from modules that may be absent as a whole: a float checkpoint has no quantizers."""
    lenient = [f"{name}." for name, module in model.named_modules() if keeps_whole(module)]
    optional = {prefix for prefix in lenient if not any(name.startswith(prefix) for name in stored)}
    missing = [n for n in own if n not in stored and not n.startswith(tuple(optional))]
    unexpected = [name for name in stored if name not in own]
    if strict and (missing or unexpected):
        parts = [
            f"{word} {cut_off(names)}"
            for word, names in (("it lacks", missing), ("the model has no", sorted(unexpected)))
            if names
        ]
        raise RuntimeError(
            f"'{path}' does not fit {type(model).__name__}: {'; '.join(parts)}. Use the module and the quantization "
            f"that it was trained with."
        )
