"""Reading a saved state into a converted model: safely, strictly, in AMCT's naming or in that of this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from amct_lightning.amct.migrate import convert_amct_state_dict, is_amct_state_dict, strip_module_prefix
from amct_lightning.wording import abbreviated


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a file that ``torch.save`` wrote; nothing in it is executed.

    Args:
        path: The file.
        map_location: Where its tensors go, as for ``torch.load``.

    Returns:
        Its content.

    Raises:
        OSError: If the file is missing (``FileNotFoundError``) or cannot be read.
        RuntimeError: If it is not a checkpoint, damaged, or holds objects that need code to be loaded.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.pth"
        >>> torch.save({"weight": torch.ones(1)}, path)
        >>> read_checkpoint(path)
        {'weight': tensor([1.])}
    """
    with Path(path).expanduser().open("rb") as file:
        content = _load(file, path, map_location)
    if not isinstance(content, dict):
        raise RuntimeError(
            f"'{path}' holds something of type {type(content).__name__} instead of a state_dict. Write it with "
            "torch.save(model.state_dict(), path)."
        )
    return content


def select_state_dict(content: Mapping[str, Any], name: str | None, path: str | Path) -> Mapping[str, Any]:
    """Return the state_dict in the content of a file.

    Args:
        content: The content.
        name: The entry that holds the state_dict, ``None`` if the content is the state_dict itself.
        path: The file, for messages.

    Returns:
        The state_dict.

    Raises:
        KeyError: If there is no such entry, or it is empty.
        RuntimeError: If the entry is something else than a state_dict.

    Example:
        >>> select_state_dict({"model": {"weight": 1}, "epoch": 3}, "model", "last.pth")
        {'weight': 1}
    """
    if name is None and "pytorch-lightning_version" in content:
        raise RuntimeError(
            f"The pth_file '{path}' is a Lightning checkpoint. Load it with load_qat_checkpoint(model_or_class, path)."
        )
    if name is None:
        return content
    if name not in content:
        raise KeyError(
            f"The pth_file '{path}' has no key name: {name}. It has {abbreviated(content) or 'nothing'}; give one of "
            "them as state_dict_name, or none if the file is itself the state_dict."
        )
    state_dict = content[name]
    if not isinstance(state_dict, Mapping):
        raise RuntimeError(
            f"The entry '{name}' of '{path}' is of type {type(state_dict).__name__} and no state_dict. The file has "
            f"{abbreviated(content)}; give the one with the weights as state_dict_name."
        )
    if not state_dict:
        raise KeyError(f"The entry '{name}' of '{path}' is empty. The file has {abbreviated(content)}.")
    return state_dict


def restore_state(model: nn.Module, state_dict: Mapping[str, Any], path: str | Path) -> None:
    """Load a saved state into a converted model, calibration included.

    Args:
        model: The converted model.
        state_dict: Its state, in AMCT's naming or in that of this package; all names may begin with ``module.``.
        path: The file it comes from, for messages.

    Raises:
        RuntimeError: If names are missing or unexpected, or shapes do not fit.
    """
    if is_amct_state_dict(state_dict):
        try:
            state_dict = convert_amct_state_dict(state_dict, model)
        except ValueError as error:
            raise RuntimeError(f"'{path}' does not fit {type(model).__name__}: {error}") from error
    load_strictly(model, strip_module_prefix(state_dict, model), path)


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a state_dict that must have exactly the names and shapes of the model, those of the quantizers included.

    Args:
        model: The converted model.
        state_dict: The state_dict.
        path: The file it comes from, for messages.

    Raises:
        RuntimeError: If names are missing or unexpected, or shapes do not fit.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    if missing or unexpected:
        raise RuntimeError(
            f"'{path}' does not fit the converted {type(model).__name__}. "
            f"Missing: {abbreviated(missing) or 'nothing'}; unexpected: {abbreviated(unexpected) or 'nothing'}. "
            + _remedy(missing, state_dict, unexpected)
        )
    try:
        model.load_state_dict(cast(dict[str, Tensor], state_dict))
    except RuntimeError as error:
        raise RuntimeError(
            f"'{path}' does not fit the converted {type(model).__name__}: {error}\nUse the config file and the model "
            "that it was trained with."
        ) from error


def _load(file: BinaryIO, path: str | Path, map_location: Any) -> Any:
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # torch and pickle raise whatever the bytes lead them to
        raise RuntimeError(
            f"'{path}' cannot be read as a checkpoint ({type(error).__name__}): it is damaged, no file of torch.save, "
            "or holds Python objects beside tensors, which are not loaded because that would run code from the file. "
            "Use an intact file of tensors and plain values, as torch.save(model.state_dict(), path) writes it."
        ) from error


def _remedy(missing: list[str], state_dict: Mapping[str, Any], unexpected: list[str]) -> str:
    entries = [key for key in unexpected if isinstance(state_dict[key], Mapping)]
    if entries:
        return f"If one of {abbreviated(entries)} is the state_dict, give its name as state_dict_name."
    if not unexpected and missing and all("_quantizer." in key for key in missing):
        return (
            "It is the state of the float model: load it into the float model and convert that with "
            "create_quant_retrain_model."
        )
    return "Use the config file and the model that it was trained with."
