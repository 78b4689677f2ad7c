"""One run with a schedule and a monitor, and its report: float, calibrating, learning, frozen.

Trains the network of the digits example in float, quantizes it on the way (A8W8 and A4W4 layers), freezes the
factors, and writes ``report.html`` and ``report.png``, the picture in the README.

    python examples/digits_report.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits_data import digits
from digits_model import Digits
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from amct_lightning import QuantMonitor, QuantRetrainCallback, QuantSchedule
from amct_lightning.run_report import write_picture, write_report

CONFIG = {
    "types": {"Linear": {"activations": {"dst_type": "INT4"}, "weights": {"dst_type": "INT4"}}},
    "layers": {"net.*.3": {"activations": {"dst_type": "INT4"}, "weights": {"dst_type": "INT4"}}},
}
SCHEDULE = QuantSchedule(start=0.4, calibrate_batches=30, freeze_data=0.8, freeze_weights=0.8, freeze_bn=0.8)


def main() -> None:
    """Train, and write report and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/digits_report"), help="folder for logs and report")
    parser.add_argument("--epochs", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pl.seed_everything(7)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=CSVLogger(args.out),
        callbacks=[
            QuantRetrainCallback(CONFIG, args.out / "record.txt", schedule=SCHEDULE),
            QuantMonitor(),
            ModelCheckpoint(save_last=True),
        ],
        log_every_n_steps=10,
    )
    trainer.fit(Digits(), *digits(7))
    print(f"Report: {write_report(trainer.log_dir, args.out / 'report.html')}")
    print(f"Picture: {write_picture(trainer.log_dir, args.out / 'report.png')}")


if __name__ == "__main__":
    main()
