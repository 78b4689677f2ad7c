"""The files of an export: what they are called, and which form of a network one is."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amct_lightning.commands.base import UserError
from amct_lightning.export.libraries import need
from amct_lightning.files import atomic_path, beside, location, write_text

if TYPE_CHECKING:
    from amct_lightning.export.forms import Form


def need_onnx(*more: str) -> None:
    """Check that what an export needs is installed.

    Args:
        more: Names of further modules that are needed.

    Raises:
        UserError: If it is not.
    """
    try:
        need("onnx", "onnx_ir", "onnxscript", *more)
    except ModuleNotFoundError as error:
        raise UserError(str(error)) from error


def prefix_of(output: str | None, checkpoint: str) -> str:
    """Return what the names of all files of an export begin with.

    Args:
        output: A prefix, or a folder, in which the name of the checkpoint is the prefix, as it is without any.
        checkpoint: The checkpoint.

    Example:
        >>> prefix_of("out/", "runs/epoch=3-step=40.ckpt"), prefix_of("out/net", "runs/last.ckpt")
        ('out/epoch_3-step_40', 'out/net')
    """
    # ATC takes letters, digits and _ - . in paths, and Lightning writes epoch=3.
    stem = re.sub(r"[^\w.\-]", "_", Path(checkpoint).name.removesuffix(".ckpt"))
    if output is None:
        return stem
    place = location(output)
    if output.endswith("/") or (isinstance(place, Path) and place.is_dir()):
        return os.fspath(beside(output, stem))
    return output.removesuffix(".onnx")


@contextlib.contextmanager
def written_along(path: str, text: str) -> Iterator[None]:
    """Write a text file if all goes well in a block; it is on the disk, under another name, before the block begins.

    Args:
        path: The file.
        text: Its content.
    """
    place = location(path)
    if isinstance(place, Path):
        with atomic_path(place) as temporary:
            temporary.write_text(text, encoding="utf-8")
            yield
    else:
        yield
        write_text(place, text)


@dataclass(frozen=True)
class Network:
    """A file of an exported network.

    Attributes:
        path: The file.
        form: Which form it is.
        inputs: The shapes of its inputs by their names; an axis of any length is a text.
    """

    path: str
    form: Form
    inputs: dict[str, tuple[int | str, ...]]


def read_networks(paths: Iterable[str]) -> dict[Form, Network]:
    """Find out which form of a network each of some files is.

    Args:
        paths: The files.

    Raises:
        UserError: If one is missing or no such file, or two are of the same form.
    """
    found: dict[Form, Network] = {}
    for path in paths:
        network = _read(path)
        if network.form in found:
            raise UserError(
                f"'{found[network.form].path}' and '{path}' are both of the form {network.form}. Verify one at a time."
            )
        found[network.form] = network
    return found


def _read(path: str) -> Network:
    import onnx  # noqa: PLC0415  (only an export needs it)
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    from amct_lightning.export.verify.recognise import form_of  # noqa: PLC0415  (as above)

    if not Path(path).is_file():
        raise UserError(f"there is no file '{path}'.")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise UserError(f"'{path}' is no ONNX file.") from error
    form = form_of(graph.node)
    if form is None:
        raise UserError(
            f"'{path}' is an ONNX file without the operators of a quantized network. Give files that "
            "'amct-lightning export' or export_onnx has written."
        )
    constants = {constant.name for constant in graph.initializer}
    return Network(path, form, {value.name: _shape(value) for value in graph.input if value.name not in constants})


def _shape(value: Any) -> tuple[int | str, ...]:
    axes = value.type.tensor_type.shape.dim
    return tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in axes)
