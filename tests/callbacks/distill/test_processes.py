"""A teacher in two processes: each has the weights of rank 0, outside of what DDP and FSDP take care of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ascend.fsdp.sharded import CNN, Base, Transformer, run
from tests.ascend.training import largest_difference

SCRIPT = """
import json, os, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
from tests.callbacks.conftest import loader
from tests.callbacks.distill.modules import Keep, Taught, by_hand, distilling, float_copy

out, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", "0"))
torch.set_num_threads(1)
found = {}

class Look(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        found["bucketed"] = sum(p.numel() for p in trainer.strategy.model.parameters())
        found["own"] = sum(p.numel() for p in pl_module.parameters())

def module():
    made = Taught()
    torch.manual_seed(100 + rank)  # as where nobody has seeded
    made.net[4].reset_parameters()
    return made

first = Taught()
torch.manual_seed(100)
first.net[4].reset_parameters()
teacher = float_copy(first.net)
for name, ckpt in (("whole", None), ("resumed", out / "a.ckpt")):
    taught, keep = module(), Keep()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=sys.argv[2], max_epochs=1 if ckpt is None else 2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        callbacks=[distilling(layers=["net.*"], output_loss="kl", layer_weight=0.0), keep, Look()],
        default_root_dir=out,
    )
    trainer.fit(taught, loader(batches=8), ckpt_path=ckpt)
    trainer.save_checkpoint(out / "a.ckpt")
    terms = [0.5 * by_hand(given, teacher(x)) for given, x in zip(taught.given, taught.seen)]
    found[name] = [(float(term), float(metric)) for term, metric in zip(terms, keep.metrics)]
found["weights"] = taught.net[4].weight.flatten().tolist()
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("strategy", ["ddp_find_unused_parameters_true"])
def test_two_processes_learn_from_the_float_model_of_the_first(tmp_path: Path, strategy: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path), strategy],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    for rank in ranks:
        assert rank["bucketed"] == rank["own"]
        assert [len(rank[name]) for name in ("whole", "resumed")] == [4, 4]
        for wanted, found in [*rank["whole"], *rank["resumed"]]:
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert ranks[0]["whole"] != ranks[1]["whole"]


@pytest.mark.npu(nproc=2)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("model", [CNN, Transformer])
def test_a_sharded_student_is_taught_as_a_whole_one(
    tmp_path_factory: pytest.TempPathFactory, model: type[Base], offload: bool
) -> None:
    layers = {"layers": ["encoder.*" if model is Transformer else "net.*"]}
    rank = os.environ.get("RANK", "0")
    folders = [tmp_path_factory.mktemp(f"run{number}of{rank}") for number in range(3)]
    expected, _ = run(folders[0], model("sgd"), strategy="ascend", quantize={"distill": layers})
    losses, _ = run(folders[1], model("sgd"), quantize={"distill": {**layers, "offload": offload}})
    untaught, _ = run(folders[2], model("sgd"))
    assert largest_difference(losses, expected) <= 1e-5
    assert largest_difference(losses, untaught) > 1e-4
