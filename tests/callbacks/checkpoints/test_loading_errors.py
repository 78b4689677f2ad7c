"""load_qat_checkpoint with files and modules that do not fit, and with files that nobody should trust."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amct_lightning import QuantRetrainCallback, load_qat_checkpoint
from tests.callbacks.checkpoints.test_loading import SizedNet, assert_equal
from tests.callbacks.conftest import Net, TrainerFactory, loader


class NetWithLoss(SizedNet):
    """A module with any object among its hyper parameters."""

    def __init__(self, loss: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters("loss")


class OtherNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(32, 3))


class ExecutedError(Exception):
    """Raised when something from a file is executed."""


class Trap:
    """An object whose unpickling is noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return spring, ("trap",)

    def __deepcopy__(self, memo: Any) -> Trap:
        return self


class System:
    """An object that calls what torch refuses in any case."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def spring(text: str) -> None:
    raise ExecutedError(text)


def train(make_trainer: TrainerFactory, path: Path, model: Net, quantized: bool = True) -> Path:
    callbacks = [QuantRetrainCallback(record_file=path.with_name("record.txt"))] if quantized else []
    trainer = make_trainer(callbacks=callbacks, max_steps=2, max_epochs=-1)
    trainer.fit(model, loader())
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def path(make_trainer: TrainerFactory, tmp_path: Path) -> Path:
    return train(make_trainer, tmp_path / "model.ckpt", SizedNet())


class TestFiles:
    """Every message names the file."""

    def test_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
            load_qat_checkpoint(SizedNet, tmp_path / "none.ckpt")

    def test_that_is_a_sharded_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match=r"is a folder, a sharded checkpoint.*consolidate_checkpoint"):
            load_qat_checkpoint(SizedNet, tmp_path)

    @pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 broken"])
    def test_that_is_no_checkpoint(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"model\.ckpt' cannot be read as a checkpoint"):
            load_qat_checkpoint(SizedNet, path)

    def test_that_is_truncated(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-300])
        with pytest.raises(RuntimeError, match=r"model\.ckpt' cannot be read as a checkpoint.*damaged"):
            load_qat_checkpoint(SizedNet, path)

    def test_of_a_float_training(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        path = train(make_trainer, tmp_path / "float.ckpt", SizedNet(), quantized=False)
        with pytest.raises(ValueError, match=r"float\.ckpt' was not written .*'amct_lightning'.*load_from_checkpoint"):
            load_qat_checkpoint(SizedNet, path)

    def test_with_a_damaged_plan(self, path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["amct_lightning"]["plan"]["config"]
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=r"plan in .*model\.ckpt is damaged"):
            load_qat_checkpoint(Net(), path)

    def test_with_missing_and_unexpected_tensors(self, path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state_dict"]["head.bias"] = checkpoint["state_dict"].pop("net.1.input_quantizer.clip_max")
        torch.save(checkpoint, path)
        message = r"model\.ckpt'.*Missing: 'net\.1\.input_quantizer\.clip_max'; unexpected: 'head\.bias'"
        for given in (SizedNet, SizedNet()):
            with pytest.raises(RuntimeError, match=message):
                load_qat_checkpoint(given, path)


class TestModules:
    @pytest.mark.parametrize("given", ["class", "instance"])
    def test_of_another_architecture(self, path: Path, given: str) -> None:
        message = r"model\.ckpt' is of another architecture: OtherNet has no 'net\.0\.0', 'net\.0\.1'"
        with pytest.raises(ValueError, match=message):
            load_qat_checkpoint(OtherNet if given == "class" else OtherNet(), path)

    def test_of_another_size(self, path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"(?s)model\.ckpt' does not fit SizedNet.*size mismatch"):
            load_qat_checkpoint(SizedNet, path, width=8)
        with pytest.raises(RuntimeError, match=r"(?s)model\.ckpt' does not fit the converted SizedNet.*size mismatch"):
            load_qat_checkpoint(SizedNet(width=8), path)

    def test_a_plain_module_of_another_architecture(self, path: Path) -> None:
        with pytest.raises(ValueError, match=r"model\.ckpt' is of another architecture.*it lacks '3\.weight'"):
            load_qat_checkpoint(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), path)

    def test_a_class_that_needs_more_arguments(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        class Needy(SizedNet):
            def __init__(self, number: int) -> None:
                super().__init__()
                self.hparams.clear()

        path = train(make_trainer, tmp_path / "model.ckpt", Needy(1))
        with pytest.raises(TypeError, match=r"Needy cannot be made .*model\.ckpt'.*'number'.*as keywords"):
            load_qat_checkpoint(Needy, path)
        assert isinstance(load_qat_checkpoint(Needy, path, number=2), Needy)

    def test_a_class_that_is_no_lightning_module(self, path: Path) -> None:
        with pytest.raises(TypeError, match=r"Linear is not a LightningModule class.*load_qat_checkpoint\(Linear\("):
            load_qat_checkpoint(nn.Linear, path)

    def test_arguments_for_an_instance(self, path: Path) -> None:
        with pytest.raises(TypeError, match=r"an instance of SizedNet and arguments for its class \('width'\)"):
            load_qat_checkpoint(SizedNet(), path, width=4)

    def test_something_else(self, path: Path) -> None:
        with pytest.raises(TypeError, match="needs a LightningModule class or a module, got str"):
            load_qat_checkpoint("SizedNet", path)

    def test_an_instance_that_is_quantized_differently(self, path: Path) -> None:
        model = load_qat_checkpoint(SizedNet(), path)
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["amct_lightning"]["plan"]["config"]["batch_num"] = 7
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=r"model\.ckpt' was quantized differently from the model"):
            load_qat_checkpoint(model, path)


class TestObjectsInTheFile:
    """Nothing in a file is executed; what needs that is left out if an instance makes it unnecessary."""

    def test_a_whole_checkpoint_can_be_read_with_weights_only(self, path: Path) -> None:
        assert torch.load(path, weights_only=True)["amct_lightning"]["submodule"] is None

    @pytest.mark.parametrize("value", [nn.CrossEntropyLoss(), Path("data"), [{"loss": Path}], Trap()], ids=type)
    def test_a_class_cannot_be_made_but_an_instance_can_be_loaded(
        self, make_trainer: TrainerFactory, tmp_path: Path, value: Any
    ) -> None:
        trained = NetWithLoss(value)
        path = train(make_trainer, tmp_path / "model.ckpt", trained)
        trusted = set(torch.serialization.get_safe_globals())
        message = r"NetWithLoss cannot be made from .*model\.ckpt'.*'loss' hold objects of .*\(NetWithLoss\(\.\.\.\), "
        with pytest.raises(ValueError, match=message):
            load_qat_checkpoint(NetWithLoss, path)
        assert_equal(load_qat_checkpoint(NetWithLoss(), path), trained)
        assert set(torch.serialization.get_safe_globals()) == trusted

    def test_a_trap_would_be_noticed(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        path = train(make_trainer, tmp_path / "model.ckpt", NetWithLoss(Trap()))
        with pytest.raises(ExecutedError):
            torch.load(path, weights_only=False)

    def test_objects_of_callbacks(self, path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        torch.save({**checkpoint, "callbacks": {"Other": Trap()}}, path)
        name = r"tests\.callbacks\.checkpoints\.test_loading_errors\.spring"
        with pytest.raises(ValueError, match=f"it holds objects of '{name}'"):
            load_qat_checkpoint(SizedNet, path)
        assert_equal(load_qat_checkpoint(SizedNet(), path), load_qat_checkpoint(SizedNet(), path))

    def test_objects_that_cannot_be_left_out(self, path: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), "x": System()}, path)
        with pytest.raises(
            RuntimeError, match=r"model\.ckpt' cannot be read without .* objects of '.*system'.*save it ag"
        ):
            load_qat_checkpoint(SizedNet(), path)


class TestFloatModules:
    """A float LightningModule that gets a quantized state by the ways that know nothing of quantization."""

    @pytest.fixture
    def path(self, make_trainer: TrainerFactory, tmp_path: Path) -> Path:
        return train(make_trainer, tmp_path / "qat.ckpt", Net())

    @pytest.mark.parametrize("way", ["load_from_checkpoint", "load_state_dict", "Trainer"])
    def test_the_way_to_load_is_named(self, make_trainer: TrainerFactory, path: Path, way: str) -> None:
        with pytest.raises(
            RuntimeError, match=r"(?s)Unexpected key.*input_quantizer.*load_qat_checkpoint\(Net, path\)"
        ):
            if way == "load_from_checkpoint":
                Net.load_from_checkpoint(path)
            elif way == "load_state_dict":
                Net().load_state_dict(torch.load(path, weights_only=False)["state_dict"])
            else:
                make_trainer().test(Net(), loader(), ckpt_path=path)

    def test_other_errors_are_as_they_were(self, path: Path) -> None:
        with pytest.raises(RuntimeError) as found:
            Net().load_state_dict({"other": torch.zeros(1)})
        assert "load_qat_checkpoint" not in str(found.value)
        quantized = load_qat_checkpoint(Net, path)
        with pytest.raises(RuntimeError, match="Unexpected key") as found:
            quantized.load_state_dict({**quantized.state_dict(), "input_quantizer.other": torch.zeros(1)})
        assert "load_qat_checkpoint" not in str(found.value)

    def test_what_loads_is_loaded_and_told_as_ever(self, path: Path) -> None:
        state = torch.load(path, weights_only=False)["state_dict"]
        found = Net().load_state_dict(state, strict=False)
        assert found.missing_keys == []
        assert all("_quantizer." in name for name in found.unexpected_keys)
        assert str(Net().load_state_dict(Net().state_dict(), assign=True)) == "<All keys matched successfully>"
