"""Telling from the nodes of a network which form it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from onnx import NodeProto

from amct_lightning.export.write import VENDOR_OPERATORS


def form_of(nodes: Iterable[NodeProto]) -> Literal["deploy", "fake_quant", "qdq"] | None:
    """Return the form of a network, ``None`` if it has no quantized layer.

    Args:
        nodes: Its nodes.

    Example:
        >>> from onnx import helper
        >>> form_of([helper.make_node("QuantizeLinear", ["x", "s"], ["q"])])
        'qdq'
    """
    found = list(nodes)
    operators = {node.op_type for node in found}
    if operators & VENDOR_OPERATORS:
        return "deploy"
    if "QuantizeLinear" in operators:
        return "qdq"
    return "fake_quant" if any(".fakequant." in node.name for node in found) else None
