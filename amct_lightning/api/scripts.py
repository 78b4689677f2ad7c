"""AMCT's functions under their own names, for scripts without Lightning."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from amct_lightning.amct.arguments import check_arguments, refuse_same_file
from amct_lightning.amct.data_parallel import unwrap, wrap_like
from amct_lightning.amct.plain_hooks import install_hooks
from amct_lightning.amct.restore import read_checkpoint, restore_state, select_state_dict
from amct_lightning.api.prepare import prepare_qat
from amct_lightning.config import RetrainConfig, load_config
from amct_lightning.config.fit import SimpleFile, fit_to_model
from amct_lightning.conversion.on_target import TargetLike, TargetRules
from amct_lightning.conversion.report import conversion_report
from amct_lightning.files import check_writable, is_file, write_text
from amct_lightning.graph.forward import InputData
from amct_lightning.modules.degenerate import OnDegenerate
from amct_lightning.quantizers.executors import Execution
from amct_lightning.targets import OnUnsupported

_logger = logging.getLogger(__name__)


def create_quant_retrain_config(
    config_file: str,
    model: nn.Module,
    input_data: Tensor | tuple[Any, ...],
    config_defination: str | None = None,
    *,
    target: TargetLike = None,
    on_unsupported: OnUnsupported = "error",
) -> None:
    """Write a configuration for a model as JSON, every layer that can be quantized listed.

    Args:
        config_file: The file to write; an existing one is replaced. Missing folders are created.
        model: The float model.
        input_data: Input for which the model works: a tensor, a tuple of positional arguments, or a dict of
            keyword arguments.
        config_defination: The path of a simple configuration (``.cfg``) that says what differs from the defaults.
        target: The hardware that the network is meant for; the file has what it runs. See :func:`prepare_qat`.
        on_unsupported: See :func:`prepare_qat`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If no layer can be quantized, or the simple configuration is not valid, does not fit the model or
            the target or leaves no layer to quantize.
        RuntimeError: If the model is quantized already or fails on the input.
        OSError: If the simple configuration cannot be read or the file not be written.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/config.json"
        >>> create_quant_retrain_config(path, nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4))
        >>> list(RetrainConfig.from_json(path))
        ['0']
    """
    texts = {"config_file": (config_file, str), "config_defination": (config_defination, (str, type(None)))}
    check_arguments("create_quant_retrain_config", model, input_data, texts)
    check_writable(config_file, "config file")
    rules, net = TargetRules.of(target, on_unsupported, "create_quant_retrain_config"), unwrap(model)
    if config_defination is None:
        config = RetrainConfig.default(net, input_data)
    else:
        choices, by_channel = load_config(SimpleFile(config_defination)), rules is not None and rules.linear_by_channel
        config = fit_to_model(choices, net, input_data, config_defination, by_channel)
    if rules is not None:
        config = rules.fitted(config, {name: net.get_submodule(name) for name in config}, config_defination or "config")
    config.to_json(config_file)


def create_quant_retrain_model(
    config_file: str,
    model: nn.Module,
    record_file: str,
    input_data: Tensor | tuple[Any, ...],
    *,
    allow_reuse: bool = False,
    search_n: bool = False,
    deploy_grid: bool = False,
    execution: Execution = "auto",
    on_degenerate: OnDegenerate = "amct",
    target: TargetLike = None,
    on_unsupported: OnUnsupported = "error",
) -> nn.Module:
    r"""Make a copy of a model that trains with quantization, as a configuration file says.

    The record file is created empty. It is written by the first evaluation pass after calibration, and again by
    an evaluation pass whenever the factors have changed since. A pass is a call of the model itself; a deep copy of
    it leaves the file alone.

    Args:
        config_file: A configuration file, e.g. from :func:`create_quant_retrain_config`.
        model: The float model; it is not changed. One that is wrapped in DistributedDataParallel is converted inside,
            and the copy is wrapped alike.
        record_file: The file for the quantization factors. An existing one is emptied.
        input_data: Input for which the model works, see :func:`create_quant_retrain_config`.
        allow_reuse: See :func:`prepare_qat`.
        search_n: See :func:`prepare_qat`.
        deploy_grid: See :func:`prepare_qat`.
        execution: See :func:`prepare_qat`.
        on_degenerate: See :func:`prepare_qat`.
        target: See :func:`prepare_qat`.
        on_unsupported: See :func:`prepare_qat`.

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
    texts = {"config_file": (config_file, str), "record_file": (record_file, str)}
    check_arguments("create_quant_retrain_model", model, input_data, texts)
    options: dict[str, Any] = {"allow_reuse": allow_reuse, "search_n": search_n, "on_degenerate": on_degenerate}
    options |= {"target": target, "on_unsupported": on_unsupported, "deploy_grid": deploy_grid, "execution": execution}
    converted = _convert(config_file, model, record_file, input_data, options)
    _start_record(converted, record_file)
    return wrap_like(converted, model)


def restore_quant_retrain_model(
    config_file: str,
    model: nn.Module,
    record_file: str,
    input_data: Tensor | tuple[Any, ...],
    pth_file: str,
    state_dict_name: str | None = None,
    *,
    allow_reuse: bool = False,
    search_n: bool = False,
    deploy_grid: bool = False,
    execution: Execution = "auto",
    on_degenerate: OnDegenerate = "amct",
    target: TargetLike = None,
    on_unsupported: OnUnsupported = "error",
) -> nn.Module:
    r"""Make a converted copy of a model, as :func:`create_quant_retrain_model` does, and load a saved state into it.

    The state is that of a converted model, saved by this package or by AMCT. Whether the quantizers are calibrated
    is part of it, so learned clips stay and an evaluation pass can follow at once. (AMCT calibrates anew and loses
    them.) The weights are read without running code from the file.

    Args:
        config_file: The configuration file that the saved model was converted with.
        model: The float model; it is not changed. One that is wrapped in DistributedDataParallel is converted inside,
            and the copy is wrapped alike.
        record_file: The file for the quantization factors. An existing one is emptied, once the state is loaded.
        input_data: Input for which the model works, see :func:`create_quant_retrain_config`.
        pth_file: A file written with ``torch.save``. All names in the state may begin with ``module.``.
        state_dict_name: The entry of the file that holds the state_dict; ``None`` if the file is the state_dict.
        allow_reuse: See :func:`prepare_qat`.
        search_n: See :func:`prepare_qat`.
        deploy_grid: See :func:`prepare_qat`.
        execution: See :func:`prepare_qat`.
        on_degenerate: See :func:`prepare_qat`.
        target: See :func:`prepare_qat`.
        on_unsupported: See :func:`prepare_qat`.

    Returns:
        The converted copy with the saved state, in the training mode that ``model`` is in.

    Raises:
        TypeError: If an argument or a value in the configuration has the wrong type.
        KeyError: If the file has no entry ``state_dict_name``, or it is empty.
        ValueError: If the configuration is not valid, does not fit the model or enables no layer, or a weight is
            NaN or infinite.
        RuntimeError: If the file is not a checkpoint or not that of this model and configuration, or the model is
            quantized already or fails on the input.
        OSError: If the configuration or the checkpoint cannot be read or the record not be written.

    Example:
        >>> import tempfile, torch
        >>> folder, x = tempfile.mkdtemp(), torch.linspace(-1, 1, 8).view(2, 4)
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> create_quant_retrain_config(folder + "/config.json", model, x)
        >>> qat = create_quant_retrain_model(folder + "/config.json", model, folder + "/record.txt", x)
        >>> _ = qat.train()(x)
        >>> torch.save({"state_dict": qat.state_dict()}, folder + "/last.pth")
        >>> again = restore_quant_retrain_model(
        ...     folder + "/config.json", model, folder + "/record.txt", x, folder + "/last.pth", "state_dict"
        ... )
        >>> torch.equal(again.eval()(x), qat.eval()(x))
        True
    """
    texts: dict[str, tuple[object, Any]] = {"config_file": (config_file, str), "record_file": (record_file, str)}
    texts |= {"pth_file": (pth_file, str), "state_dict_name": (state_dict_name, (str, type(None)))}
    check_arguments("restore_quant_retrain_model", model, input_data, texts)
    refuse_same_file(record_file, pth_file, "checkpoint")
    state_dict = select_state_dict(read_checkpoint(pth_file), state_dict_name, pth_file)
    options: dict[str, Any] = {"allow_reuse": allow_reuse, "search_n": search_n, "on_degenerate": on_degenerate}
    options |= {"target": target, "on_unsupported": on_unsupported, "deploy_grid": deploy_grid, "execution": execution}
    converted = _convert(config_file, model, record_file, input_data, options)
    restore_state(converted, state_dict, pth_file)
    _start_record(converted, record_file)
    return wrap_like(converted, model)


def _convert(
    config_file: str, model: nn.Module, record_file: str, input_data: InputData, options: dict[str, Any]
) -> nn.Module:
    config = RetrainConfig.from_json(config_file)
    check_writable(record_file, "record file")
    refuse_same_file(record_file, config_file, "configuration file")
    return prepare_qat(unwrap(model), config, input_data, source=config_file, **options)


def _start_record(converted: nn.Module, record_file: str) -> None:
    if is_file(record_file):
        _logger.warning("Overwriting the existing record file '%s'.", record_file)
    write_text(record_file, "")
    install_hooks(converted, record_file)
    _logger.info("The record goes to '%s'. %s", record_file, conversion_report(converted))
