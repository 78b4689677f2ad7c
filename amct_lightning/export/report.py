"""What an export tells its user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ExportReport:
    """A network that was written.

    Attributes:
        path: The file.
        form: ``deploy``, ``fake_quant`` or ``qdq``.
        opset: ONNX opset of the file: the lowest that can express the model in this form.
        exporter: Which of torch's exporters translated the parts in float.
        layers: The number of quantized layers.
        inputs: Name -> shape of each input; axes of any length have a name.
        outputs: The same for the outputs.
        failed: What was tried before: exporter and opset -> error.
        dropped: What the model returns besides tensors, which the network does not.

    Example:
        >>> print(ExportReport("net.onnx", "qdq", 13, "TorchScript", 2, {"x": (1, 4)}, {"output": (1, 2)}, {}, ()))
        net.onnx: qdq, opset 13 (TorchScript exporter), 2 quantized layers, input x 1x4, output output 1x2.
    """

    path: str
    form: str
    opset: int
    exporter: str
    layers: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    failed: Mapping[str, str]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        """Tell it in a line, and what did not work before in one each."""
        lines = [
            f"{self.path}: {self.form}, opset {self.opset} ({self.exporter} exporter), {self.layers} quantized layers, "
            f"input {_sizes(self.inputs)}, output {_sizes(self.outputs)}."
        ]
        lines += [f"  not possible with {attempt}: {error}" for attempt, error in self.failed.items()]
        if self.dropped:
            lines.append(f"  the network returns tensors only, not {', '.join(self.dropped)}")
        return "\n".join(lines)


def _sizes(values: Mapping[str, tuple[int | str, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in values.items())
