"""What of the float network's folder goes into the served one: configuration, tokenizer and generation files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from amct_lightning.files import write_text
from amct_lightning.wording import cut_off

CONFIG = "config.json"

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "moe_intermediate_size",
    "tie_word_embeddings",
    "rms_norm_eps",
    "hidden_act",
)
_DTYPES = ("dtype", "torch_dtype")
_LONGEST = 1 << 24
"""Bytes of a configuration; one of a real network has a few thousand."""


def checked_source(folder: str | Path, config: Any) -> Path:
    """Return the folder of the float network, if it is one, and of the network that is served.

    Args:
        folder: The folder.
        config: The configuration of the network that is served.

    Raises:
        FileNotFoundError: If it has no ``config.json``.
        ValueError: If that is of another network, or is damaged.
    """
    path = Path(folder).expanduser()
    file = path / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"hf_source '{path}' has no {CONFIG}. Give the local folder in which transformers keeps the float network; "
            "nothing is downloaded."
        )
    theirs = read_config(file)
    if config is None:
        return path
    ours = config.to_dict()
    wrong = [
        f"{key} {theirs[key]!r} where the model has {ours[key]!r}"
        for key in ("model_type", *_SIZES)
        if key in theirs and key in ours and theirs[key] != ours[key]
    ]
    if wrong:
        raise ValueError(
            f"hf_source '{path}' is the folder of another network: its {CONFIG} has {cut_off(wrong)}. Give the folder "
            "of the float network that was converted."
        )
    return path


def read_config(file: Path) -> dict[str, Any]:
    """Return what a JSON file of settings says.

    Args:
        file: The file.

    Raises:
        ValueError: If it is damaged.
    """
    if file.stat().st_size > _LONGEST:
        raise ValueError(f"'{file}' has {file.stat().st_size:,} bytes, more than the settings of a network ever have.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is no valid JSON ({error}). Take an undamaged copy.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' must hold a JSON object, found {type(content).__name__}.")
    return content


def write_config(folder: Path, dtype: torch.dtype, config: Any, source: Path | None) -> None:
    """Write the configuration of the network, in the dtype that the server is to have, and copy what lies beside it.

    Args:
        folder: Where to.
        dtype: That dtype.
        config: The configuration of the network that is served, ``None`` if it is none of transformers.
        source: The folder of the float network, ``None`` if there is none.
    """
    if source is None and config is None:
        return
    content = config.to_dict() if source is None else read_config(source / CONFIG)
    if source is None:
        content.setdefault("architectures", None)
    content.pop("quantization_config", None)
    name = str(dtype).removeprefix("torch.")
    for key in [key for key in _DTYPES if key in content] or [_DTYPES[1]]:
        content[key] = name
    write_text(folder / CONFIG, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
    if source is not None:
        for file in copied_files(source):
            shutil.copyfile(file, folder / file.name)


def copied_files(source: Path) -> Iterator[Path]:
    """Yield the files that are copied: none that holds weights or code.

    Args:
        source: The folder of the float network.

    Raises:
        ValueError: If one is a link to a file elsewhere, which is not that of a hub's cache.
    """
    found = {file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}
    own = source.resolve()
    for file in sorted(found):
        real = file.resolve()
        if not {own, own.parent.parent / "blobs"} & {*real.parents}:
            raise ValueError(f"'{file}' is a link to '{real}', outside of its folder. Put the file itself there.")
        yield file
