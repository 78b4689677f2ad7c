"""Whole networks, converted in every way there is, go through torch's exporters as they are."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from amct_lightning import (
    QuantRetrainCallback,
    create_quant_retrain_config,
    create_quant_retrain_model,
    prepare_qat,
    quantized_layers,
    restore_quant_retrain_model,
)
from amct_lightning.modules import activation_quantizers
from tests.architectures.models import ARCHITECTURES, Architecture
from tests.export.plain import Exported, assert_close, assert_equal, onnx_outputs, outputs, quantizers
from tests.golden_data import model_case

GOLDEN = [
    "cnn_bn_relu__a8w4_cfg",
    "conv1d__ulqw_pertensor",
    "conv3d__default",
    "conv_bn_norelu__default",
    "deconv__default",
    "depthwise__ulqw",
    "gru__default",
    "lstm__default",
    "lstm_nostate__rnn_disabled",
    "mlp__a4w4_json",
    "res_down__default",
    "token_mlp__default",
    "unsupported__default",
]
"""A recorded run of each network."""
CONVOLUTIONAL = ("ResNet", "RegNet", "ConvNext", "MobileNetV2")
TRANSFORMERS = ("ViT", "DeiT", "Bert", "DistilBert", "GPT2", "Llama", "Wav2Vec2", "CLIP")
SMALL = [a for a in ARCHITECTURES if a.model.startswith(tuple(f"{name}{end}" for name in
         (*CONVOLUTIONAL, *TRANSFORMERS) for end in ("For", "Model")))]  # fmt: skip


@cache
def golden(name: str, folder: Path) -> Exported:
    """A network as AMCT's script makes it, trained and evaluated; it writes its record into the folder."""
    case = model_case(name)
    config, record = folder / f"{name}.json", folder / f"{name}.txt"
    config.write_text(case.meta["config_used"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*INT8 is used instead of INT4.*")
        model = create_quant_retrain_model(str(config), case.float_model(), str(record), case.group("cal/"))
    case.train(model)
    return Exported(model.eval(), case.group("eval_x/"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(params=GOLDEN)
def network(request: pytest.FixtureRequest, folder: Path) -> Exported:
    return golden(request.param, folder)


def weights_of(model: nn.Module) -> int:
    return sum(len(layer.weight_quantizers) for layer in quantized_layers(model).values())


def test_a_network_of_an_amct_script_has_a_node_per_quantizer(network: Exported) -> None:
    activations, weights = quantizers(network.program)
    assert weights == weights_of(network.model)
    unrolled = any(isinstance(layer, nn.RNNBase) for layer in quantized_layers(network.model).values())
    assert activations >= len(set(activation_quantizers(network.model).values()))
    assert unrolled or activations == len(set(activation_quantizers(network.model).values()))


def test_its_program_gives_the_same_bits(network: Exported) -> None:
    assert_equal(outputs(network.program.module(), *network.args), network.eager())


@pytest.mark.parametrize("exporter", ["onnx", "script_onnx"])
def test_onnxruntime_gives_its_numbers(network: Exported, exporter: str) -> None:
    assert_close(onnx_outputs(getattr(network, exporter), *network.args), network.eager())


def test_exporting_writes_no_record_and_changes_nothing(folder: Path) -> None:
    name = "cnn_bn_relu__default"
    network = golden(name, folder)
    state = copy.deepcopy(network.model.state_dict())
    assert network.program
    assert network.onnx
    assert network.script_onnx
    assert (folder / f"{name}.txt").read_text() == ""
    assert all(torch.equal(value, state[key]) for key, value in network.model.state_dict().items())
    network.eager()
    assert (folder / f"{name}.txt").read_text()


@pytest.mark.parametrize("search_n", [False, True])
def test_copies_and_restored_networks_are_exported_as_well(tmp_path: Path, search_n: bool) -> None:
    float_model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    config, record, x = str(tmp_path / "config.json"), str(tmp_path / "record.txt"), torch.randn(4, 2, 6, 6)
    create_quant_retrain_config(config, float_model, x)
    model = create_quant_retrain_model(config, float_model, record, x, search_n=search_n)
    model.train()(x)
    torch.save(model.eval().state_dict(), tmp_path / "trained.pth")
    saved = str(tmp_path / "trained.pth")
    restored = restore_quant_retrain_model(config, float_model, record, x, saved, search_n=search_n)
    expected = outputs(model, x)
    for one in (copy.deepcopy(model), restored.eval()):
        exported = Exported(one, (x,))
        assert quantizers(exported.program) == (2, 2)
        assert_equal(outputs(exported.program.module(), x), expected)
        assert_close(onnx_outputs(exported.script_onnx, x), expected)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        self.programs: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, _index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.programs.append(torch.export.export(self, (torch.ones(2, 1, 4, 4),)))

    def validation_step(self, batch: Any, _index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_lightning_module_is_exported_during_and_after_the_training(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.randn(8, 1, 4, 4), torch.randint(3, (8,))), batch_size=4)
    net, x = Net(), torch.ones(2, 1, 4, 4)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[QuantRetrainCallback()],
    )  # fmt: skip
    trainer.fit(net, data, data)
    exported = Exported(net.eval(), (x,))
    for program in (*net.programs, exported.program):
        assert quantizers(program) == (2, 2)
        assert_equal(outputs(program.module(), x), exported.eager())
    assert_close(onnx_outputs(exported.onnx, x), exported.eager())
    net.to_onnx(tmp_path / "net.onnx", x, dynamo=False)
    assert_close(onnx_outputs((tmp_path / "net.onnx").read_bytes(), x), exported.eager())


class Tensors(nn.Module):
    """A model of the transformers library as a function of tensors that gives tensors."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"]

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        output = self.model(**dict(zip(self.names, args, strict=True)))
        return tuple(value for value in output.values() if isinstance(value, Tensor))


@cache
def architecture(which: Architecture) -> Exported:
    torch.manual_seed(0)
    inputs = which.inputs()
    model = prepare_qat(which.build(), None, inputs).train()
    model(**inputs)
    wrapper = Tensors(model.eval(), inputs)
    return Exported(wrapper, tuple(inputs[name] for name in wrapper.names))


@pytest.mark.parametrize("which", SMALL, ids=str)
def test_an_architecture_of_the_transformers_library_is_exported(which: Architecture) -> None:
    exported = architecture(which)
    activations, weights = quantizers(exported.program)
    assert weights == len(quantized_layers(exported.model))
    assert activations == len(set(activation_quantizers(exported.model).values()))
    assert_equal(outputs(exported.program.module(), *exported.args), exported.eager())


@pytest.mark.parametrize("name", ["ViT", "Bert"])
def test_an_architecture_gives_its_numbers_in_onnxruntime(name: str) -> None:
    exported = architecture(next(which for which in SMALL if which.model.startswith(f"{name}For")))
    assert_close(onnx_outputs(exported.onnx, *exported.args), exported.eager())
