"""load_qat_checkpoint: a checkpoint alone rebuilds the quantized module, whole or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from amct_lightning import QuantRecord, QuantRetrainCallback, RetrainConfig, load_qat_checkpoint, quantized_layers
from amct_lightning.conversion.plan import find_plan
from tests.callbacks.conftest import Net, TrainerFactory, loader

X = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def backbone(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())


class SizedNet(Net):
    """A module with hyper parameters: conv - bn - relu - flatten, and a linear head."""

    def __init__(self, width: int = 4, classes: int = 3, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(backbone(width), nn.Linear(16 * width, classes))


class ConfiguredNet(Net):
    """A module that makes its layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(backbone(4), nn.Linear(64, 3))


Save = Callable[..., Path]


@pytest.fixture
def save(make_trainer: TrainerFactory, tmp_path: Path) -> Save:
    """Train a module for a few steps and save a checkpoint of it."""

    def save(model: pl.LightningModule, steps: int = 3, batch_num: int = 1, **callback: Any) -> Path:
        config = None
        if batch_num > 1:
            config = RetrainConfig.default(model, torch.zeros(1, 2, 4, 4))
            config.batch_num = batch_num
        trainer = make_trainer(callbacks=[QuantRetrainCallback(config, **callback)], max_steps=steps, max_epochs=-1)
        trainer.fit(model, loader())
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return save


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    here, there = left.state_dict(), right.state_dict()
    assert list(here) == list(there)
    assert [key for key in here if not torch.equal(here[key], there[key])] == []
    assert torch.equal(output(left), output(right))


class TestWholeModule:
    def test_a_class_is_made_from_the_hyper_parameters(self, save: Save) -> None:
        trained = SizedNet(width=6, classes=5)
        model = load_qat_checkpoint(SizedNet, save(trained))
        assert isinstance(model, SizedNet)
        assert model.hparams.width == 6
        assert find_plan(model) == (model, find_plan(trained)[1])
        assert_equal(model, trained)

    def test_arguments_replace_hyper_parameters(self, save: Save) -> None:
        assert load_qat_checkpoint(SizedNet, save(SizedNet(lr=0.5)), lr=0.25).hparams.lr == 0.25

    def test_an_instance_is_converted_in_place(self, save: Save) -> None:
        trained, model = Net(), Net()
        path = save(trained)
        assert load_qat_checkpoint(model, str(path)) is model
        assert_equal(model, trained)

    def test_an_instance_that_is_converted_already(self, save: Save) -> None:
        trained, model = Net(), Net()
        path = save(trained)
        load_qat_checkpoint(load_qat_checkpoint(model, path), path)
        assert_equal(model, trained)

    @pytest.mark.parametrize("given", ["class", "instance"])
    def test_layers_made_in_configure_model(self, save: Save, given: str) -> None:
        trained = ConfiguredNet()
        path = save(trained)
        assert_equal(load_qat_checkpoint(ConfiguredNet if given == "class" else ConfiguredNet(), path), trained)

    def test_the_training_mode_is_left_as_it_is(self, save: Save) -> None:
        path = save(SizedNet())
        assert all(module.training for module in load_qat_checkpoint(SizedNet, path).modules())
        assert not any(module.training for module in load_qat_checkpoint(SizedNet().eval(), path).modules())

    def test_the_record_is_that_of_the_checkpoint(self, save: Save) -> None:
        path = save(SizedNet())
        model = load_qat_checkpoint(SizedNet, path)
        assert QuantRecord.from_model(model) == QuantRecord.load(path.with_name("model.record.txt"))

    def test_a_checkpoint_with_weights_only(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        checkpoint = ModelCheckpoint(tmp_path, "last", save_weights_only=True)
        trained = SizedNet()
        make_trainer(callbacks=[checkpoint, QuantRetrainCallback()], enable_checkpointing=True).fit(trained, loader())
        assert_equal(load_qat_checkpoint(SizedNet, tmp_path / "last.ckpt"), trained)

    def test_it_goes_on_training_in_plain_pytorch(self, save: Save) -> None:
        model = load_qat_checkpoint(SizedNet, save(SizedNet()))
        clip = model.net[1].input_quantizer.clip_max
        before = clip.item()
        optimizer = model.configure_optimizers()
        model.training_step(next(iter(loader())), 0).backward()
        optimizer.step()
        assert clip.item() != before
        assert not model.net[1].input_quantizer.calibrating

    def test_a_trainer_tests_it_without_a_config(self, save: Save, make_trainer: TrainerFactory) -> None:
        trained = SizedNet()
        model = load_qat_checkpoint(SizedNet, save(trained))
        results = [
            make_trainer(callbacks=[QuantRetrainCallback()]).test(m, loader(1), verbose=False) for m in (model, trained)
        ]
        assert results[0] == results[1]

    def test_hooks_and_strict_loading_of_the_module_are_honoured(self, save: Save) -> None:
        class Partial(SizedNet):
            """Keeps its first layer to itself."""

            strict_loading = False

            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                del checkpoint["state_dict"]["net.0.0.weight"]
                checkpoint["bias"] = checkpoint["state_dict"].pop("net.1.bias")

            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["state_dict"]["net.1.bias"] = checkpoint["bias"]

        trained = Partial()
        path = save(trained)
        model = Partial()
        weight = model.net[0][0].weight.detach().clone()
        load_qat_checkpoint(model, path)
        assert torch.equal(model.net[0][0].weight, weight)
        assert torch.equal(model.net[1].bias, trained.net[1].bias)
        assert torch.equal(load_qat_checkpoint(Partial, path).net[1].bias, trained.net[1].bias)


class TestCalibrationInProgress:
    """The batches seen so far are in the checkpoint, so the calibration goes on where it was."""

    @pytest.mark.parametrize("given", [SizedNet, Net, "part"])
    def test_the_next_batches_finish_it_as_without_the_checkpoint(self, save: Save, given: Any) -> None:
        trained = Net() if given is Net else SizedNet()
        path = save(trained, steps=2, batch_num=3)
        model = load_qat_checkpoint(nn.Sequential(backbone(4), nn.Linear(64, 3)) if given == "part" else given(), path)
        for module in (trained, model):
            assert all(len(layer.input_quantizer.observed) == 2 for layer in quantized_layers(module).values())
            module.train()(X)
        for here, there in zip(quantized_layers(model).values(), quantized_layers(trained).values(), strict=True):
            assert not here.input_quantizer.calibrating
            assert torch.equal(here.input_quantizer.clip_max, there.input_quantizer.clip_max)
            assert torch.equal(here.input_quantizer.clip_min, there.input_quantizer.clip_min)

    def test_before_the_first_batch(self, save: Save) -> None:
        model = load_qat_checkpoint(SizedNet, save(SizedNet(), steps=0))
        assert all(layer.input_quantizer.calibrating for layer in quantized_layers(model).values())


class TestParts:
    """The callback's ``submodule``, and plain modules that were a part of the LightningModule."""

    @pytest.mark.parametrize("submodule", ["net", "net.0"])
    @pytest.mark.parametrize("given", ["class", "instance"])
    def test_only_the_submodule_is_quantized(self, save: Save, submodule: str, given: str) -> None:
        trained = SizedNet()
        path = save(trained, submodule=submodule, input_data=X)
        model = load_qat_checkpoint(SizedNet if given == "class" else SizedNet(), path)
        assert find_plan(model)[0] is model.get_submodule(submodule)
        assert list(quantized_layers(model)) == list(quantized_layers(trained))
        assert_equal(model, trained)

    @pytest.mark.parametrize("submodule", [None, "net", "net.0"])
    def test_a_plain_module_that_contains_what_is_quantized(self, save: Save, submodule: str | None) -> None:
        trained = SizedNet()
        path = save(trained, submodule=submodule, input_data=X)
        plain = nn.Sequential(backbone(4), nn.Linear(64, 3))
        assert load_qat_checkpoint(plain, path) is plain
        assert_equal(plain, trained.net)
        root = plain[0] if submodule == "net.0" else plain
        record, expected = QuantRecord.from_model(root), QuantRecord.from_model(trained)
        prefix = "" if submodule else "net."
        assert {f"{prefix}{name}": layer for name, layer in record.items()} == dict(expected)

    def test_a_plain_module_that_holds_only_a_part_of_what_is_quantized(self, save: Save) -> None:
        path = save(SizedNet())
        with pytest.raises(
            ValueError, match=r"model\.ckpt' also quantizes 'net\.1', outside of 'net\.0', .*Pass the Li"
        ):
            load_qat_checkpoint(backbone(4), path)

    def test_a_plain_module_that_occurs_twice(self, save: Save) -> None:
        class Twins(Net):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(32, 3))

        path = save(Twins())
        with pytest.raises(ValueError, match=r"Conv2d several times, after 'net\.0\.', 'net\.1\.'.*LightningModule"):
            load_qat_checkpoint(nn.Conv2d(2, 2, 1), path)
