"""Quantization-aware training on the eight Ascend NPUs of a server.

    python examples/ascend/eight_cards.py
    ASCEND_RT_VISIBLE_DEVICES=4,5 python examples/ascend/eight_cards.py --devices 2    # on two of them

Lightning starts this script once more for every further card. Each card learns from its part of the data, in bf16
where that is enough; gradients are averaged over HCCL, and statistics of BatchNorm are taken over all cards.
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
    parser.add_argument("--out", type=Path, default=Path("runs/ascend_eight_cards"), help="folder for all files")
    parser.add_argument("--devices", type=int, default=8, help="number of cards")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    pl.seed_everything(7)  # the same weights on every card
    # --8<-- [start:trainer]
    trainer = pl.Trainer(
        accelerator="npu",
        devices=args.devices,
        strategy="ascend",
        precision="bf16-mixed",  # factors of the quantization stay float32
        sync_batchnorm=True,  # a card sees few samples
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
    if trainer.is_global_zero:  # this script runs on every card
        print(f"Right: {trainer.callback_metrics['val_acc']:.1%} of the held-out digits. Files: {args.out}")


if __name__ == "__main__":
    main()
