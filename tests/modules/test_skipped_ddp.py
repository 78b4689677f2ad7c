"""A layer that only some processes run: its factors stay equal on all of them, also when a clip becomes unusable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import amct_lightning as amct
from amct_lightning import QuantRetrainCallback
from amct_lightning.modules import learned_factors

WORLD, STEPS = 2, 6
SKIPPED = {"late": (1, (0, 1)), "repaired": (1, (3,)), "first": (0, (0, 3, 4))}
"""Which rank does not run the expert, in which steps. Its clip becomes unusable between steps 2 and 3, see below."""


class Experts(nn.Module):
    """One layer that all ranks run, and an expert that they may skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)
        self.runs = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.expert(x) if self.runs else x


def spoil(model: Experts, step: int) -> None:
    """Do to the clip what a large step of the optimizer does: alike on all ranks, as all optimizer steps are."""
    with torch.no_grad():
        clips = model.expert.input_quantizer
        clips.clip_max.fill_({1: 3.0, 2: -0.5, 4: -0.1}.get(step, clips.clip_max))


class Lit(pl.LightningModule):
    def __init__(self, rank: int, case: str) -> None:
        super().__init__()
        self.net, self.rank_of_process, self.case = Experts(), rank, case
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rank, steps = SKIPPED[self.case]
        self.net.runs = not (self.rank_of_process == rank and batch_idx in steps)
        return self.net(batch[0]).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(factors_of(self.net))
        spoil(self.net, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def factors_of(model: nn.Module) -> Tensor:
    return torch.cat([factor.detach().flatten() for factor in learned_factors(model)])


def data(rank: int) -> Tensor:
    return torch.randn(STEPS, 2, 4, generator=torch.Generator().manual_seed(rank)) * (1 + rank)


CHOICES: dict[str, Any] = {"weights": {"algo": "ulq_retrain"}}


def plain(rank: int, case: str, folder: Path) -> list[Tensor]:
    own = folder / f"{case}{rank}"
    own.mkdir()
    config = amct.RetrainConfig.default(Experts(), torch.ones(1, 4))
    config.to_json(own / "c.json")
    text = (own / "c.json").read_text().replace("arq_retrain", "ulq_retrain")
    (own / "c.json").write_text(text)
    model = amct.create_quant_retrain_model(str(own / "c.json"), Experts(), str(own / "r.txt"), torch.ones(1, 4))
    with torch.no_grad():
        model.expert.weight.mul_(2)  # as loading weights does; the scales begin with the first training step
    wrapped = DistributedDataParallel(model.train(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    seen = []
    for step, x in enumerate(data(rank)):
        model.runs = not (SKIPPED[case][0] == rank and step in SKIPPED[case][1])
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
        seen.append(factors_of(model))
        spoil(model, step)
    return seen


def lightning(rank: int, case: str, folder: Path) -> list[Tensor]:
    callback = QuantRetrainCallback(CHOICES, folder / f"{case}.txt", input_data=torch.ones(1, 4))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(find_unused_parameters=True),
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[callback],
        default_root_dir=folder,
    )
    model = Lit(rank, case)
    trainer.fit(model, DataLoader(TensorDataset(data(rank).flatten(0, 1)), 2))
    return model.seen


def worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "NODE_RANK": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {(name, case): run(rank, case, Path(folder)) for name, run in RUNS.items() for case in SKIPPED}
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


RUNS = {"plain": plain, "lightning": lightning}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], list[Tensor]]]:
    folder = tmp_path_factory.mktemp("skipped")
    mp.spawn(worker, args=(str(folder), 29517), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", SKIPPED)
@pytest.mark.parametrize("run", RUNS)
def test_factors_of_a_layer_that_a_process_skips_stay_equal(
    ranks: list[dict[tuple[str, str], list[Tensor]]], run: str, case: str
) -> None:
    first, second = ranks[0][run, case], ranks[1][run, case]
    assert len(first) == STEPS
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True] * STEPS
