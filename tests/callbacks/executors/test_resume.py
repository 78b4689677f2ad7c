"""A training under each executor: interrupted and resumed it is the same to the bit, and on several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._pytree import tree_flatten

from amct_lightning import QuantRetrainCallback, prepare_qat
from amct_lightning.api import create_quant_retrain_config, create_quant_retrain_model
from amct_lightning.modules.fused import forward
from amct_lightning.modules.fused.choice import execution_of
from amct_lightning.quantizers.executors import executor_for
from amct_lightning.quantizers.executors.compiled import CompiledExecutor
from tests.callbacks.conftest import Net, loader

EPOCHS = 4


def fit(out: Path, execution: Any, epochs: int = EPOCHS, resume: Path | None = None, **choices: Any) -> Net:
    """Train, keeping a checkpoint of each epoch."""
    torch.manual_seed(0)
    net = Net()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[
            QuantRetrainCallback({"batch_num": 6, **choices}, out / "record.txt", execution=execution),
            ModelCheckpoint(out, "{epoch}", save_top_k=-1, save_last=True, enable_version_counter=False),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(net, loader(), loader(1), ckpt_path=resume)
    return net


def tensors_of(path: Path) -> list[Any]:
    checkpoint = torch.load(path, weights_only=True)
    kept = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "epoch", "global_step")}
    return tree_flatten(kept)[0]


def equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("execution", ["compiled", "integer"])
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_a_resumed_training_is_equal_to_the_bit(tmp_path: Path, execution: str, algo: str) -> None:
    """Interrupted in the middle of calibration, which takes an epoch and a half, and after it."""
    weights = {"weights": {"algo": algo}}
    fit(tmp_path / "whole", execution, **weights)
    whole = tensors_of(tmp_path / "whole" / "last.ckpt")
    for epoch in (0, 2):
        out = tmp_path / f"from{epoch}"
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*execution=.*")
            fit(out, execution, resume=tmp_path / "whole" / f"epoch={epoch}.ckpt", **weights)
        assert equal(tensors_of(out / "last.ckpt"), whole)
        assert (out / "record.txt").read_text() == (tmp_path / "whole" / "record.txt").read_text()


def test_the_executors_train_the_same_model(tmp_path: Path) -> None:
    """While it calibrates to the bit; later the sums of some gradients have another order."""
    nets = [fit(tmp_path / execution, execution, epochs=1) for execution in ("composite", "compiled", "integer")]
    assert [execution_of(net) for net in nets] == ["composite", "compiled", "integer"]
    reference, compiled, integer = (net.state_dict() for net in nets)
    assert reference.keys() == compiled.keys() == integer.keys()
    assert all(torch.equal(value, compiled[name]) for name, value in reference.items() if "clip_" not in name)


@pytest.mark.parametrize(("before", "after"), [("composite", "compiled"), ("compiled", "integer")])
def test_going_on_with_another_executor_is_told(tmp_path: Path, before: str, after: str) -> None:
    fit(tmp_path, before, epochs=1)
    with pytest.warns(UserWarning, match=f"written with execution='{before}'.*now run with '{after}'"):
        fit(tmp_path / "on", after, epochs=2, resume=tmp_path / "last.ckpt")


def test_auto_goes_by_what_it_stands_for(tmp_path: Path) -> None:
    fit(tmp_path, "composite", epochs=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path / "on", "auto", epochs=2, resume=tmp_path / "last.ckpt")  # the reference, in this suite
    assert not [warning for warning in told if "execution=" in str(warning.message)]


def test_the_fixture_lets_each_executor_run(every_execution: str, tmp_path: Path) -> None:
    assert execution_of(fit(tmp_path, "auto", epochs=1)) == every_execution
    assert isinstance(executor_for("auto", "cpu"), CompiledExecutor) == (every_execution != "composite")
    assert forward._in_integers("auto", "cpu") == (every_execution == "integer")


@pytest.mark.parametrize("value", ["eager", "", "Compiled", None])
def test_other_values_are_refused(value: Any, tmp_path: Path) -> None:
    words = rf"\(execution={value!r}\): must be one of auto, composite, compiled, integer"
    with pytest.raises(ValueError, match=f"QuantRetrainCallback{words}"):
        QuantRetrainCallback(None, execution=value)
    model, x = Net().net, torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=f"prepare_qat{words}"):
        prepare_qat(model, None, x, execution=value)
    create_quant_retrain_config(str(tmp_path / "a.json"), model, x)
    with pytest.raises(ValueError, match=words):
        create_quant_retrain_model(str(tmp_path / "a.json"), model, str(tmp_path / "r.txt"), x, execution=value)


SCRIPT = """
import json, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from amct_lightning import QuantRetrainCallback
from amct_lightning.quantizers.executors import executor_for
from tests.callbacks.conftest import Net, loader

class Compare(pl.Callback):
    steps = []
    def on_train_batch_end(self, trainer, pl_module, *args):
        mine = torch.cat([value.detach().float().flatten() for value in pl_module.state_dict().values()])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        names = {n for n, v in pl_module.state_dict().items() if "running" in n or "batches" in n}
        self.steps.append(all(
            torch.equal(a, b) for a, b in zip(*(split(pl_module, values, names) for values in both))
        ))

def split(module, flat, without):
    sizes = [value.numel() for value in module.state_dict().values()]
    parts = flat.split(sizes)
    return [part for name, part in zip(module.state_dict(), parts) if name not in without]

torch.set_num_threads(1)
out = Path(sys.argv[1])
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, default_root_dir=out,
    callbacks=[QuantRetrainCallback({"batch_num": 2}, out / "r.txt", execution="compiled"), Compare()],
)
pl.seed_everything(0)
net = Net()
trainer.fit(net, loader(batches=8))
kernels = len(executor_for("compiled", "cpu")._kernels)
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps({"equal": Compare.steps, "kernels": kernels}))
"""


def test_two_processes_have_equal_weights_and_factors(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["equal"] == [True] * 8
        assert found["kernels"] >= 4
