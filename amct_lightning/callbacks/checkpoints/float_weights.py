"""Beginning with the weights of a float model: any file with a state_dict, read without running code from it."""

from __future__ import annotations

import errno
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from amct_lightning.amct.migrate import is_amct_state_dict
from amct_lightning.callbacks.converting.saved_plan import checkpoint_to_load
from amct_lightning.checkpoint_file import CHECKPOINT_KEY, read_foreign_checkpoint
from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules.folding import is_sharded
from amct_lightning.wording import abbreviated, closest

_COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of a module."""
_PARALLEL = "module."
"""What ``DistributedDataParallel`` puts before the names of a module."""


def begin_in_float(
    path: str | Path | None, trainer: pl.Trainer, pl_module: pl.LightningModule, submodule: str | None
) -> None:
    """Load the float weights that a run begins with, unless it goes on with others.

    It does if the module is converted already, and if it resumes from a checkpoint, which has all weights (apart from
    what modules with ``strict_loading = False`` leave out of theirs).

    Args:
        path: The file, ``None`` for no such weights.
        trainer: The Trainer, in its setup phase.
        pl_module: The LightningModule.
        submodule: Dotted name of the part to convert, ``None`` for all of it.
    """
    if path is None or find_plan(pl_module) is not None:
        return
    checkpoint = checkpoint_to_load(trainer)
    if checkpoint is not None and pl_module.strict_loading:
        rank_zero_info(f"QuantRetrainCallback: '{path}' is not loaded, the weights come from '{checkpoint}'.")
        return
    load_float_weights(pl_module, path, submodule)


def load_float_weights(model: nn.Module, path: str | Path, submodule: str | None = None) -> None:
    """Load the weights of a float model. Nothing in the file is executed.

    The names in the file are those of ``model``, or of the part of it that has exactly these names; what
    ``torch.compile`` and DistributedDataParallel put before them does not count. A tensor that the file leaves out
    because it is tied to another one is taken from that.

    Args:
        model: The float module.
        path: A checkpoint of Lightning, a file of ``torch.save`` with a state_dict, or a ``.safetensors`` file.
        submodule: Dotted name of the part that the file may belong to if several parts have its names.

    Raises:
        OSError: If the file is missing (``FileNotFoundError``) or cannot be read.
        RuntimeError: If it holds no state_dict, or names or shapes do not fit.
        ValueError: If it is of a quantized model, or the weights of the module are sharded or not made yet.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/float.pt"
        >>> torch.save({"weight": torch.ones(1, 2)}, path)
        >>> model = nn.ModuleDict({"head": nn.Linear(2, 1, bias=False)})
        >>> load_float_weights(model, path)
        >>> model["head"].weight.data
        tensor([[1., 1.]])
    """
    _check_loadable(model, path)
    content = _read(path)
    _check_float(content, _state_dict(content, path), path)
    if isinstance(model, pl.LightningModule) and "pytorch-lightning_version" in content:
        model.on_load_checkpoint(content)  # may change it
    fit = _best_fit(model, _state_dict(content, path), path, submodule)
    is_strict = not isinstance(model, pl.LightningModule) or model.strict_loading
    if (fit.missing or fit.unexpected) and (is_strict or not fit.tensors):
        raise RuntimeError(_misfit(fit, model, path))
    part = model.get_submodule(fit.name)
    try:
        part.load_state_dict(fit.tensors, strict=is_strict)
    except RuntimeError as error:
        raise RuntimeError(
            f"'{path}' does not fit {fit.place(model)}: {error}\nGive the file of a model with the same shapes. If a "
            "layer is to be another one, such as a new head, let the module load the others itself."
        ) from error
    if fit.missing or fit.unexpected:
        rank_zero_warn(f"{_misfit(fit, model, path)} (strict_loading is False, so the rest was loaded.)")
    rank_zero_info(f"{fit.place(model)} begins with the float weights of '{path}'.")


@dataclass(frozen=True)
class _Fit:
    """How a state_dict fits a part of a model.

    Attributes:
        name: Dotted name of the part.
        tensors: What fits, by its name in the part.
        missing: What the part has and the file has not.
        unexpected: What the file has and the part has not.
    """

    name: str
    tensors: dict[str, Any]
    missing: list[str]
    unexpected: list[str]

    @classmethod
    def of(cls, name: str, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> _Fit:
        """Compare the names of a part, of whose ``own`` tensors it is, with those of a file."""
        names = {key.replace(_COMPILED, ""): key for key in own}
        given = {key.replace(_COMPILED, ""): value for key, value in state_dict.items()}
        if all(key.startswith(_PARALLEL) for key in given) and not any(key in names for key in given):
            given = {key.removeprefix(_PARALLEL): value for key, value in given.items()}
        tensors = {names[key]: value for key, value in given.items() if key in names}
        present = {_place(own[key]): value for key, value in tensors.items() if isinstance(own[key], Tensor)}
        tied = {key: present[_place(own[key])] for key in own if key not in tensors and _place(own[key]) in present}
        tensors |= tied
        return cls(
            name, tensors, [key for key in own if key not in tensors], [key for key in given if key not in names]
        )

    @property
    def is_exact(self) -> bool:
        """Whether the part has exactly the names of the file."""
        return not self.missing and not self.unexpected

    def place(self, model: nn.Module) -> str:
        """Name the part in a message."""
        return f"'{self.name}' of {type(model).__name__}" if self.name else type(model).__name__


def _place(tensor: Any) -> tuple[Any, ...]:
    """Return what tied tensors have in common."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _best_fit(model: nn.Module, state_dict: Mapping[str, Any], path: str | Path, submodule: str | None) -> _Fit:
    """Return the fit of the whole model if it is exact, then of ``submodule``, then of the only part that has one."""
    whole, *parts = _fits(model, state_dict)
    exact = [fit for fit in parts if fit.is_exact]
    preferred = [fit for fit in (whole,) if fit.is_exact] or [fit for fit in exact if fit.name == submodule] or exact
    if len(preferred) > 1:
        raise RuntimeError(
            f"'{path}' has the names of several parts of {type(model).__name__}: "
            f"{abbreviated(fit.name for fit in preferred)}. Save the state_dict of the whole module, or name the part "
            "with the argument `submodule`."
        )
    return preferred[0] if preferred else max(whole, *parts, key=lambda fit: len(fit.tensors))


def _fits(model: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[_Fit]:
    own = model.state_dict(keep_vars=True)
    for name, _ in model.named_modules():
        base = f"{name}." if name else ""
        yield _Fit.of(name, {k.removeprefix(base): v for k, v in own.items() if k.startswith(base)}, state_dict)


def _misfit(fit: _Fit, model: nn.Module, path: str | Path) -> str:
    similar = closest(fit.missing[0], fit.unexpected, 1) if fit.missing else ""
    hint = f"{similar[:-1]} in place of {fit.missing[0]!r}?" if similar else ""
    return (
        f"'{path}' does not fit {fit.place(model)}. Missing in the file: {abbreviated(fit.missing) or 'nothing'}; "
        f"unexpected in it: {abbreviated(fit.unexpected) or 'nothing'}.{hint} Give the file of a float model with the "
        "same layers, or set strict_loading = False in the LightningModule to load what fits."
    )


def _check_loadable(model: nn.Module, path: str | Path) -> None:
    if is_sharded(model) or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"The float weights '{path}' cannot be loaded into {type(model).__name__}, whose weights are sharded "
            "or not made yet (device meta) when it is converted. Load them in its __init__, or in configure_model "
            "before they are sharded, and leave float_checkpoint out."
        )


def _read(path: str | Path) -> dict[str, Any]:
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "The float checkpoint is a folder; give the one file with the state_dict in it", str(path)
        )
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, "No such float checkpoint; give the path of a local file", str(path))
    return _read_safetensors(file) if file.suffix == ".safetensors" else read_foreign_checkpoint(file)[0]


def _read_safetensors(file: Path) -> dict[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise ModuleNotFoundError(f"'{file}' needs the package safetensors: pip install safetensors")
    try:
        return dict(importlib.import_module("safetensors.torch").load_file(file))
    except importlib.import_module("safetensors").SafetensorError as error:
        raise RuntimeError(
            f"'{file}' cannot be read as safetensors ({error}): it is damaged or of another kind."
        ) from error


def _state_dict(content: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """Return the state_dict in a file: its entry of this name, the file itself, or the only entry that is one."""
    named = content.get("state_dict")
    if isinstance(named, Mapping):
        return named
    if _is_state_dict(content):
        return content
    entries = [key for key, value in content.items() if _is_state_dict(value)]
    if len(entries) != 1:
        raise RuntimeError(
            f"'{path}' holds {'several state_dicts' if entries else 'no state_dict'}: its entries are "
            f"{abbreviated(content) or 'none'}. Write one with torch.save(model.state_dict(), path)."
        )
    only: Mapping[str, Any] = content[entries[0]]
    return only


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(tensor, Tensor) for tensor in value.values())
        and all(isinstance(tensor, Tensor) or str(key).endswith("_extra_state") for key, tensor in value.items())
    )


def _check_float(content: Mapping[str, Any], state_dict: Mapping[str, Any], path: str | Path) -> None:
    if CHECKPOINT_KEY in content:
        remedy = (
            "fit(..., ckpt_path=...) goes on with it; load_qat_checkpoint(model, path) gives a module that a new run "
            "can begin with"
        )
    elif is_amct_state_dict(state_dict) or any("_quantizer." in str(key) for key in state_dict):
        remedy = "restore_quant_retrain_model(...) loads it"
    else:
        return
    raise ValueError(
        f"'{path}' is of a quantized model and no float checkpoint: {remedy}. As float_checkpoint give the file of the "
        "float training, or leave it out."
    )
