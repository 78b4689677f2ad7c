"""Two CPU processes under Lightning's DDP strategy: equal factors after every step, one collective, one record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amct_lightning import QuantRecord

SCRIPT = """
import json, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from amct_lightning import QuantRetrainCallback, RetrainConfig
from amct_lightning.callbacks.checkpoints.records import RecordFile
from amct_lightning.modules import calibration, activation_quantizers
from tests.callbacks.conftest import Net, loader

out, batch_num = Path(sys.argv[1]), int(sys.argv[2])
collectives = []
reduce = calibration.dist.all_reduce

def counted(tensor, *args, **kwargs):
    collectives.append(list(tensor.shape))
    return reduce(tensor, *args, **kwargs)

class Compare(pl.Callback):
    steps = []
    def on_train_batch_end(self, trainer, pl_module, *args):
        factors = [p.detach() for q in activation_quantizers(pl_module).values() for p in (q.clip_max, q.clip_min)]
        factors += [q.scale for q in activation_quantizers(pl_module).values()]
        mine = torch.stack(factors)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        self.steps.append(torch.equal(*both))

config = RetrainConfig.default(Net(), torch.zeros(1, 2, 4, 4))
config.batch_num = batch_num
callback = QuantRetrainCallback(config, out / "r.txt")
saved = []
write = RecordFile.write
RecordFile.write = lambda self, text: (saved.append(text is not None), write(self, text))
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, callbacks=[callback, Compare()], default_root_dir=out,
)
calibration.dist.all_reduce = counted
pl.seed_everything(0)
trainer.fit(Net(), loader(batches=8))
trainer.save_checkpoint(out / "a.ckpt")
(out / f"rank{trainer.global_rank}.json").write_text(
    json.dumps({"equal": Compare.steps, "collectives": [c for c in collectives if c == [2, 5]], "saved": saved})
)
"""


@pytest.mark.parametrize("batch_num", [1, 2])
def test_two_processes_agree(tmp_path: Path, batch_num: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(batch_num)],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["equal"] == [True] * 8
        assert len(rank["collectives"]) == 1
    assert ranks[0]["saved"] == [True, True]  # at the end of training and at the checkpoint
    assert ranks[1]["saved"] == []
    assert QuantRecord.load(tmp_path / "r.txt") == QuantRecord.load(tmp_path / "a.record.txt")


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
