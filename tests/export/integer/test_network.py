"""The deployed network against the recorded exports, and what a user gets who gives something else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from amct_lightning.export.integer import DeployedNetwork, LayerTrace, run_deployed
from tests.export.golden_files import EXPORTED, FEED_FORWARD, RECURRENT, golden_case, golden_inputs, golden_model
from tests.export.integer.networks import dequant, network, one_layer, parameter, quant

TOLERANCE = 1e-5  # of the range of the output


def fake_quant_output(case: str) -> np.ndarray:
    model = golden_model(case, "fake_quant")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, golden_inputs(case, model))[0]


class TestRecordedExports:
    @pytest.mark.parametrize("case", FEED_FORWARD)
    def test_equal_the_fake_quant_model_in_onnxruntime(self, case: str) -> None:
        model, expected = golden_model(case, "deploy"), fake_quant_output(case)
        network = DeployedNetwork(model, deq_bits=32)
        (found,) = network.run(golden_inputs(case, model)).values()
        assert np.abs(found - expected).max() <= TOLERANCE * np.ptp(expected)
        assert network.overflows == {}

    @pytest.mark.parametrize("case", FEED_FORWARD)
    def test_are_near_what_amct_evaluates_also_with_the_19_bits_of_the_device(self, case: str) -> None:
        """The largest difference is that of 4-bit activations, of which one step is a large part of the range."""
        model, expected = golden_model(case, "deploy"), golden_case(case).tensors["eval_out"].numpy()
        (found,) = run_deployed(model, golden_inputs(case, model)).values()
        assert np.abs(found - expected).max() <= 0.03 * np.ptp(expected)

    @pytest.mark.parametrize("case", RECURRENT)
    def test_with_recurrent_layers_equal_the_recurrence_written_down(self, case: str) -> None:
        """The fake-quant model quantizes the hidden state before the first step only, so it is no reference here."""
        model = golden_model(case, "deploy")
        traces: dict[str, LayerTrace] = {}
        network = DeployedNetwork(model, deq_bits=32)
        network.run(golden_inputs(case, model), lambda trace: traces.update({trace.name: trace}))
        expected, hidden_codes = recurrence(case, model)
        assert np.array_equal(traces["rnn"].hidden_codes.numpy(), hidden_codes)
        assert np.abs(traces["rnn"].output.numpy() - expected).max() <= 1e-6

    @pytest.mark.parametrize("case", EXPORTED)
    def test_show_what_every_layer_computed(self, case: str) -> None:
        model = golden_model(case, "deploy")
        traces: list[LayerTrace] = []
        DeployedNetwork(model).run(golden_inputs(case, model), traces.append)
        layers = [node.name.removesuffix(".dequant") for node in model.graph.node if node.op_type == "AscendDequant"]
        assert sorted(trace.name for trace in traces) == sorted({*layers, *(["rnn"] if case in RECURRENT else [])})
        assert all(trace.codes.dtype == trace.sums.dtype == torch.int32 for trace in traces)


def recurrence(case: str, model: ModelProto) -> tuple[np.ndarray, np.ndarray]:
    """The outputs and the codes of the hidden state, from the integers of the file, in NumPy."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.name == "rnn")
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    half = 2 ** (15 if attributes["quant_dtype"] == 6 else 7)
    lstm = "LSTM" in node.op_type
    w, r, b, parameters = (arrays[node.input[i]] for i in ((1, 2, 5, 8) if lstm else (1, 2, 4, 7)))
    given = list(golden_inputs(case, model).values())
    x, h = given[0].transpose(1, 0, 2), given[1][0]
    c = given[2][0] if lstm else np.zeros_like(h)
    scales = parameters.astype(np.uint32).view(np.float32).reshape(2, -1)

    def sums(values: np.ndarray, which: str, weight: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        scale, offset = np.float32(attributes[f"quant_scale_{which}"]), attributes[f"quant_offset_{which}"]
        codes = np.clip(np.rint(values * scale) + offset, -half, half - 1).astype(np.int64)
        total = (codes - int(offset)) @ weight[0].T.astype(np.int64) + b.reshape(2, -1)[side]
        return total.astype(np.float32) * scales[side], codes

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return (1 / (1 + np.exp(-v.astype(np.float64)))).astype(np.float32)

    outputs, hidden = [], []
    for step in x:
        gx, _ = sums(step, "x", w, 0)
        gh, codes = sums(h, "h", r, 1)
        hidden.append(codes)
        old = (codes - attributes["quant_offset_h"]) / np.float32(attributes["quant_scale_h"])
        if lstm:
            i, o, f, g = np.split(gx + gh, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (z, r_, n), (zh, rh, nh) = np.split(gx, 3, -1), np.split(gh, 3, -1)
            z = sigmoid(z + zh)
            h = ((1 - z) * np.tanh(n + sigmoid(r_ + rh) * nh) + z * old).astype(np.float32)
        outputs.append(h)
    return np.stack(outputs), np.stack(hidden)


class TestLayer:
    def test_pads_with_the_real_value_0_and_not_with_the_code_0(self) -> None:
        model = one_layer("Conv", np.ones((1, 1, 3), np.int8), [1, 1, 3], quantizer={"offset": 100.0}, pads=[1, 1])
        (found,) = run_deployed(model, {"x": np.array([[[1, 2, 3]]], np.float32)}).values()
        assert found.tolist() == [[[3.0, 6.0, 5.0]]]

    def test_sums_wrap_around_and_are_counted(self) -> None:
        """65535 * 127 * 300 is more than int32 holds."""
        model = one_layer(
            "MatMul", np.full((300, 1), 127, np.int8), ["n", 300], quantizer={"offset": -32768.0, "bits": "INT16"}
        )
        network = DeployedNetwork(model)
        (found,) = network.run({"x": np.stack([np.full(300, 1e6), np.ones(300)]).astype(np.float32)}).values()
        exact = 65535 * 127 * 300
        assert found.ravel().tolist() == [np.float32(exact - 2**32), np.float32(127 * 300)]
        assert network.overflows == {"layer": 1}
        network.run({"x": np.zeros((1, 300), np.float32)})
        assert network.overflows == {}

    @pytest.mark.parametrize(
        ("kind", "packed", "shape", "attributes"),
        [
            ("Conv", (3, 2, 1), [1, 4, 5], {}),
            ("ConvTranspose", (2, 3, 1), [1, 4, 5], {}),
            ("MatMul", (2, 3), [1, 4], {}),
            ("Gemm", (2, 3), [1, 4], {"transB": 0}),
            ("Gemm", (3, 2), [1, 4], {"transB": 1}),
        ],
    )
    def test_unpacks_int4_weights_where_its_input_has_twice_the_channels(
        self, kind: str, packed: tuple[int, ...], shape: list[int], attributes: dict[str, Any]
    ) -> None:
        """All weights are -3 and 5 in turn, along the input channels."""
        weight = np.full(packed, -3 & 15 | 5 << 4, np.uint8).view(np.int8)
        model = one_layer(kind, weight, shape, **attributes)
        x = np.zeros(shape, np.float32)
        x[0, 1], x[0, 2] = 1.0, 10.0
        (found,) = run_deployed(model, {"x": x}).values()
        assert set(found.ravel().tolist()) == {5.0 - 30.0}

    @pytest.mark.parametrize("cast", [False, True], ids=["int32", "through_cast"])
    def test_adds_the_bias_to_its_sums(self, cast: bool) -> None:
        model = one_layer("Gemm", np.ones((2, 2), np.int8), [1, 2], np.array([7, -9], np.int32), 0.5, transB=0)
        if cast:
            model.graph.node[1].input[2] = "b.float"
            model.graph.node.insert(0, helper.make_node("Cast", ["b"], ["b.float"], "layer.bias_quant", to=1))
        (found,) = run_deployed(model, {"x": np.array([[1, 2]], np.float32)}).values()
        assert found.tolist() == [[5.0, -3.0]]

    def test_adds_a_bias_that_stands_in_a_node_of_its_own_before_the_dequantization(self) -> None:
        layer = helper.make_node("MatMul", ["layer.quant.out", "w"], ["sums"], "layer")
        arrays = {
            "w": np.ones((2, 2), np.int8),
            "b": np.array([7, -9], np.int32),
            "layer.dequant.param": parameter([0.5, 2.0]),
        }
        nodes = [quant("x"), layer, helper.make_node("Add", ["sums", "b"], ["more"], "add"), dequant("more")]
        (found,) = run_deployed(network(nodes, arrays, x=[1, 2]), {"x": np.array([[1, 2]], np.float32)}).values()
        assert found.tolist() == [[5.0, -12.0]]

    def test_puts_out_float16_if_asked_to(self) -> None:
        model = one_layer("MatMul", np.full((1, 1), 127, np.int8), [1, 1], scale=0.1)
        x = {"x": np.array([[127]], np.float32)}
        exact = run_deployed(model, x, deq_bits=32)["y"].item()
        assert exact == np.float32(127 * 127) * np.float32(0.1)
        rounded = run_deployed(model, x, deq_bits=32, output_dtype="float16")["y"].item()
        assert rounded == float(np.float16(exact)) != exact

    def test_one_quantizer_may_feed_several_layers(self) -> None:
        model = golden_model("res_down__default", "deploy")
        shared = [node for node in model.graph.node if "block.down.0.quant.output0" in node.input]
        assert [node.name for node in shared] == ["block.down.0", "block.conv1"]
        traces: dict[str, LayerTrace] = {}
        DeployedNetwork(model).run(
            golden_inputs("res_down__default", model), lambda trace: traces.update({trace.name: trace})
        )
        assert torch.equal(traces["block.down.0"].codes, traces["block.conv1"].codes)


class TestFloatOperators:
    def test_results_do_not_depend_on_where_the_graph_is_cut(self) -> None:
        """The sum of a branch with a quantized layer and one without; constants are shared by both sides."""
        layer = helper.make_node("MatMul", ["layer.quant.out", "w"], ["sums"], "layer")
        nodes = [
            helper.make_node("Mul", ["x", "k"], ["scaled"], "before"),
            quant("scaled"),
            layer,
            dequant("sums", "d"),
            helper.make_node("Add", ["d", "scaled"], ["sum"], "residual"),
            helper.make_node("Mul", ["sum", "k"], ["y"], "after"),
        ]
        arrays = {
            "w": np.eye(2, dtype=np.int8),
            "k": np.array(3.0, np.float32),
            "layer.dequant.param": parameter(1.0),
        }
        (found,) = run_deployed(network(nodes, arrays, x=["n", 2]), {"x": np.ones((1, 2), np.float32)}).values()
        assert found.tolist() == [[18.0, 18.0]]


def broken(change: Callable[[ModelProto], None]) -> ModelProto:
    model = one_layer("MatMul", np.ones((2, 2), np.int8), [1, 2])
    change(model)
    return model


def insert(place: int, node: onnx.NodeProto) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        following = model.graph.node[place]
        node.input[0], node.output[0] = following.input[0], "inserted"
        following.input[0] = "inserted"
        model.graph.node.insert(place, node)

    return change


class TestErrors:
    def test_of_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no ONNX file '.*net\.onnx'.*export_onnx"):
            DeployedNetwork(tmp_path / "net.onnx")

    @pytest.mark.parametrize("content", [b"", b"no model at all", b"\x00" * 50])
    def test_of_another_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "net.onnx"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.onnx'.*ONNX file"):
            DeployedNetwork(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                insert(1, helper.make_node("Relu", [""], [""], "odd")),
                r"'odd' \(Relu\).*reads the codes of 'layer\.quant'",
            ),
            (insert(2, helper.make_node("Relu", [""], [""], "odd")), r"'odd' \(Relu\).*reads the sums of 'layer'"),
            (
                insert(0, helper.make_node("AscendAntiQuant", [""], [""], "odd")),
                r"'odd' \(AscendAntiQuant\).*no layer in integers.*It knows AscendQuant",
            ),
            (lambda m: m.graph.node[0].attribute[-1].CopyFrom(helper.make_attribute("dst_type", "INT2")), "INT2"),
            (lambda m: m.graph.initializer.pop(0), r"its weight 'w' is not constant"),
            (
                lambda m: m.graph.initializer[1].CopyFrom(
                    numpy_helper.from_array(parameter([1, 1, 1]), "layer.dequant.param")
                ),
                r"'layer\.dequant'.*3 scales for 2 output channels",
            ),
            (
                lambda m: m.graph.initializer[0].CopyFrom(
                    numpy_helper.from_array(np.full((2, 2), 0.5, np.float32), "w")
                ),
                r"'w' holds float32 numbers that are no integers",
            ),
        ],
        ids=["codes", "sums", "vendor", "type", "weight", "parameters", "float"],
    )
    def test_of_a_node_that_is_not_known(self, change: Callable[[ModelProto], None], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DeployedNetwork(broken(change))

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, r"has the inputs 'x'; given were none"),
            ({"a": np.ones((1, 2), np.float32)}, r"has the inputs 'x'; given were 'a'"),
            ({"x": np.ones((3, 2), np.float32)}, r"'x' .*shape \[1, 2\].*given \[3, 2\].*drop_last.*dynamic_axes"),
            ({"x": np.ones(2, np.float32)}, r"given \[2\]"),
            ({"x": np.ones((1, 2), np.complex64)}, r"holds float32 numbers and was given complex64"),
            ({"x": np.array([[1, np.nan]], np.float32)}, r"'layer\.quant' has NaN"),
        ],
    )
    def test_of_inputs_that_do_not_fit(self, inputs: dict[str, np.ndarray], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DeployedNetwork(broken(lambda _: None)).run(inputs)

    def test_of_a_layer_that_does_not_fit_its_input_names_it(self) -> None:
        model = one_layer("MatMul", np.ones((3, 2), np.int8), ["n", "k"])
        with pytest.raises(ValueError, match=r"layer 'layer' has 3 input channels \(6 if two INT4.*its input 2"):
            run_deployed(model, {"x": np.ones((1, 2), np.float32)})

    def test_of_a_float_operator_names_it(self) -> None:
        model = broken(insert(0, helper.make_node("Reshape", ["", "shape"], [""], "odd")))
        model.graph.initializer.append(numpy_helper.from_array(np.array([3, 7]), "shape"))
        with pytest.raises(ValueError, match="odd"):
            run_deployed(model, {"x": np.ones((1, 2), np.float32)})

    def test_of_a_missing_onnxruntime_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        network = DeployedNetwork(broken(insert(0, helper.make_node("Relu", [""], [""], "relu"))))
        with pytest.raises(ImportError, match=r"pip install 'amct_lightning\[onnx\]'"):
            network.run({"x": np.ones((1, 2), np.float32)})

    def test_of_options(self) -> None:
        with pytest.raises(ValueError, match="deq_bits is 20"):
            DeployedNetwork(broken(lambda _: None), deq_bits=20)
        with pytest.raises(ValueError, match="output_dtype is 'bfloat16'"):
            DeployedNetwork(broken(lambda _: None), output_dtype="bfloat16")

    def test_inputs_are_given_in_the_type_of_the_graph(self) -> None:
        model = broken(lambda _: None)
        assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
        assert run_deployed(model, {"x": np.array([[1, 2]], np.float64)})["y"].tolist() == [[3.0, 3.0]]
