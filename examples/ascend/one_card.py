"""Quantization-aware training on one Ascend NPU.

    python examples/ascend/one_card.py
    ASCEND_RT_VISIBLE_DEVICES=3 python examples/ascend/one_card.py    # on another card than the first

Float first, then INT8, in one run. Where there is no NPU, it says why and what to do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from network import DigitsData, DigitsNet

from amct_lightning import QuantRetrainCallback, QuantSchedule


def main() -> None:
    """Train, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ascend_one_card"), help="folder for all files")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()

    pl.seed_everything(7)
    # --8<-- [start:trainer]
    trainer = pl.Trainer(
        accelerator="npu",
        devices=1,
        strategy="ascend",  # also for one card: Lightning's own choice would be the CPU
        max_epochs=args.epochs,
        callbacks=[
            QuantRetrainCallback(record_file=args.out / "record.txt", schedule=QuantSchedule(start=0.5)),
            ModelCheckpoint(args.out, filename="int8", enable_version_counter=False),
        ],
        logger=CSVLogger(args.out, name="logs"),
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    # --8<-- [end:trainer]
    trainer.fit(DigitsNet(), datamodule=DigitsData())
    print(f"Right: {trainer.callback_metrics['val_acc']:.1%} of the held-out digits. Record: {args.out / 'record.txt'}")


if __name__ == "__main__":
    main()
