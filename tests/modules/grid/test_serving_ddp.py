"""Layers of ``target="serving"`` in data-parallel training: processes agree, and each computes as the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_lightning import prepare_qat
from amct_lightning.modules.calibration import synchronize_calibration
from amct_lightning.modules.grid.serving import serving_factors

WORLD = 2


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(rank)).bfloat16() * (1 + rank)
    qat: Any = prepare_qat(net, None, x, target="serving").train()
    qat(x)
    synchronize_calibration(qat)
    model = DistributedDataParallel(qat)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    test = torch.randn(5, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
    found = {"parameters": [p.detach() for p in qat.parameters()], "output": qat.eval()(test).detach()}
    found["factors"] = [tensor for index in (0, 2) for tensor in serving_factors(qat[index])[:6]]
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_processes_have_the_same_factors_and_outputs(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert torch.equal(first["output"], second["output"])
    for key in ("parameters", "factors"):
        for ours, theirs in zip(first[key], second[key], strict=True):
            assert torch.equal(ours, theirs)
