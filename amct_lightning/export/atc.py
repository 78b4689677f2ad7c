"""The command line of ATC, the compiler that makes an offline model (``.om``) for a device from an ONNX file.

What its documentation says (CANN 9.0 and 9.1), and what follows from it here:

* ``--framework=5`` is ONNX. ``--output`` gets the suffix ``.om``, sometimes with the operating system before it.
* An offline model runs on the ``--soc_version`` that it was made for only; the device itself tells the value. The
  package of operators of that processor has to be installed where ATC runs (CANN 8.5 and later).
* ``--input_format`` is NCHW by default; ND is any layout of up to four axes, NCDHW has five; all inputs have the same.
* ``--input_shape`` takes ``-1`` for any length and ``1~8`` for a range; ``--dynamic_batch_size`` takes at least two
  sizes for a first axis that is -1. ``--input_shape_range`` is not used any more.
* Quantized models have fixed shapes: with ``--dynamic_batch_size`` and the like their conversion fails, as INT8 inputs
  are not supported in dynamic shapes (CANN 8.0 to 9.1).
* Quantized models do not go with high precision: no ``--precision_mode`` force_fp32 or must_keep_origin_dtype, no
  ``--precision_mode_v2`` origin, no high_precision in ``--op_precision_mode``.
* Paths consist of letters, digits, Chinese characters and ``_ - .`` only.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from amct_lightning.export.report import ExportReport
from amct_lightning.files import location
from amct_lightning.targets import ATC_TARGETS, TARGETS, find_target

_RANGE = re.compile(r"\d+~(\d+|-1)")
_PLAIN = re.compile(r"[\w./:,;~@%+=-]*")  # as it is in double quotes, in any shell
_PATH = re.compile(r"[A-Za-z0-9_.\-/\u4e00-\u9fff]*")
_AXES_OF_NCDHW = 5
_FROM_ENVIRONMENT = '"${SOC_VERSION:?}"'  # the shell stops if it is not set


def atc_command(
    onnx_path: str | Path,
    target: str | int | None = None,
    *,
    input_shapes: Mapping[str, Sequence[int | str]],
    soc_version: str | None = None,
    output: str | Path | None = None,
    dynamic_batch_size: Sequence[int] = (),
    input_format: str | None = None,
) -> str:
    r"""Return the command that compiles an ONNX file, with what has to be known about it as comments above.

    Args:
        onnx_path: The ONNX file.
        target: The generation of the device: ``"A2"``, ``"A3"``, ``"950"`` or ``"310P"``.
        input_shapes: The shape of each input by its name in the file. Lengths are numbers, ranges such as ``"1~8"``,
            or -1 or a name for any length. A quantized model needs numbers only.
        soc_version: The processor, such as ``"Ascend910B3"``. Without it, it is that of the target if there is only
            one, and else the command takes it from the environment, ``SOC_VERSION``, and says how to find it out.
        output: The offline model, without suffix; by default beside the ONNX file.
        dynamic_batch_size: The sizes of a batch axis that is -1.
        input_format: ``"ND"``, ``"NCHW"`` or ``"NCDHW"``; by default ND, and NCDHW if all inputs have five axes.

    Returns:
        The command, quoted for a shell, an option a line.

    Raises:
        ValueError: If there is no such target or it is none that ATC compiles for, ``soc_version`` is none of its
            processors, or a shape is not valid.

    Example:
        >>> print(atc_command("net.onnx", "A2", soc_version="Ascend910B3", input_shapes={"x": (1, 3, 32, 32)}))
        atc --model="net.onnx" \
            --framework=5 \
            --output="net" \
            --soc_version="Ascend910B3" \
            --input_format=ND \
            --input_shape="x:1,3,32,32"
    """
    generation = None if target is None else _generation(target)
    _check_soc(soc_version, generation)
    soc = soc_version or (None if generation is None else ATC_TARGETS[generation].soc_version)
    shapes = {name: [_length(name, one) for one in shape] for name, shape in input_shapes.items()}
    _check_shapes(shapes, dynamic_batch_size)
    out = str(Path(onnx_path).with_suffix("") if output is None else output).removesuffix(".om")
    options = [
        f"--model={_quoted(str(onnx_path))}",
        "--framework=5",
        f"--output={_quoted(out)}",
        f"--soc_version={_FROM_ENVIRONMENT if soc is None else _quoted(soc)}",
        f"--input_format={input_format or _format_of(shapes)}",
        f"--input_shape={_quoted(';'.join(name + ':' + ','.join(shape) for name, shape in shapes.items()))}",
    ]
    if dynamic_batch_size:
        options.append(f"--dynamic_batch_size={_quoted(','.join(map(str, dynamic_batch_size)))}")
    notes = [*_soc_notes(soc, generation), *_notes(shapes, str(onnx_path), out)]
    return "\n".join([*(f"# {note}" for note in notes), "atc " + " \\\n    ".join(options)])


def compile_command(report: ExportReport, target: str | None, soc_version: str | None = None) -> str:
    """Return the command line of ATC for a network that was written in the deploy form.

    Args:
        report: The network.
        target: The generation of the device.
        soc_version: Its processor.
    """
    place = location(report.path)
    path = _file_name(report) if isinstance(place, str) else place  # ATC reads local files, once they are fetched
    return atc_command(path, target, soc_version=soc_version, input_shapes=report.inputs)


def compile_script(report: ExportReport, target: str | None, soc_version: str | None = None) -> str:
    """Return a shell script that compiles a network in the folder that both are in, wherever it is run.

    Args:
        report: The network, written in the deploy form.
        target: The generation of the device.
        soc_version: Its processor.
    """
    command = atc_command(_file_name(report), target, soc_version=soc_version, input_shapes=report.inputs)
    return f'#!/bin/sh\ncd "$(dirname "$0")" || exit\n{command}\n'


def _file_name(report: ExportReport) -> str:
    return report.path.rpartition("/")[2]


def _generation(target: str | int) -> str:
    """Return the name of a generation, and refuse what ATC does not compile for."""
    found = find_target(target, "atc_command: target")
    if found.atc is None:
        raise ValueError(
            f"atc_command: target '{found.name}' ({found.products}) stands for servers, which load the checkpoint and "
            f"no compiled network. ATC compiles for {', '.join(map(repr, ATC_TARGETS))}."
        )
    return found.name


def _check_soc(soc_version: str | None, target: str | None) -> None:
    if soc_version is None or target is None or soc_version.startswith(ATC_TARGETS[target].soc_prefix):
        return
    others = [f"'{name}'" for name, other in ATC_TARGETS.items() if soc_version.startswith(other.soc_prefix)]
    of_other = f"it belongs to target {others[0]}. " if others else ""
    known = ATC_TARGETS[target]
    raise ValueError(
        f"atc_command(soc_version='{soc_version}'): {of_other}Those of target '{target}' begin with "
        f"{known.soc_prefix}, such as {', '.join(known.soc_examples)}; a device tells its own: {known.soc_query}."
    )


def _length(name: str, length: int | str) -> str:
    if isinstance(length, str):
        return length if _RANGE.fullmatch(length) else "-1"
    if length < 1 and length != -1:
        raise ValueError(
            f"atc_command: input '{name}' has an axis of length {length}. Give a number from 1 on, a range such as "
            "'1~8', or -1 for any length."
        )
    return str(length)


def _check_shapes(shapes: Mapping[str, list[str]], dynamic_batch_size: Sequence[int]) -> None:
    wrong = [name for name in shapes if not name or ";" in name]
    if not shapes or wrong:
        found = f"found {', '.join(map(repr, wrong))}" if wrong else "found none"
        raise ValueError(
            f"atc_command: input_shapes must give the shape of each input by its name, which must have no ';', {found}."
            " Names are given when exporting: input_names=[...]."
        )
    if not dynamic_batch_size:
        return
    if len(dynamic_batch_size) == 1:
        raise ValueError(
            f"atc_command(dynamic_batch_size={list(dynamic_batch_size)}): ATC takes two sizes or more. Give the one as "
            "the first length in input_shapes instead."
        )
    open_axes = {name: [axis for axis, one in enumerate(shape) if one == "-1"] for name, shape in shapes.items()}
    if any(axes not in ([], [0]) for axes in open_axes.values()) or not any(open_axes.values()):
        listed = ", ".join(f"'{name}': {axes}" for name, axes in open_axes.items())
        raise ValueError(
            f"atc_command: with dynamic_batch_size the first axis of an input must be -1 and no other; axes that are: "
            f"{listed}. Give the other axes a length."
        )


def _format_of(shapes: Mapping[str, list[str]]) -> str:
    return "NCDHW" if all(len(shape) == _AXES_OF_NCDHW for shape in shapes.values()) else "ND"


def _quoted(text: str) -> str:
    return f'"{text}"' if _PLAIN.fullmatch(text) else shlex.quote(text)


def _soc_notes(soc: str | None, target: str | None) -> Iterator[str]:
    if soc is not None:
        return
    yield "The processor of the device, which the offline model is made for:"
    for name, one in ATC_TARGETS.items() if target is None else [(target, ATC_TARGETS[target])]:
        products = f"{TARGETS[name].products}: " if target is None else ""
        yield f"  {products}export SOC_VERSION={one.soc_examples[0]} or alike: {one.soc_query}"


def _notes(shapes: Mapping[str, list[str]], *paths: str) -> Iterator[str]:
    if any(not one.isdigit() for shape in shapes.values() for one in shape):
        yield "ATC does not convert quantized models with dynamic shapes (CANN 8.0 to 9.1): give numbers, not -1."
    if not all(map(_PATH.fullmatch, paths)):
        yield "ATC takes letters, digits, Chinese characters and _ - . in paths only: move the file."
