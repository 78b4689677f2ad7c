"""Writing the tensors of a checkpoint in files of a limited size, with what describes them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from amct_lightning.files import write_text
from amct_lightning.serving.folder import DESCRIPTION
from amct_lightning.serving.model import ServedModel
from amct_lightning.serving.tensors import SERVED_TYPES, Entry, ServedType
from amct_lightning.wording import cut_off

WEIGHTS = "quant_model_weights"
ROUNDED_BUFFERS = "amct_lightning.rounded_buffers"
"""Key in the metadata of the files, which servers do not look at."""

INDEX = f"{WEIGHTS}.safetensors.index.json"


class ShardWriter:
    """Collects tensors and writes a file whenever the next one would make it too large.

    Args:
        folder: Where the files go.
        largest: Bytes of tensors in a file; one that is larger has a file of its own.
        save: What writes a file, ``safetensors.torch.save_file``.
    """

    def __init__(self, folder: Path, largest: int, save: Callable[[dict[str, Tensor], Path], None]) -> None:
        self.folder, self.largest, self.save = folder, largest, save
        self.held: dict[str, Tensor] = {}
        self.size = self.total = 0
        self.files: list[tuple[Path, list[str]]] = []
        self.kinds: dict[str, ServedType] = {}

    def add(self, entry: Entry) -> None:
        """Take a tensor.

        Args:
            entry: The tensor.
        """
        size = entry.value.numel() * entry.value.element_size()
        if self.held and self.size + size > self.largest:
            self._flush()
        self.held[entry.name] = entry.value.detach().cpu().contiguous()
        self.kinds[entry.name] = entry.kind
        self.size += size
        self.total += size

    def close(self) -> None:
        """Write what is left, the index if there are several files, and the description."""
        self._flush()
        names = [WEIGHTS] if len(self.files) == 1 else [self._numbered(n) for n in range(1, len(self.files) + 1)]
        where: dict[str, str] = {}
        for name, (file, tensors) in zip(names, self.files, strict=True):
            file.rename(file.with_name(f"{name}.safetensors"))
            where |= dict.fromkeys(tensors, f"{name}.safetensors")
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": where}
            write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        write_text(self.folder / DESCRIPTION, json.dumps(description(self.kinds), indent=2) + "\n")

    def _flush(self) -> None:
        if self.held:
            file = self.folder / f"{WEIGHTS}.part{len(self.files)}"
            self.save(self.held, file)
            self.files.append((file, list(self.held)))
            self.held, self.size = {}, 0

    def _numbered(self, number: int) -> str:
        return f"{WEIGHTS}-{number:05}-of-{len(self.files):05}"


def description(kinds: dict[str, ServedType]) -> dict[str, str | int]:
    """Return what ``quant_model_description.json`` says: the lowest type that occurs, and the type of each tensor.

    Args:
        kinds: The types, by the names of the tensors.

    Example:
        >>> description({"a.weight": "W8A16", "b.weight": "FLOAT"})["model_quant_type"]
        'W8A16'
    """
    lowest = next(kind for kind in SERVED_TYPES if kind in kinds.values())
    return {"model_quant_type": lowest, "version": "1.0.0", "group_size": 0, **kinds}


def consumed(entries: Iterable[Entry]) -> None:
    """Ask for all tensors and drop them, as ranks have to that do not write.

    Args:
        entries: The tensors.
    """
    for _ in entries:
        pass


def noted_buffers(served: ServedModel) -> dict[str, str]:
    """Return what the files say of buffers that no checkpoint keeps, and warn if the model has rounded them.

    Args:
        served: What is written.
    """
    rounded = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in served.network.named_modules()
        for name in module._non_persistent_buffers_set
        if getattr(module._buffers[name], "dtype", None) == served.dtype
    ]
    if not rounded:
        return {}
    dtype = str(served.dtype).removeprefix("torch.")
    warnings.warn(
        f"The model computes with {cut_off([repr(name) for name in rounded])} in {dtype}, as model.to() leaves it; a "
        "server keeps it in float32, so its outputs will differ in the last bits. Load the float network in its dtype "
        f"(from_pretrained(..., dtype=torch.{dtype})) in place of casting it.",
        stacklevel=3,
    )
    return {ROUNDED_BUFFERS: "true"}
