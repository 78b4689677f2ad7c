"""What torch's own exporters make of a model, without any help of the package."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram


@dataclass(eq=False)
class Exported:
    """A converted model in evaluation mode and what became of it; everything is made once, when it is asked for."""

    model: nn.Module
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def eager(self, *args: Tensor) -> list[Tensor]:
        return outputs(self.model, *(args or self.args))

    @cached_property
    def program(self) -> ExportedProgram:
        return torch.export.export(self.model, self.args, **self.options)

    @cached_property
    def onnx(self) -> bytes:
        """Made of the program, as torch does it itself where it is given a model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(self.program, dynamo=True, verbose=False)
        return program.model_proto.SerializeToString()

    @cached_property
    def script_onnx(self) -> bytes:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(self.model, self.args, file, dynamo=False)
        return file.getvalue()


@torch.no_grad()
def outputs(model: Any, *args: Tensor) -> list[Tensor]:
    output = model(*args)
    return list(output) if isinstance(output, (tuple, list)) else [output]


def onnx_outputs(file: bytes, *args: Tensor) -> list[Tensor]:
    """Run a file in onnxruntime."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feed = {node.name: arg.numpy() for node, arg in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def operators(program: ExportedProgram) -> Counter[Any]:
    """Count the operators of a program; what only asserts the kind of a tensor is none."""
    nodes = (node.target for node in program.graph.nodes if node.op == "call_function")
    return Counter(target for target in nodes if "_assert_tensor_metadata" not in str(target))


def quantizers(program: ExportedProgram) -> tuple[int, int]:
    """Count the nodes that quantize activations, and those that quantize weights."""
    counts, names = operators(program), torch.ops.amct_lightning
    return counts[names.fake_quantize_activation.default], counts[names.fake_quantize_weight.default]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    """Compare in units of the largest value; the runtimes add up in another order."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))
