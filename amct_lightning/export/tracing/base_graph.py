"""The one graph that all forms are made from: the model in ONNX, with one node per call of a quantized layer.

Torch has two exporters. That of TorchScript knows the old opsets that the readers of AMCT's files expect, so it is
asked first, from the lowest opset upwards; where it fails, the one that is built on ``torch.export`` is.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import onnx_ir as ir
import torch
import torch.onnx
from onnx_ir.passes.common import RemoveUnusedNodesPass

from amct_lightning.export.libraries import quiet
from amct_lightning.export.tracing.culprits import culprits
from amct_lightning.export.tracing.placeholder import LayerCall, placeholders
from amct_lightning.export.tracing.prepared import Prepared
from amct_lightning.export.tracing.signature import FlatCall, dynamic_shapes, on_cpu
from amct_lightning.graph.forward import InputData

LOWEST_OPSET = 11
"""What the Ascend compiler's own files and AMCT's use."""

_TORCHSCRIPT_OPSETS = (11, 14, 17)
_TORCH_EXPORT_OPSET = 18
_SEEN_AS = "run."  # the name of the model in a FlatCall


class WrongNamesError(ValueError):
    """The names that are given for inputs or outputs do not fit."""


Exporter = Literal["torchscript", "torch.export"]
"""The exporters of torch."""


@dataclass(frozen=True)
class Choices:
    """What the inputs and outputs of a file are called, which of their axes have any length, and how it is made.

    Attributes:
        inputs: Names of the inputs; ``None`` for those of the arguments.
        outputs: Names of the outputs; ``None`` for those of what the model returns.
        dynamic_axes: As for :func:`torch.onnx.export`: name -> axes, as a list or with names.
        opset: The only opset to try; ``None`` for the lowest that can express the model.
        exporter: The only exporter to ask; ``None`` for one after the other.
    """

    inputs: Sequence[str] | None = None
    outputs: Sequence[str] | None = None
    dynamic_axes: Mapping[str, Any] | None = None
    opset: int | None = None
    exporter: Exporter | None = None


@dataclass(frozen=True)
class BaseGraph:
    """A model in ONNX with a node per call of a quantized layer.

    Attributes:
        model: The graph; it is the caller's to change.
        calls: The calls that the nodes stand for.
        exporter: Which exporter made it, for people.
        opset: Its opset.
        failed: What was tried before: exporter and opset -> error.
        dropped: What the model returns besides tensors.
    """

    model: ir.Model
    calls: Sequence[LayerCall]
    exporter: str
    opset: int
    failed: Mapping[str, str]
    dropped: Sequence[str]


def build_graph(
    prepared: Prepared,
    input_data: InputData,
    names: Choices,
    check: Callable[[BaseGraph], None] = lambda _: None,
) -> BaseGraph:
    """Translate a model into ONNX.

    Args:
        prepared: The model.
        input_data: Input for which it works.
        names: What its inputs and outputs are called, and what else can be chosen.
        check: Raises an error for a graph that is not to be taken; then the next exporter is asked.

    Returns:
        The graph.

    Raises:
        RuntimeError: If no exporter of torch can translate it, with what each of them said.
        ValueError: If names do not fit.
    """
    failed: dict[str, str] = {}
    with prepared.ready(), quiet():
        call = FlatCall(prepared.model, on_cpu(input_data)).eval()
        _check_choices(names, call)
        if names.inputs is not None and len(names.inputs) != len(call.names):
            raise WrongNamesError(
                f"input_names has {len(names.inputs)} names, {list(names.inputs)}; the input has {len(call.names)} "
                f"tensors: {call.names}."
            )
        for title, attempt_opset, export in _attempts(names.opset, names.exporter):
            try:
                model, calls = export(call, prepared, names, attempt_opset)
                if not call.output_names:  # torch.export takes back what a forward notes
                    call(*call.tensors)
                _check_opset(model, attempt_opset)
                _rename(model, call, names)
                _tidy(model)
                graph = BaseGraph(model, calls, title, attempt_opset, dict(failed), tuple(call.dropped))
                check(graph)
            except WrongNamesError:
                raise
            except Exception as error:  # exporters raise whatever the translated operators raise
                failed[f"{title}, opset {attempt_opset}"] = _first_line(error)
                continue
            return graph
        where = culprits(call, failed.values())
    listed = "\n".join(f"- {attempt}: {message}" for attempt, message in failed.items())
    raise RuntimeError(
        f"{type(prepared.model).__name__} cannot be translated into ONNX, by none of torch's exporters. This is about "
        f"the parts in float, not about its quantized layers.{where}\n{listed}"
    )


def _check_opset(model: ir.Model, opset: int) -> None:
    made = model.opset_imports[""]
    if made != opset:
        raise RuntimeError(f"the exporter made a network of opset {made} instead")


def _check_choices(names: Choices, call: FlatCall) -> None:
    """Refuse what exporters would pass over in silence."""
    _check_unique(input_names=names.inputs, output_names=names.outputs)
    if names.exporter not in (None, *get_args(Exporter)):
        allowed = ", ".join(map(repr, get_args(Exporter)))
        raise WrongNamesError(f"exporter is {names.exporter!r}; it must be {allowed} or None for one after the other.")
    if names.exporter == "torch.export" and names.opset is not None and names.opset < _TORCH_EXPORT_OPSET:
        raise WrongNamesError(
            f"opset is {names.opset}, and torch.export writes {_TORCH_EXPORT_OPSET} and higher ones only. Leave the "
            "exporter to the package, or give another opset."
        )
    ranks = dict(zip(names.inputs or call.names, (tensor.dim() for tensor in call.tensors), strict=False))
    for name, axes in (names.dynamic_axes or {}).items():
        wrong = [axis for axis in axes if name in ranks and not 0 <= axis < ranks[name]]
        if wrong:
            raise WrongNamesError(
                f"dynamic_axes has axis {wrong[0]} of input {name!r}, whose axes are 0 to {ranks[name] - 1}."
            )


def _check_unique(**given: Sequence[str] | None) -> None:
    for argument, names in given.items():
        if isinstance(names, str) or any(not isinstance(name, str) or not name for name in names or ()):
            raise WrongNamesError(f"{argument} is {names!r}; it must be a list of names, which are text.")
        twice = [name for name, count in Counter(names or ()).items() if count > 1]
        if twice:
            raise WrongNamesError(f"{argument} has {twice[0]!r} more than once; give each tensor a name of its own.")


_Exporter = Callable[[FlatCall, Prepared, Choices, int], "tuple[ir.Model, Sequence[LayerCall]]"]


def _attempts(opset: int | None, exporter: Exporter | None) -> Iterator[tuple[str, int, _Exporter]]:
    if exporter != "torch.export":
        for number in _TORCHSCRIPT_OPSETS if opset is None else (opset,):
            yield "TorchScript", number, _by_torchscript
    # torch >= 2.8 has what it takes, and its exporter begins with this opset.
    possible = hasattr(torch.onnx, "ops") and (opset is None or opset >= _TORCH_EXPORT_OPSET)
    if exporter != "torchscript" and possible:
        yield "torch.export", opset or _TORCH_EXPORT_OPSET, _by_torch_export


def _by_torchscript(
    call: FlatCall, prepared: Prepared, names: Choices, opset: int
) -> tuple[ir.Model, Sequence[LayerCall]]:
    static = not names.dynamic_axes
    with placeholders(prepared.layers, symbolic=False, static=static) as calls, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            call,
            tuple(call.tensors),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=list(names.inputs or call.names),
            output_names=None if names.outputs is None else list(names.outputs),
            dynamic_axes=_for_torchscript(names),
        )
        model = ir.from_proto(onnx.load(path))  # read whole, for the folder does not last
    return model, calls


def _for_torchscript(names: Choices) -> dict[str, Any] | None:
    return dict(names.dynamic_axes) if names.dynamic_axes else None


def _by_torch_export(
    call: FlatCall, prepared: Prepared, names: Choices, opset: int
) -> tuple[ir.Model, Sequence[LayerCall]]:
    inputs = list(names.inputs or call.names)
    with placeholders(prepared.layers, symbolic=True) as calls:
        program = torch.onnx.export(
            call,
            tuple(call.tensors),
            dynamo=True,
            opset_version=opset,
            input_names=inputs,
            dynamic_shapes=dynamic_shapes(names.dynamic_axes, inputs),
            verbose=False,
        )
    if program is None:  # pragma: no cover: it is returned where no file is given
        raise RuntimeError("torch.onnx.export returned nothing.")
    return program.model, calls


def _first_line(error: Exception) -> str:
    """Return the line of an exporter's error that says what is the matter."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"


def _rename(model: ir.Model, call: FlatCall, names: Choices) -> None:
    """Name the outputs, and take the name that the model has in a :class:`FlatCall` out of all others."""
    graph = model.graph
    outputs = names.outputs or call.output_names
    if len(outputs) != len(graph.outputs):
        raise WrongNamesError(
            f"output_names has {len(outputs)} names, {list(outputs)}; the model returns {len(graph.outputs)} tensors: "
            f"{call.output_names}."
        )
    unknown = [name for name in names.dynamic_axes or () if name not in (*(names.inputs or call.names), *outputs)]
    if unknown:
        raise WrongNamesError(
            f"dynamic_axes has {unknown[0]!r}; the inputs are {list(names.inputs or call.names)}, the outputs "
            f"{list(outputs)}."
        )
    for node in graph.all_nodes():
        node.name = _without_run(node.name or "")
        for value in node.outputs:
            value.name = _without_run(value.name or "")
    for value in list(graph.initializers.values()):
        value.name = _without_run(value.name or "")
    _separate_outputs(graph)
    taken = {value.name for value in graph.inputs}
    wanted = [f"{name}_output" if name in taken else name for name in outputs]
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in wanted:
                value.name = f"{value.name}.inner"
    for value, name in zip(graph.outputs, wanted, strict=True):
        value.name = name


def _separate_outputs(graph: ir.Graph) -> None:
    """Let each output be a tensor of its own that a node makes: one may be returned twice, or be an input itself."""
    seen: set[ir.Value] = set()
    for place, value in enumerate(list(graph.outputs)):
        if value in seen or value.producer() is None:
            same = ir.Value(name=f"output{place}", shape=value.shape, type=value.type)
            graph.append(ir.Node("", "Identity", [value], outputs=[same], name=f"/Identity_{place}"))
            graph.outputs[place] = same
        seen.add(value)


def _without_run(name: str) -> str:
    return name.removeprefix(_SEEN_AS).replace("/run/", "/", 1)


def _tidy(model: ir.Model) -> None:
    RemoveUnusedNodesPass()(model)
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
