"""The functions that users call. What needs ONNX's libraries is imported by them, because only an export does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from amct_lightning.amct.data_parallel import unwrap
from amct_lightning.config import RetrainConfig
from amct_lightning.export.checks import check_config
from amct_lightning.export.libraries import need
from amct_lightning.export.report import ExportReport
from amct_lightning.graph.forward import InputData
from amct_lightning.record import QuantRecord

if TYPE_CHECKING:
    from amct_lightning.export.onnx_file import Settings

_LIBRARIES = ("onnx", "onnx_ir", "onnxscript")


def export_onnx(
    model: nn.Module,
    path: str | Path,
    input_data: InputData,
    form: Literal["qdq", "deploy", "fake_quant"] = "qdq",
    *,
    record: QuantRecord | str | Path | None = None,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    external_data_threshold: int = 2**31 - 2**20,
) -> ExportReport:
    """Write a trained model as an ONNX file; the model is not changed.

    Three forms of the same network:

    - ``"qdq"``: QuantizeLinear and DequantizeLinear around float operators, weights stored as integers. It runs in
      onnxruntime, and compilers of many makers take it. Opset 13, with INT4 or INT16 21.
    - ``"deploy"``: what the Ascend compiler (ATC) takes, with ``AscendQuant``, integer operators and ``AscendDequant``.
    - ``"fake_quant"``: the deployed network computed in float, to be run in onnxruntime.

    The last two are AMCT's, in opset 11 wherever torch can express the model in it; otherwise in the lowest opset in
    which it can. Where torch's TorchScript exporter fails, the one built on ``torch.export`` is used; the report tells.

    Args:
        model: A trained, converted model in eval mode; what is wrapped in DDP or compiled is taken out.
        path: The file to write. Missing folders are created.
        input_data: Input for which the model works: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. Its tensors become the inputs of the network, in their order.
        form: Which form.
        record: The factors to use, or the file that they are in; by default those that the model has now.
        opset: The only opset to try.
        input_names: Names of the inputs; by default those of the arguments of ``forward``.
        output_names: Names of the outputs; by default those of what the model returns.
        dynamic_axes: Axes of any length, as for :func:`torch.onnx.export`: ``{"input": {0: "batch"}}``.
        external_data_threshold: If the constants take more bytes than this they go into ``<path>.data``. A file of ONNX
            cannot be larger than 2 GiB.

    Returns:
        What was written.

    Raises:
        ModuleNotFoundError: If ONNX's libraries are not installed.
        ValueError: If the model is not converted or not calibrated, or an argument does not fit.
        RuntimeError: If the record is not that of the model, a BatchNorm is in training mode, or torch cannot translate
            a part in float.
        OSError: If the file cannot be written; nothing is left of it then.

    Example:
        >>> import tempfile, torch
        >>> from amct_lightning import calibrate, prepare_qat
        >>> x = torch.linspace(-1, 1, 8).view(2, 4)
        >>> model = prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, x)
        >>> calibrate(model, [x])
        >>> export_onnx(model.eval(), tempfile.mkdtemp() + "/net.onnx", x).opset
        13
    """
    need(*_LIBRARIES)
    from amct_lightning.export.onnx_file import export_forms  # noqa: PLC0415

    settings = _settings(input_names, output_names, dynamic_axes, opset, external_data_threshold)
    source = "record"
    if isinstance(record, (str, Path)):
        record, source = _record_of(record)
    return export_forms(model, {form: path}, input_data, record, settings, source)[form]


def save_quant_retrain_model(
    config_file: str,
    model: nn.Module,
    record_file: str,
    save_path: str,
    input_data: Tensor | tuple[Any, ...],
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
) -> None:
    """Write the two ONNX files of AMCT: ``<save_path>_deploy_model.onnx`` and ``<save_path>_fake_quant_model.onnx``.

    Args:
        config_file: The configuration file that the model was converted with.
        model: The converted, trained model in eval mode; it is not changed.
        record_file: Its record file, which an evaluation pass writes.
        save_path: Where the files go: a folder and the prefix of their names. Missing folders are created. A path that
            ends with ``/`` gives names without a prefix.
        input_data: Input for which the model works.
        input_names: See :func:`export_onnx`.
        output_names: See :func:`export_onnx`.
        dynamic_axes: See :func:`export_onnx`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model is not converted or not calibrated.
        RuntimeError: If configuration or record are not those of the model, or torch cannot translate a part in float.
        OSError: If a file cannot be read or written; then neither of the two is there.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from amct_lightning import create_quant_retrain_config, create_quant_retrain_model
        >>> folder, x = tempfile.mkdtemp(), torch.linspace(-1, 1, 8).view(2, 4)
        >>> net, config, record = nn.Sequential(nn.Linear(4, 2)), folder + "/config.json", folder + "/record.txt"
        >>> create_quant_retrain_config(config, net, x)
        >>> model = create_quant_retrain_model(config, net, record, x)
        >>> _ = model.train()(x), model.eval()(x)
        >>> save_quant_retrain_model(config, model, record, folder + "/net", x)
        >>> sorted(path.name for path in pathlib.Path(folder).glob("*.onnx"))
        ['net_deploy_model.onnx', 'net_fake_quant_model.onnx']
    """
    texts = {"config_file": config_file, "record_file": record_file, "save_path": save_path}
    _check_arguments(texts, model, input_data)
    need(*_LIBRARIES)
    from amct_lightning.export.onnx_file import export_forms  # noqa: PLC0415

    inner = unwrap(model)
    check_config(RetrainConfig.from_json(config_file), inner, config_file)
    record, source = _record_of(record_file)
    prefix = save_path if save_path.endswith("/") else f"{save_path}_"
    files: dict[Any, str | Path] = {form: f"{prefix}{form}_model.onnx" for form in ("deploy", "fake_quant")}
    settings = _settings(input_names, output_names, dynamic_axes, None, 2**31 - 2**20)
    export_forms(inner, files, input_data, record, settings, source)


def _record_of(file: str | Path) -> tuple[QuantRecord, str]:
    return QuantRecord.load(file), f"'{file}'"


def _settings(
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamic_axes: Mapping[str, Any] | None,
    opset: int | None,
    external_data_threshold: int,
) -> Settings:
    from amct_lightning.export.onnx_file import Settings  # noqa: PLC0415
    from amct_lightning.export.tracing.base_graph import Names  # noqa: PLC0415

    return Settings(Names(input_names, output_names, dynamic_axes), opset, external_data_threshold)


def _check_arguments(texts: Mapping[str, object], model: object, input_data: object) -> None:
    for argument, value in texts.items():
        if not isinstance(value, str):
            raise TypeError(f"Func save_quant_retrain_model argument {argument} must be {str}, got {type(value)}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Func save_quant_retrain_model argument model must be {nn.Module}, got {type(model)}.")
    if not isinstance(input_data, (Tensor, tuple, Mapping)):
        raise RuntimeError("input data type must be tuple or torch.Tensor!")
