"""Schedules on two CPU processes under Lightning's DDP strategy, without a search for unused parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amct_lightning import QuantRecord
from tests.callbacks.conftest import BATCHES
from tests.callbacks.schedule.test_freezing import FROM, STEPS

SCRIPT = """
import json, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from lightning.pytorch.callbacks import EMAWeightAveraging
from amct_lightning import QuantRecord, QuantRetrainCallback, QuantSchedule
from amct_lightning.callbacks.averaging import averaged_modules
from tests.callbacks.conftest import Net, loader
from tests.callbacks.schedule.test_freezing import FROM, Frozen, epochs, factors

out = Path(sys.argv[1])
torch.set_num_threads(1)

class Compare(pl.Callback):
    \"\"\"Notes the factors after each batch, and whether they are those of the other process.\"\"\"

    def __init__(self):
        self.equal, self.seen, self.phases = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        modules = [pl_module, *averaged_modules(trainer)]
        mine = torch.cat([value.double().flatten() for module in modules for name, value in factors(module).items()
                          if "running" not in name and "tracked" not in name])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        self.equal.append(torch.equal(*both))
        self.phases.append(int(trainer.callback_metrics["quant_phase"]))
        self.seen.append({name: value.flatten().tolist() for name, value in factors(pl_module).items()})

def fit(name, model, callback, others=(), **settings):
    compare = Compare()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, default_root_dir=out,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[callback, *others, compare], **settings,
    )
    pl.seed_everything(0)
    trainer.fit(model, loader(batches=8), loader(1))
    trainer.save_checkpoint(out / f"{name}.ckpt")
    results[name] = {"equal": compare.equal, "phases": compare.phases, "seen": compare.seen}
    return trainer.global_rank

class Deep(Frozen):
    \"\"\"Two layers to be frozen, with max-abs scales and with learned ones, and one that is not.\"\"\"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                 nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 3))

LAYERS = {"layers": {name: {"weights": {"algo": "ulq_retrain"}} for name in ("net.3", "net.5")}}
results = {}
ULQ = {"weights": {"algo": "ulq_retrain"}}
fit("start", Net(), QuantRetrainCallback(ULQ, out / "start.txt", schedule=QuantSchedule(
    calibrate=[1, 3], start=1, calibrate_batches=2, layers={"net.4": {"start": 2, "calibrate": [1, 3]}})),
    others=[EMAWeightAveraging(decay=0.9)], max_epochs=4)
rank = fit("frozen", Deep("adamw"), QuantRetrainCallback(LAYERS, out / "frozen.txt", quant_weight_decay=None,
    schedule=QuantSchedule(freeze_data=FROM, freeze_weights=FROM, freeze_bn=FROM,
                           layers={"net.5": {"freeze_data": None, "freeze_weights": None}})), max_epochs=epochs())
(out / f"rank{rank}.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("ddp")
    script = out / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning:amct_lightning", str(script), str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("run", ["start", "frozen"])
def test_factors_are_the_same_on_both_processes_after_every_step(ranks: Any, run: str) -> None:
    """Also those in an average of the weights, and after a calibration that goes over an old one."""
    out, results = ranks
    for result in results:
        assert all(result[run]["equal"])
    assert results[0][run]["phases"] == results[1][run]["phases"]
    assert QuantRecord.load(out / f"{run}.record.txt") == QuantRecord.load(out / f"{run}.txt")


def test_a_float_phase_has_no_unused_parameters(ranks: Any) -> None:
    phases = ranks[1][0]["start"]["phases"]
    assert phases == [0, 0, 0, 0, 1, 1, 0, 0, 2, 2, 2, 2, 1, 1, 2, 2]


def test_a_calibration_anew_gives_other_ranges(ranks: Any) -> None:
    clips = [seen["net.4.input_quantizer.clip_max"][0] for seen in ranks[1][0]["start"]["seen"]]
    assert len(set(clips[5:8])) == 1
    assert abs(clips[13] - clips[11]) > 3 * abs(clips[11] - clips[10])


def test_frozen_factors_stay_bit_identical_and_the_neighbour_moves(ranks: Any) -> None:
    for result in ranks[1]:
        after = result["frozen"]["seen"][FROM * BATCHES :]
        assert len(after) == STEPS
        for name in after[0]:
            assert (len({tuple(seen[name]) for seen in after}) == 1) != name.startswith("net.5"), name
