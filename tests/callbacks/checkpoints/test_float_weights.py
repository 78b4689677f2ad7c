"""A run that begins with the weights of a float model, from whatever file they are in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from amct_lightning import QuantRetrainCallback, prepare_qat, quantized_layers
from amct_lightning.callbacks.checkpoints.float_weights import load_float_weights
from tests.callbacks.conftest import Net, TrainerFactory, loader

State = dict[str, Any]


@pytest.fixture
def trained(make_trainer: TrainerFactory, tmp_path: Path) -> Net:
    """A float network that has learned, and its checkpoint 'float.ckpt'."""
    model, trainer = Net(), make_trainer(max_epochs=1)
    trainer.fit(model, loader(seed=3))
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    return model


def weights(model: nn.Module) -> State:
    return {name: tensor for name, tensor in model.state_dict().items() if "_quantizer." not in name}


def assert_equal(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def prefixed(prefix: str) -> Callable[[Net], State]:
    return lambda model: {prefix + name: tensor for name, tensor in model.state_dict().items()}


def test_a_run_from_a_float_checkpoint_is_that_of_a_module_with_its_weights(
    make_trainer: TrainerFactory, trained: Net, tmp_path: Path
) -> None:
    by_hand, model = Net(), Net()
    by_hand.load_state_dict(trained.state_dict())
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(by_hand, loader())
    callback = QuantRetrainCallback(float_checkpoint=tmp_path / "float.ckpt")
    make_trainer(callbacks=[callback]).fit(model, loader())
    assert_equal(model.state_dict(), by_hand.state_dict())


@pytest.mark.parametrize(
    "content",
    [
        Net.state_dict,
        lambda model: model.net.state_dict(),
        lambda model: {"model": model.net.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
        lambda model: {"state_dict": model.state_dict(), "arguments": re.compile("a class that is not loaded")},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
    ],
)
def test_a_state_dict_is_found_in_the_file_and_a_place_for_it_in_the_module(
    make_trainer: TrainerFactory, trained: Net, tmp_path: Path, content: Callable[[Net], State]
) -> None:
    torch.save(content(trained), tmp_path / "float.pth")
    model = Net()
    callback = QuantRetrainCallback(float_checkpoint=str(tmp_path / "float.pth"))
    make_trainer(callbacks=[callback]).validate(model, loader(), verbose=False)
    assert_equal(weights(model), trained.state_dict())
    assert list(quantized_layers(model)) == ["net.0", "net.4"]


def test_a_compiled_part_has_the_names_of_the_part(trained: Net, tmp_path: Path) -> None:
    model = Net()
    model.net = torch.compile(model.net)  # type: ignore[assignment]
    load_float_weights(model, tmp_path / "float.ckpt")
    assert_equal(model.net._orig_mod.state_dict(), trained.net.state_dict())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_safetensors_are_read_and_may_leave_out_tied_weights(tmp_path: Path) -> None:
    saved, model = Tied(), Tied()
    save_file({"embedding.weight": saved.embedding.weight.data}, tmp_path / "tied.safetensors")
    load_float_weights(model, tmp_path / "tied.safetensors")
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, saved.head.weight)
    (tmp_path / "tied.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(RuntimeError, match=r"tied\.safetensors' cannot be read as safetensors"):
        load_float_weights(model, tmp_path / "tied.safetensors")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)


def test_of_parts_with_equal_names_the_converted_one_is_meant(tmp_path: Path) -> None:
    saved, model = nn.Linear(2, 2), Pair()
    torch.save(saved.state_dict(), tmp_path / "part.pt")
    with pytest.raises(RuntimeError, match=r"names of several parts of Pair: 'student', 'teacher'.*`submodule`"):
        load_float_weights(model, tmp_path / "part.pt")
    load_float_weights(model, tmp_path / "part.pt", "teacher")
    assert torch.equal(model.teacher.weight, saved.weight)
    assert not torch.equal(model.student.weight, saved.weight)


def test_the_module_may_change_what_is_loaded(trained: Net, tmp_path: Path) -> None:
    class Doubled(Net):
        def on_load_checkpoint(self, checkpoint: State) -> None:
            checkpoint["state_dict"]["net.0.bias"] = 2 * checkpoint["state_dict"]["net.0.bias"]

    model = Doubled()
    load_float_weights(model, tmp_path / "float.ckpt")
    assert torch.equal(model.net[0].bias, 2 * trained.net[0].bias)


class TestARunThatGoesOn:
    @pytest.mark.parametrize("is_there", [True, False])
    def test_has_the_weights_of_its_own_checkpoint(
        self, make_trainer: TrainerFactory, trained: Net, tmp_path: Path, is_there: bool
    ) -> None:
        file = tmp_path / "float.ckpt"
        first, whole, resumed = Net(), Net(), Net()
        trainer = make_trainer(max_epochs=1, callbacks=[QuantRetrainCallback(float_checkpoint=file)])
        trainer.fit(first, loader())
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        make_trainer(callbacks=[QuantRetrainCallback(float_checkpoint=file)]).fit(whole, loader())
        if not is_there:
            file.unlink()
        again = make_trainer(callbacks=[QuantRetrainCallback(float_checkpoint=file)])
        again.fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
        assert_equal(resumed.state_dict(), whole.state_dict())

    def test_is_given_what_its_checkpoint_leaves_out(
        self, make_trainer: TrainerFactory, trained: Net, tmp_path: Path
    ) -> None:
        class Part(Net):
            def __init__(self) -> None:
                super().__init__()
                self.strict_loading = False

            def on_save_checkpoint(self, checkpoint: State) -> None:
                del checkpoint["state_dict"]["net.0.bias"]

        callback = QuantRetrainCallback(float_checkpoint=tmp_path / "float.ckpt")
        trainer = make_trainer(max_epochs=1, callbacks=[callback])
        trainer.fit(Part(), loader())
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        model = Part()
        make_trainer(callbacks=[callback]).validate(model, loader(), ckpt_path=tmp_path / "half.ckpt", verbose=False)
        assert torch.equal(model.net[0].bias, trained.net[0].bias)

    def test_a_second_fit_does_not_begin_anew(self, make_trainer: TrainerFactory, trained: Net, tmp_path: Path) -> None:
        callback, model = QuantRetrainCallback(float_checkpoint=tmp_path / "float.ckpt"), Net()
        make_trainer(callbacks=[callback]).fit(model, loader())
        before = weights(model)["net.0.weight"].clone()
        make_trainer(callbacks=[callback]).validate(model, loader(), verbose=False)
        assert torch.equal(weights(model)["net.0.weight"], before)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_missing_file_is_named(make_trainer: TrainerFactory, tmp_path: Path, stage: str) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback(float_checkpoint=tmp_path / "none.ckpt")])
    with pytest.raises(FileNotFoundError, match=r"No such float checkpoint.*none\.ckpt"):
        getattr(trainer, stage)(Net(), loader())


class TestWhatDoesNotFit:
    def test_a_quantized_checkpoint_is_refused_with_the_remedy(
        self, make_trainer: TrainerFactory, tmp_path: Path
    ) -> None:
        trainer = make_trainer(callbacks=[QuantRetrainCallback()])
        trainer.fit(Net(), loader())
        trainer.save_checkpoint(tmp_path / "qat.ckpt")
        again = make_trainer(callbacks=[QuantRetrainCallback(float_checkpoint=tmp_path / "qat.ckpt")])
        with pytest.raises(ValueError, match=r"qat\.ckpt' is of a quantized model.*ckpt_path=.*load_qat_checkpoint"):
            again.fit(Net(), loader())

    @pytest.mark.parametrize("name", [None, "0.quant_module.replaced_module.weight"])
    def test_the_state_of_a_quantized_model_is_refused_with_the_remedy(self, tmp_path: Path, name: str | None) -> None:
        qat = prepare_qat(nn.Sequential(nn.Linear(2, 2)), None, torch.ones(1, 2)).state_dict()
        torch.save(qat if name is None else {name: torch.ones(2, 2)}, tmp_path / "qat.pth")
        with pytest.raises(ValueError, match=r"qat\.pth' is of a quantized model.*restore_quant_retrain_model"):
            load_float_weights(nn.Sequential(nn.Linear(2, 2)), tmp_path / "qat.pth")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"net.5.weight": "net.4.weight"},
                r"Missing in the file: 'net\.4\.weight'; unexpected in it: 'net\.5\.weight'\. "
                r"Did you mean 'net\.5\.weight' in place of 'net\.4\.weight'\?",
            ),
            ({"more": None}, r"Missing in the file: nothing; unexpected in it: 'more'\."),
        ],
    )
    def test_names_are_told_with_similar_ones(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        state: State = dict(Net().state_dict())
        for name, old in change.items():
            state[name] = torch.ones(1) if old is None else state.pop(old)
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(RuntimeError, match=rf"other\.pt' does not fit Net\. {message}"):
            load_float_weights(Net(), tmp_path / "other.pt")

    def test_with_strict_loading_off_what_fits_is_loaded_and_the_rest_told(self, trained: Net, tmp_path: Path) -> None:
        model = Net()
        model.strict_loading = False
        torch.save({"net.0.bias": trained.net[0].bias.data}, tmp_path / "little.pt")
        with pytest.warns(UserWarning, match=r"little\.pt' does not fit Net\. Missing in the file: 'net\.0\.weight'"):
            load_float_weights(model, tmp_path / "little.pt")
        assert torch.equal(model.net[0].bias, trained.net[0].bias)

    def test_another_shape_is_told(self, tmp_path: Path) -> None:
        torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "wide.pt")
        with pytest.raises(RuntimeError, match=r"(?s)wide\.pt' does not fit Linear: .*weight.*\[3, 2\].*\[2, 2\]"):
            load_float_weights(nn.Linear(2, 2), tmp_path / "wide.pt")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"epoch": 3}, r"holds no state_dict: its entries are 'epoch'"),
            (
                {"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}},
                r"holds several state_dicts.*'model', 'ema'",
            ),
            ([torch.ones(1)], r"holds something of type list instead of a state_dict"),
        ],
    )
    def test_a_file_without_a_state_dict_is_refused(self, tmp_path: Path, content: Any, message: str) -> None:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(RuntimeError, match=rf"x\.pt' {message}"):
            load_float_weights(nn.Linear(2, 2), tmp_path / "x.pt")

    def test_nothing_in_a_file_is_run(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "ran",)

        torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "more": Attack()}, tmp_path / "x.pt")
        with pytest.raises(RuntimeError, match=r"x\.pt'"):
            load_float_weights(nn.Linear(2, 2), tmp_path / "x.pt")
        assert not (tmp_path / "ran").exists()

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match="is a folder"):
            load_float_weights(nn.Linear(2, 2), tmp_path)

    def test_weights_that_are_not_made_yet_are_refused(self, trained: Net, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"float\.ckpt' cannot be loaded into Net, whose weights are sharded or not"
        ):
            load_float_weights(Net().to("meta"), tmp_path / "float.ckpt")


def test_a_lazy_layer_takes_its_weights(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "x.pt")
    model: Any = nn.LazyLinear(3)
    load_float_weights(model, tmp_path / "x.pt")
    assert model.weight.shape == (3, 2)


def test_float_checkpoint_must_be_a_path() -> None:
    with pytest.raises(TypeError, match=r"float_checkpoint=3\): must be a non-empty text"):
        QuantRetrainCallback(float_checkpoint=3)  # type: ignore[arg-type]
