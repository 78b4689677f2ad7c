"""The names of axes of any length: those of the inputs that they follow; torch makes up others for each operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

from amct_lightning.export.forms import write_form
from amct_lightning.export.forms.versions import weights_taken_out
from amct_lightning.export.tracing.base_graph import BaseGraph
from amct_lightning.export.tracing.prepared import Prepared


def name_axes(base: BaseGraph, prepared: Prepared, dynamic_axes: Mapping[str, Any] | None) -> None:
    """Give the axes of outputs the names and lengths that follow from the inputs, and no others made-up names.

    Args:
        base: The graph, which is changed.
        prepared: The model that it was made from.
        dynamic_axes: The user's choice; names for axes of outputs in it are kept.
    """
    if not dynamic_axes:
        return
    graph = base.model.graph
    chosen = {axis for value in graph.inputs for axis in map(_text, value.shape or ()) if axis is not None}
    inferred = _inferred(write_form(base, prepared, "qdq"))
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_kept(axis, chosen) for axis in value.shape])
    for value, shape in zip(graph.outputs, inferred, strict=True):
        found = value.shape if shape is None else shape
        if found is None:
            continue
        axes = dynamic_axes.get(str(value.name), {})
        own = dict(axes) if isinstance(axes, Mapping) else {}
        value.shape = ir.Shape([str(own[at]) if at in own else _kept(one, chosen) for at, one in enumerate(found)])


def _inferred(model: ir.Model) -> list[list[int | str | None] | None]:
    """Return the shapes of outputs as they follow from those of the inputs; ``None`` where the rank does not."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    weights_taken_out(model)
    # Only what is known by its operators alone; values of shapes are followed through the graph.
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
    found: list[list[int | str | None] | None] = []
    for output in proto.graph.output:
        kind = output.type.tensor_type
        axes = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim]
        found.append(axes if kind.HasField("shape") else None)
    return found


def _kept(axis: Any, chosen: set[str]) -> int | str | None:
    text = _text(axis)
    return axis if isinstance(axis, int) else text if text in chosen else None


def _text(axis: Any) -> str | None:
    return axis if isinstance(axis, str) else getattr(axis, "value", None)
