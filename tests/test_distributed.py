"""Data-parallel training on two CPU processes: one set of factors, one collective, one record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import amct_lightning as amct
from amct_lightning.modules import activation_quantizers

STEPS = 3
WORLD = 2


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))


def local_batch(rank: int) -> Tensor:
    """Every rank sees data of another range."""
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(rank)) * (1.0 + 2.0 * rank)


class Collectives:
    """Count the collectives that Python code asks for; DDP reduces gradients below Python."""

    def __init__(self) -> None:
        self.calls = 0
        self._all_reduce = dist.all_reduce
        dist.all_reduce = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._all_reduce(*args, **kwargs)


def factors(model: nn.Module) -> list[float]:
    return [
        value
        for quantizer in activation_quantizers(model).values()
        for value in (quantizer.clip_max.item(), quantizer.clip_min.item())
    ]


def worker(rank: int, folder: str, batch_num: int) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=WORLD)
    try:
        (root / f"rank{rank}.json").write_text(json.dumps(train(rank, root, batch_num)))
    finally:
        dist.destroy_process_group()


def train(rank: int, root: Path, batch_num: int) -> dict[str, Any]:
    x = local_batch(rank)
    own = root / str(rank)
    own.mkdir()
    config, record = str(own / "config.json"), str(own / "record.txt")
    amct.create_quant_retrain_config(config, network(), x)
    text = Path(config).read_text().replace('"batch_num":1', f'"batch_num":{batch_num}')
    Path(config).write_text(text)
    converted = amct.create_quant_retrain_model(config, network(), record, x)
    collectives = Collectives()
    model = DistributedDataParallel(converted).train()
    # What decays differs for good if a clip was different once: momentum keeps it.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    trajectory, calls = [], []
    for _ in range(STEPS):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trajectory.append(factors(model))
        calls.append(collectives.calls)
    model.eval()
    with torch.no_grad():
        model(x)
    weights = [p.double().sum().item() for p in model.parameters()]
    return {
        "factors": trajectory,
        "weights": weights,
        "calls": calls,
        "record": Path(record).read_text(),
        "calls_after_eval": collectives.calls,
    }


@dataclass(frozen=True)
class Outcome:
    batch_num: int
    ranks: list[dict[str, Any]]

    def of_both(self, key: str) -> tuple[Any, Any]:
        return self.ranks[0][key], self.ranks[1][key]


@pytest.fixture(scope="module", params=[1, 2], ids=lambda number: f"batch_num={number}")
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(worker, args=(str(folder), request.param), nprocs=WORLD)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]
    return Outcome(request.param, ranks)


def test_the_factors_are_equal_on_both_ranks_after_every_step_from_calibration_on(outcome: Outcome) -> None:
    first, second = outcome.of_both("factors")
    assert first[outcome.batch_num - 1 :] == second[outcome.batch_num - 1 :]


def test_the_parameters_are_equal_on_both_ranks(outcome: Outcome) -> None:
    first, second = outcome.of_both("weights")
    assert first == second


def test_the_clips_learn(outcome: Outcome) -> None:
    trajectory = outcome.ranks[0]["factors"]
    assert trajectory[-1] != trajectory[-2]


def test_the_whole_calibration_takes_one_collective(outcome: Outcome) -> None:
    assert [rank["calls"][-1] for rank in outcome.ranks] == [1, 1]


def test_evaluation_takes_no_collective(outcome: Outcome) -> None:
    assert all(rank["calls_after_eval"] == rank["calls"][-1] for rank in outcome.ranks)


def test_only_rank_zero_writes_the_record(outcome: Outcome) -> None:
    written, other = outcome.of_both("record")
    assert list(amct.QuantRecord.from_text(written)) == ["0", "4"]
    assert other == ""


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_wrapped_model_comes_back_wrapped_alike_with_its_clips_reduced(tmp_path: Path) -> None:
    """AMCT converts what is inside the wrapper, which then does not know the clips."""
    config, record, x = str(tmp_path / "config.json"), str(tmp_path / "record.txt"), local_batch(0)
    wrapped = DistributedDataParallel(network(), find_unused_parameters=True)
    amct.create_quant_retrain_config(config, wrapped, x)
    converted = amct.create_quant_retrain_model(config, wrapped, record, x)
    assert isinstance(converted, DistributedDataParallel)
    assert converted.find_unused_parameters
    assert "module.0.input_quantizer.clip_max" in dict(converted.named_parameters())
    assert not any("quantizer" in name for name, _ in wrapped.named_parameters())
    converted.train()(x).sum().backward()
    converted.eval()(x)
    assert list(amct.QuantRecord.load(record)) == ["0", "4"]
