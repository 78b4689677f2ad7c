"""Loading a Lightning checkpoint of a quantized model without a Trainer, a configuration or input data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from amct_lightning.amct.restore import load_strictly
from amct_lightning.callbacks.checkpoints.placement import Saved, place
from amct_lightning.callbacks.checkpoints.records import record_path
from amct_lightning.callbacks.checkpoints.state import (
    adopt_other_parts,
    adopt_plan,
    restore_observed,
    warn_of_float_phase,
)
from amct_lightning.checkpoint_file import CHECKPOINT_KEY, is_foreign, read_foreign_checkpoint
from amct_lightning.conversion.copies import convert_averages
from amct_lightning.conversion.plan import QuantPlan
from amct_lightning.conversion.plan_check import check_entry
from amct_lightning.wording import abbreviated

Module = TypeVar("Module", bound=nn.Module)


def load_qat_checkpoint(
    model_or_class: type[Module] | Module, ckpt_path: str | Path, *, map_location: Any = "cpu", **init_kwargs: Any
) -> Module:
    """Load a checkpoint that a Trainer with :class:`QuantRetrainCallback` wrote.

    The checkpoint tells how the layers were quantized, so the quantized module is rebuilt as it was and its weights
    and quantizers are loaded strictly. Nothing in the file is executed. A calibration in progress goes on.

    Args:
        model_or_class: A LightningModule class, which is instantiated from the hyper parameters in the checkpoint
            as ``load_from_checkpoint`` does; or a float LightningModule, or a float module that was part of the
            LightningModule (the names in the checkpoint then begin with where it was). An instance is converted in
            place.
        ckpt_path: The checkpoint, a local file.
        map_location: Where the tensors of the checkpoint go, as for ``torch.load``. A class gives a module there, an
            instance stays where it is.
        init_kwargs: Arguments for the class that replace hyper parameters or are missing among them.

    Returns:
        The quantized module. Its training mode is that of the instance, and as ``load_from_checkpoint`` leaves it
        for a class: training. Call ``eval()`` before using it.

    Raises:
        OSError: If the file is missing (``FileNotFoundError``) or cannot be read.
        TypeError: If ``model_or_class`` is neither, or the class cannot be called with the hyper parameters.
        ValueError: If the checkpoint was not written with the callback, is of another architecture, or needs code
            from the file to make the hyper parameters.
        RuntimeError: If the file is not a checkpoint, or names or shapes of tensors do not fit.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> from amct_lightning import QuantRetrainCallback
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> folder = tempfile.mkdtemp()
        >>> trainer = Trainer(
        ...     callbacks=[QuantRetrainCallback()], max_steps=2, accelerator="cpu", logger=False,
        ...     default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> trainer.save_checkpoint(folder + "/last.ckpt")
        >>> load_qat_checkpoint(BoringModel, folder + "/last.ckpt").layer.input_quantizer
        ActivationQuantizer(num_bits=8, fixed_min=False, calibrated)
    """
    if Path(ckpt_path).is_dir():
        raise IsADirectoryError(
            f"'{ckpt_path}' is a folder, a sharded checkpoint. Make one file of it first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {ckpt_path} (it runs code that a "
            "stranger may have put into the folder: only do so if you trust it)."
        )
    checkpoint, foreign = read_foreign_checkpoint(ckpt_path, map_location)
    saved = _saved(checkpoint, ckpt_path)
    if isinstance(model_or_class, type):
        module_class = _checked_class(model_or_class, checkpoint, foreign, ckpt_path)
        named = _named_classes(checkpoint, init_kwargs)
        if named:
            raise ValueError(
                f"{module_class.__name__} cannot be made from '{ckpt_path}' without importing what the file names: its "
                f"hyper parameters hold {abbreviated(named)}. If you trust the file, make the module yourself and pass "
                f"the instance, load_qat_checkpoint({module_class.__name__}(...), '{ckpt_path}'), or give these "
                "arguments as keywords."
            )
        model = cast(
            Module, _instantiate(module_class, ckpt_path, map_location, init_kwargs, _is_made_by_cli(checkpoint))
        )
    else:
        model = _configured(model_or_class, init_kwargs)
    if isinstance(model, pl.LightningModule):
        model.on_load_checkpoint(checkpoint)  # may change it; Lightning has shown the class only its own copy
        saved = _saved(checkpoint, ckpt_path)
    saved, root = place(saved, model)
    adopt_plan(root, saved.entry, saved.path)
    if isinstance(model, pl.LightningModule):
        adopt_other_parts(model, saved.entry, saved.path)
    convert_averages(model, root, QuantPlan.from_dict(saved.entry["plan"], saved.path))
    load_strictly(model, _known_modules(model, _complete(model, saved.state_dict), saved.path), saved.path)
    restore_observed(root, saved.entry)
    warn_of_float_phase(saved.entry, saved.path)
    _warn_of_other_record(saved)
    return model


def _warn_of_other_record(saved: Saved) -> None:
    """Tell of a record beside the checkpoint that is that of another state: a kill between two files leaves one."""
    text = saved.entry.get("record")
    path = record_path(saved.path)
    if isinstance(path, Path) and isinstance(text, str) and path.is_file() and path.read_bytes() != text.encode():
        warnings.warn(
            f"'{path}' is not the record of '{saved.path}' that lies beside it: a kill or a full disk may have left "
            "that of an earlier state. Get the right one with: amct-lightning record extract "
            f"{saved.path} -o {path} --force",
            stacklevel=3,
        )


def _saved(checkpoint: dict[str, Any], path: str | Path) -> Saved:
    entry, state_dict = checkpoint.get(CHECKPOINT_KEY), checkpoint.get("state_dict")
    if not isinstance(entry, dict) or "plan" not in entry or not isinstance(state_dict, Mapping):
        raise ValueError(
            f"'{path}' was not written in training with QuantRetrainCallback: it has no entry '{CHECKPOINT_KEY}' with "
            f"a quantization plan beside a 'state_dict', but {abbreviated(checkpoint) or 'nothing'}. Load a float "
            "checkpoint with load_from_checkpoint, a file of create_quant_retrain_model's or AMCT's model with "
            "restore_quant_retrain_model."
        )
    check_entry(entry, str(path))
    return Saved(state_dict, entry, str(path))


def _checked_class(
    cls: type, checkpoint: dict[str, Any], foreign: list[str], path: str | Path
) -> type[pl.LightningModule]:
    if not issubclass(cls, pl.LightningModule):
        raise TypeError(
            f"{cls.__name__} is not a LightningModule class, so the checkpoint does not tell how to make one. Make it "
            f"yourself and pass the instance: load_qat_checkpoint({cls.__name__}(...), '{path}')."
        )
    if foreign:
        parameters = checkpoint.get(pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY)
        named = parameters.items() if isinstance(parameters, Mapping) else ()
        holders = [name for name, value in named if any(map(is_foreign, tree_leaves(value)))]
        where = f"the hyper parameters {abbreviated(holders)} hold" if holders else "it holds"
        raise ValueError(
            f"{cls.__name__} cannot be made from '{path}' without running code from the file: {where} objects of "
            f"{abbreviated(foreign)}. Make the module yourself and pass the instance: "
            f"load_qat_checkpoint({cls.__name__}(...), '{path}')."
        )
    return cls


def _is_made_by_cli(checkpoint: dict[str, Any]) -> bool:
    parameters = checkpoint.get(pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY)
    return isinstance(parameters, Mapping) and "_instantiator" in parameters


def _named_classes(checkpoint: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the classes that LightningCLI would import and make for arguments that are not given."""
    if not _is_made_by_cli(checkpoint):
        return []
    parameters = checkpoint[pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY]
    found: list[str] = []
    waiting = [value for name, value in parameters.items() if name not in given]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            found += [str(value["class_path"])] if "class_path" in value else []
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
    return found


def _instantiate(
    cls: type[pl.LightningModule],
    path: str | Path,
    map_location: Any,
    init_kwargs: dict[str, Any],
    is_made_by_cli: bool,
) -> pl.LightningModule:
    with warnings.catch_warnings():
        # The quantizers in the checkpoint have no place in the float module yet; the strict check comes later.
        warnings.filterwarnings("ignore", "Found keys that are")
        try:
            # Without what the file names as a function to make the module with, which Lightning would import.
            own: dict[str, Any] = {"_instantiator": None} if is_made_by_cli else {}
            return cls.load_from_checkpoint(path, map_location=map_location, strict=False, **init_kwargs, **own)
        except TypeError as error:
            raise TypeError(
                f"{cls.__name__} cannot be made from the hyper parameters in '{path}': {error}. Give missing arguments "
                "as keywords of load_qat_checkpoint, or pass an instance."
            ) from error
        except RuntimeError as error:
            raise RuntimeError(f"'{path}' does not fit {cls.__name__}: {error}") from error


def _configured(model: Module, init_kwargs: dict[str, Any]) -> Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_qat_checkpoint needs a LightningModule class or a module, got {type(model).__name__}.")
    if init_kwargs:
        raise TypeError(
            f"load_qat_checkpoint got an instance of {type(model).__name__} and arguments for its class "
            f"({abbreviated(init_kwargs)}). Give the arguments when you make the instance."
        )
    if isinstance(model, pl.LightningModule) and is_overridden("configure_model", model):
        model.configure_model()  # idempotent by Lightning's contract; the layers must exist now
    return model


def _known_modules(model: nn.Module, state_dict: Mapping[str, Tensor], path: str) -> Mapping[str, Tensor]:
    """Leave out the tensors of whole modules that ``model`` does not have, as those that ``setup`` makes; warn then."""
    children = {name for name, _ in model.named_children()} | set(dict(model.named_parameters(recurse=False)))
    own = children | set(dict(model.named_buffers(recurse=False)))
    foreign = list(
        dict.fromkeys(key.split(".")[0] for key in state_dict if "." in key and key.split(".")[0] not in own)
    )
    if model.state_dict().keys() - state_dict.keys():
        return state_dict  # it is of another architecture
    if foreign:
        warnings.warn(
            f"'{path}' also holds {abbreviated(foreign)}, which {type(model).__name__} lacks and which is left "
            "out. Modules that are made in setup() exist in a Trainer only; to load them, make them in __init__.",
            stacklevel=3,
        )
    return {key: value for key, value in state_dict.items() if key.split(".")[0] not in foreign}


def _complete(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Honour Lightning's ``strict_loading = False``: such a module's checkpoints leave out what it has already."""
    if not isinstance(model, pl.LightningModule) or model.strict_loading:
        return state_dict
    own = model.state_dict()
    return {key: state_dict.get(key, own[key]) for key in own if key in state_dict or "_quantizer." not in key}
