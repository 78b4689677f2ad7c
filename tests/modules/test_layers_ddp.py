"""Every QAT layer type in data-parallel training: one spawn, two CPU processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from amct_lightning.modules import learned_factors
from amct_lightning.modules.calibration import synchronize_calibration
from amct_lightning.modules.shift_hook import synchronize_shift_search
from amct_lightning.quantizers import ShiftSearch
from tests.modules.cases import LAYERS, LINEAR_INPUTS, LayerCase, Width, converted

WORLD = 2
_LINEAR = next(case for case in LAYERS if case.name == "linear")
CASES = {f"{case.name}-{width}": (case, width) for case in LAYERS for width in (Width(), Width(algo="ulq_retrain"))}
CASES |= {f"linear-{width}": (_LINEAR, width) for width in LINEAR_INPUTS}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {name: train(rank, *case) for name, case in CASES.items()}
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    torch.save(search(rank), Path(folder) / f"search{rank}.pt")
    dist.destroy_process_group()


def train(rank: int, case: LayerCase, width: Width) -> dict[str, list[torch.Tensor]]:
    qat = converted(case, width)
    synchronize_calibration(qat.model)
    model = DistributedDataParallel(qat.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(qat.x.shape, generator=torch.Generator().manual_seed(rank)) * (1 + rank)
    before = [factor.detach().clone() for factor in learned_factors(model)]
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {
        "parameters": [p.detach() for p in model.parameters()],
        "before": before,
        "factors": [factor.detach() for factor in learned_factors(model)],
    }


def outputs(rank: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(rank)) * 1000 * (1 + 20 * rank)


def search(rank: int) -> list[torch.Tensor]:
    """Search the shifts of one layer on this rank's data, and put the ranks together."""
    model = torch.nn.Module()
    model.search = ShiftSearch(3)
    model.search.update(outputs(rank), torch.ones(3))
    synchronize_shift_search(model)
    return [model.search.errors, model.search.batches]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, list[torch.Tensor]]]]:
    folder = tmp_path_factory.getbasetemp() / "layers_ddp"
    folder.mkdir()
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_weights_and_factors_stay_equal_on_all_ranks(
    ranks: list[dict[str, dict[str, list[torch.Tensor]]]], name: str
) -> None:
    first, second = ranks[0][name]["parameters"], ranks[1][name]["parameters"]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_factor_moves(ranks: list[dict[str, dict[str, list[torch.Tensor]]]], name: str) -> None:
    before, after = ranks[0][name]["before"], ranks[0][name]["factors"]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_search_of_shifts_adds_up_the_ranks(
    ranks: list[dict[str, dict[str, list[torch.Tensor]]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = ShiftSearch(3)
    for rank in range(WORLD):
        expected.update(outputs(rank), torch.ones(3))
    for rank in range(WORLD):
        path = tmp_path_factory.getbasetemp() / "layers_ddp" / f"search{rank}.pt"
        errors, batches = torch.load(path, weights_only=True)
        torch.testing.assert_close(errors, expected.errors)
        assert batches == WORLD
