"""Models in every state they can be in go through torch's exporters: in float, frozen, shared, in other dtypes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from amct_lightning import prepare_qat, quantized_layers
from tests.export.plain import Exported, assert_close, assert_equal, onnx_outputs, operators, outputs, quantizers
from tests.operators import Operators


class Attention(nn.Module):
    """Three layers that read one tensor, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x))


class Recurrent(nn.Module):
    """A recurrent layer with or without an initial state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        output, last = self.layer(x, (hx if len(hx) > 1 else hx[0]) if hx else None)
        return output, *(last if isinstance(last, tuple) else (last,))


def made(calibrated: bool = True, batch: int = 2, time: int = 3) -> Exported:
    torch.manual_seed(0)
    x = torch.randn(batch, time, 8)
    model = prepare_qat(Attention(), None, x).train()
    if calibrated:
        model(x)
    return Exported(model.eval(), (x,))


def layers(model: nn.Module) -> list[Any]:
    return list(quantized_layers(model).values())


def assert_exported(exported: Exported) -> None:
    """Eager, the program and both files give the same."""
    assert_equal(outputs(exported.program.module(), *exported.args), exported.eager())
    assert_close(onnx_outputs(exported.onnx, *exported.args), exported.eager())
    assert_close(onnx_outputs(exported.script_onnx, *exported.args), exported.eager())


def test_layers_that_share_a_quantizer_read_one_node() -> None:
    exported = made()
    assert quantizers(exported.program) == (2, 4)
    assert_exported(exported)


def test_a_tensor_that_is_written_to_between_two_readers_is_quantized_again() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.0
            return self.layer(x) + self.layer(x.mul_(0.5))

    x = torch.randn(2, 4)
    model = prepare_qat(Written(), None, x, allow_reuse=True).train()
    model(x)
    exported = Exported(model.eval(), (x,))
    assert quantizers(exported.program) == (2, 1)
    assert_equal(outputs(exported.program.module(), x), exported.eager())


def test_an_export_of_tensors_that_are_fake_already_begins_anew() -> None:
    """What was found out about such a tensor in the export before belongs to another graph."""
    model = made().model
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 8)
        programs = [torch.export.export(model, (x,)) for _ in range(2)]
    assert [quantizers(program) for program in programs] == [(2, 4)] * 2


def test_a_tensor_that_the_model_keeps_stays_as_it_is() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.table = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.table) + self.second(self.table) + x

    x = torch.randn(2, 4)
    model = prepare_qat(Table(), None, x).train()
    model(x)
    model.eval()
    for _ in range(2):
        assert_equal(outputs(torch.export.export(model, (x,)).module(), x), outputs(model, x))
        assert_equal(outputs(copy.deepcopy(model), x), outputs(model, x))


def test_batch_and_sequence_may_be_dynamic() -> None:
    exported, other = made(), torch.randn(5, 7, 8)
    exported.options = {"dynamic_shapes": ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)}
    assert_equal(outputs(exported.program.module(), other), exported.eager(other))
    assert_close(onnx_outputs(exported.onnx, other), exported.eager(other))


def test_programs_can_be_unflattened_and_compiled() -> None:
    exported = made()
    assert_equal(outputs(torch.export.unflatten(exported.program), *exported.args), exported.eager())
    compiled = torch.compile(exported.program.module(), backend="aot_eager", fullgraph=True)
    assert_close(outputs(compiled, *exported.args), exported.eager())


def test_a_program_passes_gradients_straight_through() -> None:
    exported = made()
    x = exported.args[0].clone().requires_grad_()
    grads = []
    for model in (exported.model, exported.program.module()):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x)
        grads.append(grad)
    assert grads[0].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("strict", [False, True])
def test_outside_of_an_export_nothing_calls_the_operators(strict: bool) -> None:
    exported = made()
    torch.export.export(exported.model, exported.args, strict=strict)
    for training in (True, False):
        with Operators() as counted:
            exported.model.train(training)(*exported.args)
        assert not any(name.startswith("amct_lightning") for name in counted.counts)


def test_a_model_in_training_mode_is_exported_without_training_it() -> None:
    exported = made()
    expected, state = exported.eager(), copy.deepcopy(exported.model.state_dict())
    program = torch.export.export(exported.model.train(), exported.args)
    assert quantizers(program) == (2, 4)
    assert all(torch.equal(value, state[key]) for key, value in exported.model.state_dict().items())
    assert_equal(outputs(program.module(), *exported.args), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "trace",
    [
        lambda model, args: torch.jit.trace(model, args, check_trace=False),  # the check runs the model once more
        lambda model, args: torch.export.export(model, args).module(),
    ],
    ids=["trace", "export"],
)
def test_a_model_that_is_to_be_calibrated_is_not_calibrated_by_an_export(trace: Any) -> None:
    exported = made(calibrated=False)
    expected = exported.eager()
    graph = trace(exported.model.train(), exported.args)
    assert all(layer.input_quantizer.batches == 0 for layer in layers(exported.model))
    assert_equal(outputs(graph, *exported.args), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_before_the_calibration_it_is_exported_in_float(strict: bool) -> None:
    exported = made(calibrated=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.export.export(exported.model, exported.args, strict=strict)
    assert strict or any("before its activation quantizers are calibrated" in str(one.message) for one in caught)
    assert quantizers(program) == (0, 0)
    assert {str(target) for target in operators(program)} & {"aten.linear.default", "aten.matmul.default"}
    with pytest.warns(UserWarning, match="run in float"):
        expected = exported.eager()
    assert_equal(outputs(program.module(), *exported.args), expected)


@pytest.mark.filterwarnings("ignore")
def test_onnx_files_of_it_are_in_float() -> None:
    assert_exported(made(calibrated=False))


def test_an_average_of_weights_is_exported_quantized_once_it_was_evaluated() -> None:
    exported = made(calibrated=False)
    average = AveragedModel(exported.model, use_buffers=True).eval()
    exported.model.train()(*exported.args)
    average.update_parameters(exported.model)
    with pytest.warns(UserWarning, match="A copy of a model is exported that knows of no calibration"):
        assert quantizers(torch.export.export(average, exported.args)) == (0, 0)
    average(*exported.args)
    assert quantizers(torch.export.export(average, exported.args)) == (2, 4)


@pytest.mark.parametrize("mode", ["float", "observe"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_layers_that_run_in_float_are_single_nodes(mode: str, calibrated: bool) -> None:
    exported = made(calibrated)
    for layer in layers(exported.model):
        layer.quant_mode = mode
    assert operators(exported.program)[torch.ops.aten.linear.default] == 4
    assert sum(operators(exported.program).values()) == 8
    assert_equal(outputs(exported.program.module(), *exported.args), exported.eager())


def test_frozen_factors_are_exported_and_not_what_was_written_since() -> None:
    exported = made()
    for layer in layers(exported.model):
        layer.input_quantizer.freeze()
        layer.weight_quantizer.freeze(layer.weight)
    with torch.no_grad():
        exported.model.q.input_quantizer.clip_max.fill_(0.1)
        exported.model.q.weight.mul_(1.7)
    assert_exported(exported)


@pytest.mark.parametrize("clip", ["clip_max", "clip_min"])
def test_unusable_clips_are_repaired_in_the_graph(clip: str) -> None:
    exported = made()
    with torch.no_grad():
        getattr(exported.model.q.input_quantizer, clip).neg_()
    assert_exported(exported)


def test_inputs_that_need_gradients_and_frozen_weights_add_no_node() -> None:
    exported = made()
    for layer in layers(exported.model):
        layer.weight.requires_grad_(False)
    program = torch.export.export(exported.model, (exported.args[0].requires_grad_(),))
    assert sum(operators(program).values()) == sum(operators(made().program).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_of_other_dtypes_the_program_gives_the_same_bits(dtype: torch.dtype) -> None:
    exported = made()
    exported.model.to(dtype)
    exported.args = (exported.args[0].to(dtype),)
    assert quantizers(exported.program) == (2, 4)
    assert_equal(outputs(exported.program.module(), *exported.args), exported.eager())


def test_in_autocast_the_program_gives_the_same_bits() -> None:
    exported = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(outputs(exported.program.module(), *exported.args), exported.eager())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_give_their_states_as_well(kind: type[nn.RNNBase], given: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    args = (torch.randn(2, 2, 3),) + ((torch.randn(1, 2, 4),) * (1 + (kind is nn.LSTM)) if given else ())
    model = prepare_qat(Recurrent(kind(3, 4, batch_first=batch_first)), None, args).train()
    model(*args)
    exported = Exported(model.eval(), args)
    assert quantizers(exported.program) == (3, 2)
    assert_equal(outputs(exported.program.module(), *args), exported.eager())
    assert_close(onnx_outputs(exported.script_onnx, *args), exported.eager())


def test_the_call_of_a_user_makes_a_file_that_runs(tmp_path: Path) -> None:
    exported = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(exported.model, exported.args, tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert_close(onnx_outputs((tmp_path / "model.onnx").read_bytes(), *exported.args), exported.eager())
