"""The functions that users call. They import the libraries, because only a checkpoint for servers needs them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist
from torch import nn

from amct_lightning.export.libraries import need
from amct_lightning.graph.forward import InputData
from amct_lightning.modules.folding import is_sharded
from amct_lightning.serving.folder import checked_folder, whole_folder
from amct_lightning.serving.load import loaded
from amct_lightning.serving.model import served_model
from amct_lightning.serving.source import checked_source, write_config
from amct_lightning.serving.tensors import entries
from amct_lightning.serving.write import ShardWriter, consumed, noted_buffers

if TYPE_CHECKING:
    from amct_lightning.serving.report import ServingReport

_FORMS = ("ascend_v1",)


def save_serving(
    model: nn.Module,
    folder: str | Path,
    form: Literal["ascend_v1"] = "ascend_v1",
    hf_source: str | Path | None = None,
    *,
    largest_file: int = 4 * 10**9,
) -> Path:
    """Write a trained model as a checkpoint that servers of language models load: vllm-ascend, SGLang, MindIE.

    The folder holds ``quant_model_weights.safetensors`` (several files and an index if they would be too large),
    ``quant_model_description.json``, the configuration of the network, and its tokenizer and generation files. Tensors
    are made layer by layer, so that no second network is held. Rank 0 writes. Of sharded weights the whole of one layer
    is gathered at a time, so that all ranks have to call this, and wait for rank 0; of others no rank but 0 has to.

    Args:
        model: A trained model that was converted with ``target="serving"``, or what holds it. If there is a network of
            transformers inside, that one is written, under its own names. It is not changed.
        folder: The folder; an earlier checkpoint in it is replaced when the new one is complete.
        form: ``"ascend_v1"``, as msModelSlim writes it.
        hf_source: The local folder of the float network, from which configuration, tokenizer and generation files are
            copied; without it the configuration of the model is written, and there is no tokenizer.
        largest_file: Bytes of tensors in one file, at most.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If the model was not converted for servers or is not calibrated, a layer cannot be expressed,
            ``hf_source`` is of another network, or the folder holds other files.
        OSError: If a file cannot be written; nothing is left of it then.

    Example:
        >>> import tempfile, torch
        >>> from amct_lightning import calibrate, prepare_qat
        >>> x = torch.linspace(-1, 1, 8).view(2, 4)
        >>> model = prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, x, target="serving")
        >>> calibrate(model, [x])
        >>> sorted(file.name for file in save_serving(model, tempfile.mkdtemp() + "/served").iterdir())
        ['quant_model_description.json', 'quant_model_weights.safetensors']
    """
    if form not in _FORMS:
        raise ValueError(f"save_serving(form={form!r}): must be {' or '.join(map(repr, _FORMS))}.")
    if isinstance(largest_file, bool) or not isinstance(largest_file, int) or largest_file < 1:
        raise ValueError(f"save_serving(largest_file={largest_file!r}): must be a number of bytes, 1 or more.")
    need("safetensors", extra="serving")
    from safetensors.torch import save_file  # noqa: PLC0415  (an optional library)

    served = served_model(model)
    source = None if hf_source is None else checked_source(hf_source, served.config)
    path = checked_folder(folder)
    tensors = entries(served.network, served.dtype)
    is_collective = is_sharded(served.network)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        if is_collective:
            consumed(tensors)
            dist.barrier()
        return path
    with whole_folder(path) as new:
        metadata = {"format": "pt", **noted_buffers(served)}
        writer = ShardWriter(new, largest_file, lambda held, file: save_file(held, file, metadata))
        for entry in tensors:
            writer.add(entry)
        writer.close()
        write_config(new, served.dtype, served.config, source)
    if is_collective:
        dist.barrier()
    return path


def load_serving(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a checkpoint for servers back into a plain network that computes as the server does.

    Its quantized layers quantize with the reciprocal of the scale in the dtype of the server, sum integers exactly, and
    have the dtype of the server as output. Nothing in the folder is executed, and nothing is downloaded.

    Args:
        folder: The folder that :func:`save_serving`, or msModelSlim, has written.
        model: The float network that was converted, which is copied; by default it is made by transformers from the
            ``config.json`` in the folder.

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        ModuleNotFoundError: If safetensors, or transformers where it is needed, is not installed.
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the tensors are not those of the network.

    Example:
        >>> import tempfile, torch
        >>> from amct_lightning import calibrate, prepare_qat
        >>> x, net = torch.linspace(-1, 1, 8).view(2, 4), nn.Sequential(nn.Linear(4, 2))
        >>> model = prepare_qat(net, None, x, target="serving")
        >>> calibrate(model, [x])
        >>> server = load_serving(save_serving(model, tempfile.mkdtemp() + "/served"), net)
        >>> bool((server(x) == model.bfloat16().eval()(x.bfloat16())).all())
        True
    """
    need("safetensors", extra="serving")
    return loaded(folder, model)


def verify_serving(model: nn.Module, folder: str | Path, batches: Iterable[InputData]) -> ServingReport:
    """Run a model and the checkpoint that was written of it side by side, and say which layer departs first.

    Every quantized layer of the server is given the very input that the model's layer had; its codes and outputs have
    to be the same (outputs of other types than ``W8A8`` within the rounding of float sums). The tensors of the
    checkpoint are compared with the model's, and so are the scores that both networks give.

    Args:
        model: The model that was saved. It is evaluated; one in float32 is copied into the dtype of the server.
        folder: The checkpoint.
        batches: What the network is called with, without labels: tensors, tuples or mappings. Of a model that holds a
            network of transformers, what that network is called with.

    Returns:
        The report: ``ok``, ``first_departure``, a table as text, JSON.

    Raises:
        ModuleNotFoundError: If a library is not installed.
        ValueError: If the model was not converted for servers, there are no batches, or the checkpoint is damaged.

    Example:
        >>> import tempfile, torch
        >>> from amct_lightning import calibrate, prepare_qat
        >>> x = torch.linspace(-1, 1, 8).view(2, 4)
        >>> model = prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, x, target="serving")
        >>> calibrate(model, [x])
        >>> verify_serving(model, save_serving(model, tempfile.mkdtemp() + "/served"), [x]).ok
        True
    """
    need("safetensors", extra="serving")
    from amct_lightning.serving.verify import compare  # noqa: PLC0415

    return compare(model, folder, batches)
