"""Quantization-aware training on two servers with eight Ascend NPUs each.

The launcher tells the processes who they are, so the same script is started by each of them. With torchrun, on both
servers, with --node-rank 0 and --node-rank 1:

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 29500 \
        examples/ascend/two_nodes.py

With SLURM:

    sbatch --nodes 2 --ntasks-per-node 8 --wrap "srun python examples/ascend/two_nodes.py"

With a scheduler that writes a rank table (MindCluster, Volcano, ModelArts), once in the container of each server:

    unset RANK LOCAL_RANK
    RANK_TABLE_FILE=/user/serverid/devindex/config/hccl.json python examples/ascend/two_nodes.py

``--out`` must be a folder that both servers see: only one process writes, and all read the checkpoint with which a
run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from network import DigitsData, DigitsNet

from amct_lightning import AscendStrategy, QuantRetrainCallback, QuantSchedule


def main() -> None:
    """Train, or go on with a training that was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ascend_two_nodes"), help="folder for all files")
    parser.add_argument("--devices", type=int, default=8, help="number of cards of each server")
    parser.add_argument("--nodes", type=int, default=2, help="number of servers")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    pl.seed_everything(7)  # the same weights on every card
    # --8<-- [start:trainer]
    trainer = pl.Trainer(
        accelerator="npu",
        devices=args.devices,  # of each server
        num_nodes=args.nodes,
        strategy=AscendStrategy(
            hccl_connect_timeout=600,  # seconds: servers seldom start at the same moment
            hccl_exec_timeout=3600,  # seconds: the longest time that one card may keep the others waiting
        ),
        max_epochs=args.epochs,
        callbacks=[
            QuantRetrainCallback(record_file=args.out / "record.txt", schedule=QuantSchedule(start=0.5)),
            ModelCheckpoint(args.out, filename="int8", save_last=True, enable_version_counter=False),
        ],
        logger=CSVLogger(args.out, name="logs"),
        log_every_n_steps=5,
        enable_model_summary=False,
    )
    # --8<-- [end:trainer]
    trainer.fit(DigitsNet(), datamodule=DigitsData(), ckpt_path="last")  # from the beginning if there is none
    if trainer.is_global_zero and "val_acc" in trainer.callback_metrics:
        print(f"Right: {trainer.callback_metrics['val_acc']:.1%} of the held-out digits. Files: {args.out}")


if __name__ == "__main__":
    main()
