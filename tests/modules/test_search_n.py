"""Search-N on a model: which outputs are looked at, when, and what the record says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import amct_lightning as amct
from amct_lightning import QuantRecord, calibrate, prepare_qat, quantized_layers
from amct_lightning.quantizers.shift_search import best_shifts, shift_errors


def network() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -3.0, 0.2]))
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 6, 6)


@pytest.fixture
def model(x: Tensor) -> nn.Module:
    converted = prepare_qat(network(), None, x, search_n=True).train()
    calibrate(converted, [x])
    return converted.eval()


def outputs(model: nn.Module, names: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
    """What the named modules return."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, y, name=name: seen.update({name: y}))
        for name in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_the_record_has_the_shifts_of_the_sums_that_the_deployed_layer_makes(model: nn.Module, x: Tensor) -> None:
    """For the first convolution that is the output of the BatchNorm, which the deployed layer contains."""
    seen = outputs(model, ("1", "3", "5"), x)
    record = QuantRecord.from_model(model)
    for name, output in (("0", "1"), ("3", "3"), ("5", "5")):
        layer = record[name]
        scale = torch.tensor(layer.scale_w) * layer.scale_d
        assert layer.shift_bit == best_shifts(shift_errors(seen[output], scale)).tolist()
        assert len(layer.shift_bit) == len(layer.scale_w)


def test_the_record_with_shifts_goes_through_its_text(model: nn.Module, x: Tensor) -> None:
    model(x)
    record = QuantRecord.from_model(model)
    assert "shift_bit" in record.to_text()
    assert QuantRecord.from_text(record.to_text()) == record


def test_it_is_off_by_default(x: Tensor) -> None:
    converted = prepare_qat(network(), None, x)
    calibrate(converted, [x])
    converted.eval()(x)
    assert all(not layer.shift_bit for layer in QuantRecord.from_model(converted).values())
    assert not any("shift" in name for name in converted.state_dict())


def test_before_an_evaluation_the_record_has_no_shifts(model: nn.Module, x: Tensor) -> None:
    model.train()(x)
    for layer in quantized_layers(model).values():
        layer.shift_search.reset()
    assert all(not layer.shift_bit for layer in QuantRecord.from_model(model).values())


def test_batches_of_one_evaluation_count_together_and_training_ends_it(model: nn.Module, x: Tensor) -> None:
    search = model[3].shift_search
    search.reset()
    model(x), model(2 * x)
    assert search.batches == 2
    model.train()(x)
    assert search.batches.abs() == 2
    model.eval()(x)
    assert search.batches == 1


def test_a_state_saved_after_training_is_not_mixed_with_the_next_evaluation(model: nn.Module, x: Tensor) -> None:
    model(10 * x)
    model.train()(x)
    twin = prepare_qat(network(), None, x, search_n=True)
    twin.load_state_dict(model.state_dict())
    assert QuantRecord.from_model(twin) == QuantRecord.from_model(model)
    model.eval()(x), twin.eval()(x)
    assert twin[3].shift_search.batches == 1
    assert torch.equal(twin[3].shift_search.errors, model[3].shift_search.errors)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_searches_apart(model: nn.Module, x: Tensor, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    twin = duplicate(model)
    before = model[0].shift_search.errors.clone()
    twin(10 * x)
    assert torch.equal(model[0].shift_search.errors, before)
    assert not torch.equal(twin[0].shift_search.errors, before)


def test_the_compiled_evaluation_finds_the_same(model: nn.Module, x: Tensor) -> None:
    for layer in quantized_layers(model).values():
        layer.shift_search.reset()
    twin = copy.deepcopy(model)
    model(x)
    torch._dynamo.reset()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    assert QuantRecord.from_model(twin) == QuantRecord.from_model(model)


def test_recurrent_layers_have_no_shifts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 6)
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(x)[0])

    x = torch.randn(5, 2, 4)
    converted = prepare_qat(Net(), None, x, search_n=True).train()
    calibrate(converted, [x])
    converted.eval()(x)
    record = QuantRecord.from_model(converted)
    assert not record["rnn"].shift_bit
    assert record["fc"].shift_bit


def test_the_amct_entry_point_takes_the_option(tmp_path: Path, x: Tensor) -> None:
    config, record = str(tmp_path / "config.json"), str(tmp_path / "record.txt")
    amct.create_quant_retrain_config(config, network(), x)
    converted = amct.create_quant_retrain_model(config, network(), record, x, search_n=True)
    converted.train()(x)
    with torch.no_grad():
        converted.eval()(x)
    assert all(layer.shift_bit for layer in QuantRecord.load(record).values())
