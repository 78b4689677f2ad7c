"""What is on disk after an export, and after one that failed."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from amct_lightning import QuantRecord, calibrate, export_onnx, prepare_qat, save_quant_retrain_model
from amct_lightning.config import RetrainConfig
from amct_lightning.export import write
from amct_lightning.export.forms import write_form
from amct_lightning.export.tracing.base_graph import Choices, build_graph
from amct_lightning.export.tracing.prepared import prepare
from amct_lightning.export.write import check_network
from tests.export.golden import golden_export

FORMS = ("qdq", "deploy", "fake_quant")


class Net(nn.Module):
    """A convolution with its BatchNorm, a grouped transposed one, a linear layer on three axes and one on two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.rows = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(torch.relu(self.norm(self.conv(x))))
        return self.head(self.rows(x.mean(1)).mean(1))


def trained(seed: int = 0, config: Any = None) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(2, 2, 4, 4)
    model = prepare_qat(Net(), config, x).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 2, 4, 4)).square().mean().backward()
        optimizer.step()
    return model.eval(), x


def run(path: Path, *inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    feed = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, feed)[0]


@pytest.mark.parametrize("form", FORMS)
class TestForms:
    def test_a_file_passes_the_checker_and_runs_as_the_model_does(self, tmp_path: Path, form: Any) -> None:
        model, x = trained()
        report = export_onnx(model, tmp_path / "net.onnx", x, form)
        check_network(onnx.load(tmp_path / "net.onnx"))
        assert report.layers == 4
        assert report.opset == (13 if form == "qdq" else 11)
        assert report.inputs == {"x": (2, 2, 4, 4)}
        assert report.outputs == {"output": (2, 3)}
        if form != "deploy":
            with torch.no_grad():
                expected = model(x).numpy()
            np.testing.assert_allclose(run(tmp_path / "net.onnx", x), expected, atol=0.02 * np.abs(expected).max())

    def test_inputs_and_outputs_have_the_names_and_axes_that_are_asked_for(self, tmp_path: Path, form: Any) -> None:
        model, x = trained()
        axes = {"image": {0: "batch"}, "scores": {0: "batch"}}
        names = {"input_names": ["image"], "output_names": ["scores"]}
        report = export_onnx(model, tmp_path / "net.onnx", x, form, dynamic_axes=axes, **names)
        assert report.inputs == {"image": ("batch", 2, 4, 4)}
        assert list(report.outputs) == ["scores"]
        if form != "deploy":
            assert run(tmp_path / "net.onnx", torch.randn(5, 2, 4, 4)).shape == (5, 3)

    def test_constants_above_the_threshold_lie_in_a_file_beside(self, tmp_path: Path, form: Any) -> None:
        model = prepare_qat(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)), None, torch.ones(1, 64))
        calibrate(model, [torch.randn(2, 64)])
        x = torch.randn(1, 64)
        export_onnx(model.eval(), tmp_path / "whole.onnx", x, form)
        export_onnx(model, tmp_path / "net.onnx", x, form, external_data_threshold=1000)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data", "whole.onnx"]
        assert (tmp_path / "net.onnx").stat().st_size < 4000 < (tmp_path / "net.onnx.data").stat().st_size
        if form != "deploy":
            np.testing.assert_array_equal(run(tmp_path / "net.onnx", x), run(tmp_path / "whole.onnx", x))


@pytest.mark.parametrize("form", ["qdq", "deploy"])  # in fake-quant integers are floating numbers, as in AMCT
class TestSize:
    def test_a_network_with_integer_weights_is_a_quarter_or_an_eighth_in_size(self, tmp_path: Path, form: Any) -> None:
        bare = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
        floats = sum(parameter.nbytes for parameter in bare.parameters())
        for config, share in (("INT8", 4), ("A4W4", 8)):
            model = prepare_qat(bare, config, torch.ones(1, 256))
            calibrate(model, [torch.randn(2, 256)])
            export_onnx(model.eval(), tmp_path / "net.onnx", torch.randn(1, 256), form)
            assert (tmp_path / "net.onnx").stat().st_size < 1.1 * floats / share


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_written_piece_by_piece_is_the_network(form: Any) -> None:
    model = prepare_qat(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)), None, torch.ones(1, 64))
    calibrate(model, [torch.randn(2, 64)])
    prepared = prepare(model.eval())
    network = write_form(build_graph(prepared, torch.randn(1, 64), Choices()), prepared, form)
    found = onnx.load_from_string(b"".join(write.serialized(network)))
    whole = ir.to_proto(network)
    for proto in (found, whole):
        tensors = sorted(proto.graph.initializer, key=lambda tensor: tensor.name)
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(tensors)
        del proto.graph.value_info[:]  # where the shapes of the weights are told once more
    assert found == whole


class TestModel:
    """The model that is exported stays as it is."""

    def test_nothing_of_it_changes(self, tmp_path: Path) -> None:
        model, x = trained()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        attributes = [sorted(vars(module)) for module in model.modules()]
        generator = torch.random.get_rng_state()
        export_onnx(model, tmp_path / "net.onnx", x)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert [sorted(vars(module)) for module in model.modules()] == attributes
        assert torch.equal(torch.random.get_rng_state(), generator)

    def test_wrapped_and_compiled_models_are_taken_out(self, tmp_path: Path) -> None:
        model, x = trained()
        export_onnx(model, tmp_path / "plain.onnx", x)
        export_onnx(torch.compile(model), tmp_path / "compiled.onnx", x)
        assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "compiled.onnx").read_bytes()

    def test_low_precision_weights_are_exported_in_float32(self, tmp_path: Path) -> None:
        model, x = trained()
        low = model.bfloat16()
        export_onnx(low, tmp_path / "net.onnx", x.bfloat16())
        assert low.conv.weight.dtype == torch.bfloat16
        with torch.no_grad():
            expected = low(x.bfloat16()).float().numpy()
        np.testing.assert_allclose(run(tmp_path / "net.onnx", x.bfloat16().float()), expected, atol=0.05)

    def test_a_layer_that_is_called_twice_is_there_twice_with_one_weight(self, tmp_path: Path) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layer(torch.relu(self.layer(x)))

        x = torch.randn(2, 4)
        model = prepare_qat(Twice(), None, x, allow_reuse=True)
        calibrate(model, [x])
        export_onnx(model.eval(), tmp_path / "net.onnx", x)
        graph = onnx.load(tmp_path / "net.onnx").graph
        assert [node.name for node in graph.node if node.op_type == "Gemm"] == ["layer", "layer.call1"]
        assert [tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8].count(
            "layer.sub_module.weight"
        ) == 1
        with torch.no_grad():
            np.testing.assert_allclose(run(tmp_path / "net.onnx", x), model(x).numpy(), atol=0.02)

    def test_a_layer_that_no_batch_has_reached_is_there_in_float(self, tmp_path: Path) -> None:
        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layer(x) if self.training else self.layer(x) + self.extra(torch.relu(x))

        x = torch.randn(2, 4)
        model = prepare_qat(Branches(), None, x)
        model.train()(x)
        model.extra.input_quantizer.missed = True
        with pytest.warns(UserWarning, match="extra"):
            report = export_onnx(model.eval(), tmp_path / "net.onnx", x)
        assert report.layers == 1
        nodes = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
        assert nodes.count("QuantizeLinear") == 1 and nodes.count("Gemm") == 2


class TestRefusals:
    """Wrong use is told with its culprit, and no file remains."""

    @pytest.fixture(autouse=True)
    def _nothing_remains(self, tmp_path: Path) -> Any:
        yield
        assert not list(tmp_path.glob("**/*.onnx*")) and not list(tmp_path.glob("**/.*"))

    def test_a_float_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Net has no quantized layers"):
            export_onnx(Net().eval(), tmp_path / "net.onnx", torch.ones(1, 2, 4, 4))

    def test_a_model_without_ranges(self, tmp_path: Path) -> None:
        x = torch.ones(1, 2, 4, 4)
        model = prepare_qat(Net(), None, x).eval()
        with pytest.raises(ValueError, match=r"4 of 4 quantized layers are not calibrated yet: 'conv'"):
            export_onnx(model, tmp_path / "net.onnx", x)

    def test_a_batch_norm_in_training_mode(self, tmp_path: Path) -> None:
        model, x = trained()
        with pytest.raises(RuntimeError, match=r"BatchNorm 'norm' is in training mode.*model\.eval\(\)"):
            export_onnx(model.train(), tmp_path / "net.onnx", x)

    def test_a_factor_that_is_not_finite(self, tmp_path: Path) -> None:
        model, x = trained()
        with torch.no_grad():
            model.head.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="Layer 'head' has NaN or infinite factors"):
            export_onnx(model, tmp_path / "net.onnx", x)

    def test_layers_that_run_in_float(self, tmp_path: Path) -> None:
        model, x = trained()
        model.rows.quant_mode = "float"
        with pytest.raises(ValueError, match="'rows' run in float at present"):
            export_onnx(model, tmp_path / "net.onnx", x)

    def test_a_bias_beyond_32_bits(self, tmp_path: Path) -> None:
        model, x = trained()
        with torch.no_grad():
            model.head.bias[0] = 1e9
        with pytest.raises(RuntimeError, match=r"Do bias quantize failed.*'head'"):
            export_onnx(model, tmp_path / "net.onnx", x)

    def test_a_model_on_the_meta_device(self, tmp_path: Path) -> None:
        model, x = trained()
        with pytest.raises(RuntimeError, match="on the meta device and have no values"):
            export_onnx(model.to("meta"), tmp_path / "net.onnx", x)

    def test_weights_that_are_spread_over_processes(self, tmp_path: Path) -> None:
        model, x = trained()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            whole = model.head.weight.detach()
            model.head.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
            with pytest.raises(
                RuntimeError, match=r"spread over several processes \(FSDP\).*amct-lightning export CKPT"
            ):
                export_onnx(model, tmp_path / "net.onnx", x)
        finally:
            dist.destroy_process_group()

    @pytest.mark.parametrize("record", ["of_another_state", "without_a_layer", "with_a_layer_more", "empty"])
    def test_a_record_of_something_else(self, tmp_path: Path, record: str) -> None:
        model, x = trained()
        layers = dict(QuantRecord.from_model(model))
        expected = {
            "of_another_state": "conv: scale_d",
            "without_a_layer": "'head' are quantized and not in it",
            "with_a_layer_more": "'tail' are in it and not quantized",
            "empty": "is empty",
        }[record]
        if record == "of_another_state":
            layers = dict(QuantRecord.from_model(trained(seed=1)[0]))
        elif record == "without_a_layer":
            del layers["head"]
        elif record == "with_a_layer_more":
            layers["tail"] = layers["head"]
        QuantRecord(layers if record != "empty" else {}).save(tmp_path / "record.txt")
        with pytest.raises(RuntimeError, match=rf"record in '.*record\.txt'.*{expected}"):
            export_onnx(model, tmp_path / "net.onnx", x, record=tmp_path / "record.txt")

    def test_another_configuration(self, tmp_path: Path) -> None:
        golden = golden_export("mlp__a4w4_json", tmp_path)
        config = RetrainConfig.from_json(golden.config_file)
        text = Path(golden.config_file).read_text().replace('"INT4"', '"INT8"')
        Path(golden.config_file).write_text(text)
        assert config != RetrainConfig.from_json(golden.config_file)
        with pytest.raises(
            RuntimeError, match=r"config\.json' is not the configuration.*'fc1': dst_type is INT8 there"
        ):
            save_quant_retrain_model(
                golden.config_file, golden.model, golden.record_file, f"{tmp_path}/net", golden.input_data
            )

    def test_a_missing_record(self, tmp_path: Path) -> None:
        golden = golden_export("mlp__a4w4_json", tmp_path)
        Path(golden.record_file).unlink()
        with pytest.raises(FileNotFoundError, match=r"no record file '.*record\.txt'"):
            save_quant_retrain_model(
                golden.config_file, golden.model, golden.record_file, f"{tmp_path}/net", golden.input_data
            )

    def test_a_folder_in_the_place_of_one_of_two_files(self, tmp_path: Path) -> None:
        golden = golden_export("mlp__a4w4_json", tmp_path)
        (tmp_path / "net_fake_quant_model.onnx").mkdir()
        with pytest.raises(OSError, match="fake_quant"):
            save_quant_retrain_model(
                golden.config_file, golden.model, golden.record_file, f"{tmp_path}/net", golden.input_data
            )
        (tmp_path / "net_fake_quant_model.onnx").rmdir()

    def test_a_disk_that_is_full_in_the_middle(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        golden = golden_export("mlp__a4w4_json", tmp_path)
        parts = write.serialized

        def fill(model: Any) -> Iterator[bytes]:
            for number, part in enumerate(parts(model)):
                yield part
                if number and any(node.op_type == "Round" for node in model.graph):
                    raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(write, "serialized", fill)
        with pytest.raises(OSError, match="No space left"):
            save_quant_retrain_model(
                golden.config_file, golden.model, golden.record_file, f"{tmp_path}/net", golden.input_data
            )

    def test_a_form_that_does_not_exist(self, tmp_path: Path) -> None:
        model, x = trained()
        with pytest.raises(ValueError, match="form is 'onnx'; it must be one of 'deploy', 'fake_quant', 'qdq'"):
            export_onnx(model, tmp_path / "net.onnx", x, "onnx")  # type: ignore[arg-type]

    def test_names_that_do_not_fit(self, tmp_path: Path) -> None:
        model, x = trained()
        with pytest.raises(ValueError, match="input_names has 2 names"):
            export_onnx(model, tmp_path / "net.onnx", x, input_names=["a", "b"])
        with pytest.raises(ValueError, match="output_names has 2 names"):
            export_onnx(model, tmp_path / "net.onnx", x, output_names=["a", "b"])

    def test_a_float_part_that_onnx_cannot_express(self, tmp_path: Path) -> None:
        class Determinant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.linalg.eigvals(self.layer(x)).real

        x = torch.randn(4, 4)
        model = prepare_qat(Determinant(), None, x)
        calibrate(model, [x])
        with pytest.raises(RuntimeError, match=r"(?s)linalg_eigvals runs in the model itself \(Determinant\)"):
            export_onnx(model.eval(), tmp_path / "net.onnx", x)
