"""The forms of an exported network: each is a rewrite of the one graph by a table of handlers, one per layer type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import onnx_ir as ir
from torch import nn

from amct_lightning.export.forms.deploy import deploy_layer
from amct_lightning.export.forms.editing import Editor, Site
from amct_lightning.export.forms.fake_quant import fake_quant_layer
from amct_lightning.export.forms.qdq import lowest_opset, qdq_layer
from amct_lightning.export.forms.recurrent import deploy_recurrent, fake_quant_recurrent, qdq_recurrent
from amct_lightning.export.forms.versions import at_least
from amct_lightning.export.tracing.base_graph import BaseGraph
from amct_lightning.export.tracing.placeholder import DOMAIN
from amct_lightning.export.tracing.prepared import Prepared
from amct_lightning.layer_types import LAYER_TYPES, supported_class

Form = Literal["qdq", "deploy", "fake_quant"]

Handler = Callable[[Site], "list[ir.Value]"]
"""Writes a call of a layer into the graph and returns its outputs."""


def _table(layer: Handler, recurrent: Handler) -> Mapping[type[nn.Module], Handler]:
    return {kind: recurrent if facts.gates else layer for kind, facts in LAYER_TYPES.items()}


FORMS: Mapping[Form, Mapping[type[nn.Module], Handler]] = {
    "deploy": _table(deploy_layer, deploy_recurrent),
    "fake_quant": _table(fake_quant_layer, fake_quant_recurrent),
    "qdq": _table(qdq_layer, qdq_recurrent),
}
"""What each form makes of each layer type."""


def write_form(base: BaseGraph, prepared: Prepared, form: Form) -> ir.Model:
    """Make one form of the graph.

    Args:
        base: The graph; it is not changed.
        prepared: The model that it was made from.
        form: Which form.

    Returns:
        The file's content.
    """
    types = {word for layer in prepared.record.values() for word in (layer.act_type, layer.wts_type)}
    model = at_least(base.model, lowest_opset(types) if form == "qdq" else 0)
    edit, calls = Editor(model, model.graph[0], model.opset_imports[""]), Counter[str]()
    for node in list(model.graph.all_nodes()):
        if node.domain != DOMAIN:
            continue
        call = base.calls[node.attributes["call"].as_int()]
        number = calls[call.name]
        calls[call.name] += 1
        edit.at = node
        inputs = tuple(value for value in node.inputs if value is not None)
        site = Site(call, prepared.numbers(call), f"{call.name}.call{number}" if number else call.name, inputs, edit)
        _replace(node, FORMS[form][supported_class(call.layer)](site))
    model.opset_imports.pop(DOMAIN, None)
    return model


def _replace(node: ir.Node, outputs: list[ir.Value]) -> None:
    """Let whatever reads a node read others, which keep its place among the outputs of the graph."""
    graph = node.graph
    assert graph is not None
    for old, new in zip(node.outputs, outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if new.is_graph_output():
            old.name = None
            new.name = name
    graph.remove(node, safe=True)
