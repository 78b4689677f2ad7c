"""When plain PyTorch use writes its record file: whenever the record would be another one, and only then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import amct_lightning as amct
from amct_lightning import QuantRecord
from amct_lightning.quantizers import ShiftSearch
from tests.operators import Operators


def make(folder: Path, search_n: bool = False) -> nn.Module:
    """A calibrated network that writes ``record.txt``; it is in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    config, record, x = str(folder / "config.json"), str(folder / "record.txt"), batch()
    amct.create_quant_retrain_config(config, model, x)
    converted = amct.create_quant_retrain_model(config, model, record, x, search_n=search_n)
    converted.train()(x)
    return converted.eval()


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def replaced(parameter: nn.Parameter) -> None:
    parameter.data = parameter.detach() * 1.5


def written_into(parameter: nn.Parameter) -> None:
    parameter.data.mul_(1.5)


def is_present(folder: Path, model: nn.Module) -> bool:
    return QuantRecord.load(folder / "record.txt") == QuantRecord.from_model(model)


@pytest.mark.parametrize("change", [replaced, written_into])
@pytest.mark.parametrize("name", ["0.weight", "1.weight", "4.weight", "4.input_quantizer.clip_max"])
def test_averages_that_take_the_place_of_the_weights_are_recorded(
    tmp_path: Path, change: Callable[[nn.Parameter], None], name: str
) -> None:
    model = make(tmp_path)
    model(batch())
    before = QuantRecord.load(tmp_path / "record.txt")
    change(model.get_parameter(name))
    model(batch())
    assert is_present(tmp_path, model)
    assert QuantRecord.load(tmp_path / "record.txt") != before


def test_a_change_that_leaves_the_record_as_it_is_writes_nothing(tmp_path: Path) -> None:
    model = make(tmp_path)
    model(batch())
    (tmp_path / "record.txt").write_text("touched")
    model[1].num_batches_tracked.add_(1)
    model(batch())
    assert (tmp_path / "record.txt").read_text() == "touched"


def test_the_search_of_shifts_writes_only_when_a_shift_is_another_one(tmp_path: Path) -> None:
    """The errors grow with every batch, but the best shift rarely changes."""
    model, record = make(tmp_path, search_n=True), tmp_path / "record.txt"
    model(batch())
    inodes = {record.stat().st_ino}
    for _ in range(5):
        model(batch())
        inodes.add(record.stat().st_ino)
    assert len(inodes) == 1
    assert is_present(tmp_path, model)
    model(300 * batch(1))
    assert is_present(tmp_path, model)
    assert record.stat().st_ino not in inodes


def test_an_evaluation_reads_one_number(tmp_path: Path) -> None:
    model = make(tmp_path)
    model(batch())
    with Operators() as operators:
        model(batch())
    assert sum(operators.host_reads.values()) == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("search_n", [False, True])
def test_the_model_can_be_exported_which_is_no_evaluation(tmp_path: Path, strict: bool, search_n: bool) -> None:
    model, x = make(tmp_path, search_n), batch()
    exported = torch.export.export(model, (x,), strict=strict).module()
    assert (tmp_path / "record.txt").read_text() == ""
    assert all(search.batches == 0 for search in model.modules() if isinstance(search, ShiftSearch))
    assert torch.equal(exported(x), model(x))
    assert is_present(tmp_path, model)
