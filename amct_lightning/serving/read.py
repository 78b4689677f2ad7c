"""Reading a checkpoint for servers: its description, its index and its tensors, each checked before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amct_lightning.serving.folder import DESCRIPTION
from amct_lightning.serving.server import SERVER_LAYERS
from amct_lightning.serving.source import read_config
from amct_lightning.serving.tensors import SERVED_TYPES
from amct_lightning.serving.write import INDEX, ROUNDED_BUFFERS, WEIGHTS
from amct_lightning.wording import cut_off

_SETTINGS = ("model_quant_type", "version", "group_size")
_VERSION = "1.0.0"
_UNUSED = {"weight_scale", "weight_offset"}
"""What other writers add to layers that need none of it: servers have a place for it."""


class Checkpoint(NamedTuple):
    """What a folder holds.

    Attributes:
        folder: The folder.
        kinds: The type of each tensor.
        tensors: The tensors.
        rounds_buffers: Whether the model had the buffers that no checkpoint keeps in the dtype of the server as well.
    """

    folder: Path
    kinds: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    rounds_buffers: bool

    def layers(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """Yield name, type and tensors of the quantized layers.

        Raises:
            ValueError: If a layer has several types, or lacks a tensor, or one has another dtype or shape.
        """
        found: dict[str, dict[str, str]] = {}
        for name, kind in self.kinds.items():
            if kind != "FLOAT":
                layer, _, part = name.rpartition(".")
                found.setdefault(layer, {})[part] = kind
        for layer, parts in found.items():
            types = set(parts.values())
            if len(types) > 1:
                raise ValueError(f"{self._file}: the tensors of layer '{layer}' have several types: {cut_off(types)}.")
            kind = types.pop()
            tensors = {part: self.tensors[f"{layer}.{part}"] for part in parts}
            self._check(layer, kind, tensors)
            bias = self.tensors.get(f"{layer}.bias")
            yield layer, kind, tensors if bias is None else {**tensors, "bias": bias}

    def dtype(self) -> torch.dtype:
        """Return the dtype of the server: that of the scales of sums, else that of the float tensors."""
        for name, kind in self.kinds.items():
            if kind == "W8A8" and name.endswith(".deq_scale"):
                return torch.float16 if self.tensors[name].dtype == torch.int64 else torch.bfloat16
        halves = (self.tensors[name].dtype for name, kind in self.kinds.items() if kind == "FLOAT")
        return next((dtype for dtype in halves if dtype in (torch.float16, torch.bfloat16)), torch.bfloat16)

    @property
    def _file(self) -> str:
        return f"'{self.folder / DESCRIPTION}'"

    def _check(self, layer: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
        shapes = SERVER_LAYERS[kind].shapes
        if tensors.keys() - _UNUSED != shapes.keys() - _UNUSED or not shapes.keys() <= tensors.keys():
            raise ValueError(
                f"{self._file}: layer '{layer}' of type {kind} must have the tensors {', '.join(shapes)}, found "
                f"{', '.join(tensors)}. Write the checkpoint again."
            )
        weight = tensors["weight"]
        if weight.dim() != 2:
            raise ValueError(f"{self._file}: tensor '{layer}.weight' must have two axes, found {tuple(weight.shape)}.")
        sizes = {"n": weight.shape[0], "k": weight.shape[1], "1": 1}
        for part, (dtype, axes) in shapes.items():
            shape = tuple(sizes[axis] for axis in axes.split(","))
            allowed = ("float32", "int64") if dtype == "deq" else (dtype,)
            tensor = tensors[part]
            name = str(tensor.dtype).removeprefix("torch.")
            if name not in allowed or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"'{self.folder}': tensor '{layer}.{part}' must be {' or '.join(allowed)} of shape {shape}, found "
                    f"{name} of shape {tuple(tensor.shape)}. Write the checkpoint again."
                )


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint for servers; nothing in it is executed.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or they do not belong together.
    """
    path = Path(folder).expanduser()
    file = path / DESCRIPTION
    if not file.is_file():
        raise FileNotFoundError(f"'{path}' is no checkpoint for servers: it has no {DESCRIPTION}. Check the path.")
    content = read_config(file)
    version = content.get("version")
    if version != _VERSION:
        raise ValueError(
            f"'{file}': key 'version' must be '{_VERSION}', found {version!r}. Write it again with this one."
        )
    tensors: dict[str, Tensor] = {}
    rounds_buffers = False
    for weights in _files(path):
        found, metadata = _read(weights)
        tensors |= found
        rounds_buffers |= metadata.get(ROUNDED_BUFFERS) == "true"
    # Other writers describe more than tensors, such as the type of caches.
    kinds = {n: kind for n, kind in content.items() if n not in _SETTINGS and (n in tensors or kind in SERVED_TYPES)}
    wrong = [f"'{name}': {kind!r}" for name, kind in kinds.items() if kind not in SERVED_TYPES]
    if wrong:
        raise ValueError(f"'{file}': allowed are the types {', '.join(SERVED_TYPES)}, found {cut_off(wrong)}.")
    missing, extra = [n for n in kinds if n not in tensors], [n for n in tensors if n not in kinds]
    if missing or extra:
        what = f"lists {cut_off([repr(n) for n in missing])}, which no file has" if missing else ""
        also = f"does not list {cut_off([repr(n) for n in extra])}, which the files have" if extra else ""
        raise ValueError(f"'{file}' {' and '.join(filter(None, (what, also)))}. Write the checkpoint again.")
    return Checkpoint(path, kinds, tensors, rounds_buffers)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        found = sorted(file.name for file in folder.glob(f"{WEIGHTS}*.safetensors"))
        return [_inside(folder, name) for name in found or [f"{WEIGHTS}.safetensors"]]
    names: Any = read_config(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"'{index}': key 'weight_map' must map names of tensors to names of files.")
    return [_inside(folder, name) for name in dict.fromkeys(names.values())]


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"'{folder / INDEX}' names the file '{name}', which is not in its folder. Do not use it.")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"'{folder}' lacks the file '{name}'. Copy the folder again, with all of its files.")
    return folder / name


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  (an optional library)

    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"'{file}' is damaged ({error}). Take an undamaged copy.") from error
