"""Inputs, outputs and calls that are not the usual ones: every form computes what the model does all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import ExportReport, calibrate, export_onnx, prepare_qat, verify_export
from amct_lightning.export.verify import VerifyReport

FORMS = ("deploy", "fake_quant", "qdq")


class Net(nn.Module):
    """Two layers with weights of their own, and a forward that is given."""

    def __init__(
        self, run: Callable[..., Any], first: nn.Module | None = None, second: nn.Module | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.first, self.second = run, first or nn.Linear(4, 4), second or nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class TwoInputs(nn.Module):
    """Which takes an input that it does not need, and one of which only it can tell which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, unused: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return self.first(left) - 2 * self.second(right)


def exported(
    folder: Path, model: nn.Module, x: Any, batches: list[Any] | None = None, **options: Any
) -> tuple[dict[str, ExportReport], VerifyReport]:
    """Export in all forms and verify."""
    model = prepare_qat(model, None, x, allow_reuse=True)
    calibrate(model, [x])
    reports = {
        form: export_onnx(model.eval(), folder / f"{form}.onnx", x, form, **options)  # type: ignore[arg-type]
        for form in FORMS
    }
    return reports, verify_export(model, {form: one.path for form, one in reports.items()}, batches or [x])


@pytest.mark.parametrize(
    ("run", "outputs"),
    [
        (lambda net, x: (net.first(x),) * 2, ["output_0", "output_1"]),
        (lambda net, x: {"a": (y := net.first(x).relu()), "b": y, "c": net.second(y)}, ["a", "b", "c"]),
        (lambda net, x: {"x": x, "y": net.first(x), "again": x}, ["x_output", "y", "again"]),
        (lambda net, x: (y := net.first(x), y.view(-1), y.detach()), ["output_0", "output_1", "output_2"]),
        (lambda net, x: (net.first(x), net.second.bias, torch.ones(3)), ["output_0", "output_1", "output_2"]),
        (lambda net, x: (net.first(x), [x + 1, {"s": x.sum()}]), ["output_0", "output_1_0", "output_1_1_s"]),
        (lambda net, x: (net.first(x), x.amax() > 0), ["output_0", "output_1"]),
    ],
    ids=["one_twice", "one_twice_read_on", "inputs", "views", "parameters", "nested", "truth_value"],
)
def test_outputs_have_names_of_their_own(tmp_path: Path, run: Any, outputs: list[str]) -> None:
    reports, verified = exported(tmp_path, Net(run), torch.randn(2, 4))
    assert verified.ok, verified
    for form, report in reports.items():
        assert list(report.outputs) == outputs
        assert [value.name for value in onnx.load(tmp_path / f"{form}.onnx").graph.output] == outputs


def test_names_that_are_given_twice_are_refused(tmp_path: Path) -> None:
    model, x = prepare_qat(Net(lambda net, x: (net.first(x), net.second(x))), None, torch.ones(2, 4)), torch.ones(2, 4)
    calibrate(model, [x])
    with pytest.raises(ValueError, match="output_names has 'y' more than once"):
        export_onnx(model.eval(), tmp_path / "net.onnx", x, output_names=["y", "y"])


def test_an_output_may_be_called_as_a_tensor_within_the_network(tmp_path: Path) -> None:
    net = Net(lambda net, x: net.second(net.first(x) + 1))
    _, verified = exported(tmp_path, net, torch.randn(2, 4), output_names=["/Add_output_0"])
    assert verified.ok, verified


def test_a_model_may_write_into_its_input(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    before = x.clone()
    model = prepare_qat(Net(lambda net, x: net.first(x) + net.second(x.mul_(0.5))), None, x)
    calibrate(model, [before.clone()])
    files = {form: tmp_path / f"{form}.onnx" for form in FORMS}
    for form, file in files.items():
        assert export_onnx(model.eval(), file, x, form).failed == {}  # type: ignore[arg-type]
    verified = verify_export(model, files, [x])
    assert verified.ok, verified
    assert torch.equal(x, before)


def test_a_layer_may_be_called_on_inputs_of_several_ranks(tmp_path: Path) -> None:
    net = Net(lambda net, x: net.first(x).sum() + net.first(x[:, 0]).sum(0) + net.first(x[0, 0]))
    _, verified = exported(tmp_path, net, torch.randn(2, 3, 4))
    assert verified.ok, verified


def test_a_linear_layer_without_a_batch(tmp_path: Path) -> None:
    reports, verified = exported(tmp_path, Net(lambda net, x: net.second(net.first(x).relu())), torch.randn(4))
    assert verified.ok, verified
    assert reports["deploy"].outputs == {"output": (4,)}


def test_a_transposed_convolution_with_an_output_size(tmp_path: Path) -> None:
    net = Net(
        lambda net, x: net.second(net.first(x, output_size=[12])),
        nn.ConvTranspose1d(4, 6, 3, stride=2),
        nn.Conv1d(6, 2, 4, padding="same"),
    )
    reports, verified = exported(tmp_path, net, torch.randn(2, 4, 5))
    assert verified.ok, verified
    assert reports["deploy"].outputs == {"output": (2, 2, 12)}


def test_inputs_that_are_not_needed_are_left_out_in_the_opset_of_others(tmp_path: Path) -> None:
    x = (torch.randn(3), torch.randn(2, 4), torch.randn(2, 4))
    reports, verified = exported(tmp_path, TwoInputs(), x)
    assert verified.ok, verified
    assert reports["deploy"].opset == 11
    assert list(reports["deploy"].inputs) == ["left", "right"]


@pytest.mark.parametrize("order", [("right", "unused", "left"), ("left", "right", "unused"), None])
def test_batches_are_matched_by_the_names_of_arguments(tmp_path: Path, order: tuple[str, ...] | None) -> None:
    x = {"right": 3 * torch.randn(2, 4), "left": torch.randn(2, 4), "unused": torch.ones(1)}
    batch: Any = (x["unused"], x["left"], x["right"]) if order is None else {name: x[name] for name in order}
    _, verified = exported(tmp_path, TwoInputs(), x, [batch])
    assert verified.ok, verified


@pytest.mark.parametrize("exporter", ["torchscript", "torch.export"])
def test_axes_of_outputs_are_called_as_those_of_the_inputs_that_they_follow(tmp_path: Path, exporter: Any) -> None:
    net = Net(lambda net, x: (*net.first(x), net.second(x), x.flatten()), nn.LSTM(4, 6, batch_first=True))
    options = {"dynamic_axes": {"x": {0: "batch"}}, "exporter": exporter}
    reports, verified = exported(tmp_path, net, torch.randn(3, 5, 4), [torch.randn(2, 5, 4)], **options)
    assert verified.ok, verified
    for form, report in reports.items():
        assert list(report.outputs.values()) == [
            ("batch", 5, 6),
            (1, "batch", 6),
            (1, "batch", 6),
            ("batch", 5, 4),
            ("?",),
        ]
        graph = onnx.load(tmp_path / f"{form}.onnx").graph
        axes = [axis for value in (*graph.output, *graph.value_info) for axis in value.type.tensor_type.shape.dim]
        assert {axis.dim_param for axis in axes} <= {"batch", ""}


def test_names_that_are_given_for_axes_of_outputs_are_kept(tmp_path: Path) -> None:
    net = Net(lambda net, x: net.second(x).flatten())
    axes = {"x": {0: "batch"}, "output": {0: "all"}}
    reports, _ = exported(tmp_path, net, torch.randn(3, 4), [torch.randn(2, 4)], dynamic_axes=axes)
    assert [report.outputs for report in reports.values()] == [{"output": ("all",)}] * 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"dynamic_axes": {"y": {0: "batch"}}},
            r"dynamic_axes has 'y'; the inputs are \['x'\], the outputs \['output'\]",
        ),
        ({"dynamic_axes": {"x": [2]}}, "axis 2 of input 'x', whose axes are 0 to 1"),
        ({"dynamic_axes": {"x": {-1: "batch"}}}, "axis -1 of input 'x'"),
        ({"input_names": "x"}, "input_names is 'x'; it must be a list of names"),
        ({"output_names": [""]}, r"output_names is \[''\]"),
        ({"exporter": "dynamo"}, "exporter is 'dynamo'; it must be 'torchscript', 'torch.export' or None"),
        ({"exporter": "torch.export", "opset": 11}, "opset is 11, and torch.export writes 18"),
    ],
)
def test_choices_that_would_be_passed_over_are_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        exported(tmp_path, Net(lambda net, x: net.first(x)), torch.ones(2, 4), **options)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_the_exporter_does_not_write_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.export, opset 99"):
        exported(tmp_path, Net(lambda net, x: net.first(x)), torch.ones(2, 4), opset=99, exporter="torch.export")


def test_files_are_found_where_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    x = torch.randn(2, 4)
    model = prepare_qat(Net(lambda net, x: net.first(x)), None, x)
    calibrate(model, [x])
    for path in ("~/net.onnx", f"file://{tmp_path}/net.onnx"):
        export_onnx(model.eval(), path, x)
        assert verify_export(model, {"qdq": path}, [x]).ok
    with pytest.raises(ValueError, match=r"'memory://net\.onnx' is on a remote file system\. Copy the file"):
        verify_export(model, {"qdq": "memory://net.onnx"}, [x])
