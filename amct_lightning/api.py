"""The entry points without Lightning: AMCT's functions under their own names, and ``prepare_qat``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from amct_lightning.config import RetrainConfig
from amct_lightning.files import check_writable, write_text
from amct_lightning.graph.eligibility import check_float_model
from amct_lightning.graph.plan import attach_plan, make_plan
from amct_lightning.graph.trace import InputData
from amct_lightning.modules import convert_layers
from amct_lightning.plain_hooks import install_hooks

_logger = logging.getLogger(__name__)


def create_quant_retrain_config(
    config_file: str,
    model: nn.Module,
    input_data: Tensor | tuple[Any, ...],
    config_defination: str | None = None,
) -> None:
    """Write the default configuration of a model as JSON, every layer that can be quantized listed.

    Args:
        config_file: The file to write; an existing one is replaced. Missing folders are created.
        model: The float model.
        input_data: Input for which the model works: a tensor, a tuple of positional arguments, or a dict of
            keyword arguments.
        config_defination: A simple configuration file; not available yet, leave it ``None``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If no layer can be quantized, or ``config_defination`` is given.
        RuntimeError: If the model is quantized already or fails on the input.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/config.json"
        >>> create_quant_retrain_config(path, nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4))
        >>> list(RetrainConfig.from_json(path))
        ['0']
    """
    where = "create_quant_retrain_config"
    _check_type(where, "config_file", config_file, str)
    _check_type(where, "model", model, nn.Module)
    _check_type(where, "config_defination", config_defination, (str, type(None)))
    if config_defination is not None:
        raise ValueError(
            f"config_defination '{config_defination}': simple configuration files are not supported by this version. "
            "Leave it out and edit the JSON that this function writes."
        )
    _check_input(input_data)
    check_writable(config_file, "config file")
    RetrainConfig.default(_unwrap(model), input_data).to_json(config_file)


def create_quant_retrain_model(
    config_file: str, model: nn.Module, record_file: str, input_data: Tensor | tuple[Any, ...]
) -> nn.Module:
    r"""Make a copy of a model that trains with quantization, as a configuration file says.

    The record file is created empty. It is written by the first evaluation pass after calibration, and again by
    an evaluation pass whenever the factors have changed since.

    Args:
        config_file: A configuration file, e.g. from :func:`create_quant_retrain_config`.
        model: The float model; it is not changed.
        record_file: The file for the quantization factors. An existing one is emptied.
        input_data: Input for which the model works, see :func:`create_quant_retrain_config`.

    Returns:
        The converted copy, in the training mode that ``model`` is in.

    Raises:
        TypeError: If an argument or a value in the configuration has the wrong type.
        ValueError: If the configuration is not valid, does not fit the model or enables no layer, or a weight is
            NaN or infinite.
        RuntimeError: If the model is quantized already or fails on the input.
        OSError: If the configuration cannot be read or the record not be written.

    Example:
        >>> import tempfile, torch
        >>> folder, x = tempfile.mkdtemp(), torch.linspace(-1, 1, 8).view(2, 4)
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> create_quant_retrain_config(folder + "/config.json", model, x)
        >>> qat = create_quant_retrain_model(folder + "/config.json", model, folder + "/record.txt", x)
        >>> _ = qat.train()(x), qat.eval()(x)
        >>> open(folder + "/record.txt").readline()
        'record {\n'
    """
    where = "create_quant_retrain_model"
    _check_type(where, "config_file", config_file, str)
    _check_type(where, "model", model, nn.Module)
    _check_type(where, "record_file", record_file, str)
    _check_input(input_data)
    config = RetrainConfig.from_json(config_file)
    check_writable(record_file, "record file")
    converted = prepare_qat(_unwrap(model), config, input_data, source=config_file)
    if Path(record_file).exists():
        _logger.warning("Overwriting the existing record file '%s'.", record_file)
    write_text(record_file, "")
    install_hooks(converted, record_file)
    return converted


def prepare_qat(
    model: nn.Module,
    config: RetrainConfig | None,
    input_data: InputData,
    *,
    inplace: bool = False,
    source: str = "config",
) -> nn.Module:
    """Convert a model for quantization-aware training.

    Parameter names stay as they are; each quantized layer gets an ``input_quantizer`` and a ``weight_quantizer``.

    Args:
        model: The float model.
        config: What to quantize and how; ``None`` quantizes every layer that can be with AMCT's defaults.
        input_data: Input for which the model works: a tensor, a tuple of positional arguments or a mapping of
            keyword arguments. It only shows the data flow.
        inplace: Convert ``model`` itself instead of a copy.
        source: Where the config comes from, for messages.

    Returns:
        The converted model.

    Raises:
        TypeError: If ``model`` or ``config`` has the wrong type.
        ValueError: If the configuration does not fit the model or nothing is left to quantize, or a weight is NaN
            or infinite.
        RuntimeError: If the model is quantized already or fails on the input.

    Example:
        >>> import torch
        >>> prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, torch.ones(1, 4))[0]
        QATLinear(
          in_features=4, out_features=2, bias=True
          (input_quantizer): ActivationQuantizer(num_bits=8, fixed_min=False, calibrating)
          (weight_quantizer): WeightQuantizer(num_bits=8, channel_wise=False)
        )
    """
    if config is not None and not isinstance(config, RetrainConfig):
        raise TypeError(
            f"config must be a RetrainConfig or None, got {type(config).__name__}. "
            "Read a file with RetrainConfig.from_json(path)."
        )
    check_float_model(model)
    plan = make_plan(model, config, input_data, source=source)
    target = model if inplace else copy.deepcopy(model)
    convert_layers(target, plan)
    attach_plan(target, plan)
    return target


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _check_type(function: str, argument: str, value: object, allowed: type | tuple[type, ...]) -> None:
    if not isinstance(value, allowed):
        raise TypeError(f"Func {function} argument {argument} must be {allowed}, got {type(value)}.")


def _check_input(input_data: object) -> None:
    if not isinstance(input_data, (Tensor, tuple, Mapping)):
        raise RuntimeError(
            f"input data type must be tuple or torch.Tensor! Got {type(input_data).__name__}; a tuple holds the "
            "positional arguments of the model's forward, a dict its keyword arguments."
        )
