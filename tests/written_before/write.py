"""Writes `files/`: python -m tests.written_before.write

Run once, at commit 58b7484, before `callbacks/`, `ascend/` and `amct/` had their folders. Its files are what users
have from that time; they are not written again.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from amct_lightning import RetrainConfig, convert_amct_state_dict, create_quant_retrain_model
from tests.written_before.network import FILES, Net, batches, fit


def write(folder: Path) -> None:
    torch.manual_seed(1)
    torch.save(Net().state_dict(), FILES / "init.pt")
    fit(folder, 3)
    for name in ("epoch0.ckpt", "epoch1.ckpt", "epoch2.ckpt", "epoch2.record.txt", "metrics.csv", "quant_monitor.csv"):
        found = next(folder.rglob(name))
        shutil.copy(found, FILES / name)
    x = next(iter(batches()))[0]
    RetrainConfig.default(Net(), x).to_json(FILES / "config.json")
    plain = create_quant_retrain_model(str(FILES / "config.json"), Net(), str(FILES / "plain.txt"), x)
    plain(x)
    torch.save(plain.state_dict(), FILES / "plain.pt")
    torch.save(convert_amct_state_dict(plain.state_dict(), plain, to_amct=True), FILES / "amct.pt")
    plain.eval()(x)


if __name__ == "__main__":
    FILES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
