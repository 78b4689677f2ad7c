"""Reading checkpoint folders without running code from them.

torch.distributed.checkpoint unpickles the file ``.metadata`` and what is no tensor, such as the settings of
optimizers, whatever these hold (torch 2.6 to 2.14).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),
}
"""What describes tensors in files, beside the classes of ``torch.distributed.checkpoint.metadata`` and dtypes."""


class SafeReader(FileSystemReader):
    """Reads a checkpoint folder; its description may hold descriptions of tensors only."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the description."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"'{path}' is damaged, or not the description of a checkpoint: {error}") from error
        if not isinstance(found, Metadata):
            raise RuntimeError(f"'{path}' is not the description of a checkpoint, but a {type(found).__name__}.")
        about = getattr(found, "storage_meta", None) or StorageMeta()
        about.load_id = self.load_id
        found.storage_meta = about
        return found


class SafePlanner(DefaultLoadPlanner):
    """Loads what is no tensor as ``torch.load(weights_only=True)`` does."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one object."""
        torch.load(value, weights_only=True)  # refuses code, so that there is none when torch reads it once more
        value.seek(0)
        super().load_bytes(read_item, value)


class _Unpickler(pickle.Unpickler):
    """Finds nothing but what describes tensors."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function if it is allowed."""
        known = (module, name) in _ALLOWED
        if module == metadata.__name__ and getattr(getattr(metadata, name, None), "__module__", "") == module:
            known = True
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.memory_format)):
            known = True
        if not known:
            raise pickle.UnpicklingError(f"it would run '{module}.{name}', which describes no tensor. Do not use it.")
        return super().find_class(module, name)
