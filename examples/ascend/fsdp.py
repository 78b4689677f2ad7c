"""Quantization-aware training of a model that is sharded over the eight Ascend NPUs of a server.

    python examples/ascend/fsdp.py
    python examples/ascend/fsdp.py --devices 2

Every card has a part of the weights, of the gradients and of the optimizer's state; a block of the network is gathered
when its turn comes. For models that are too large for a card, which this one is not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from network import DeepNet, DigitsData

from amct_lightning import AscendFSDPStrategy, QuantRetrainCallback, QuantSchedule


def main() -> None:
    """Train, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ascend_fsdp"), help="folder for all files")
    parser.add_argument("--devices", type=int, default=8, help="number of cards")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    pl.seed_everything(7)  # the same weights on every card
    # --8<-- [start:trainer]
    trainer = pl.Trainer(
        accelerator="npu",
        devices=args.devices,
        strategy=AscendFSDPStrategy(units=["Block"]),  # a Block's weights are gathered together
        max_epochs=args.epochs,
        callbacks=[
            QuantRetrainCallback(record_file=args.out / "record.txt", schedule=QuantSchedule(start=0.5)),
            ModelCheckpoint(args.out, filename="int8", enable_version_counter=False),  # a folder, with a file per card
        ],
        logger=CSVLogger(args.out, name="logs"),
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    # --8<-- [end:trainer]
    trainer.fit(DeepNet(), datamodule=DigitsData())
    if trainer.is_global_zero:  # this script runs on every card
        print(f"Right: {trainer.callback_metrics['val_acc']:.1%} of the held-out digits. Files: {args.out}")


if __name__ == "__main__":
    main()
