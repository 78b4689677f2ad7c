"""An LSTM in INT8: it reads handwritten digits row by row, eight rows of eight pixels.

One run of a Trainer does it all, by a schedule: the network learns in float, then its first batch with quantization
calibrates the ranges, then ranges and weights are learned together, and for the last epochs ranges and weight scales
stand still. The same run without quantization shows what INT8 costs.

    python examples/recurrent.py
    amct-lightning fit --config examples/recurrent.yaml    # the run with quantization
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from amct_lightning import QuantRetrainCallback, QuantSchedule, calibrate, conversion_report, prepare_qat

SCHEDULE = QuantSchedule(start=0.6, freeze_data=0.9, freeze_weights=0.9)


class RowReader(pl.LightningModule):
    """An LSTM over the rows of an image and a classifier on its last output.

    Args:
        hidden: Size of the LSTM.
        lr: Learning rate at the start of the cosine schedule.
    """

    def __init__(self, hidden: int = 48, lr: float = 5e-3) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size=8, hidden_size=hidden, batch_first=True)  # one layer, one direction
        self.head = nn.Linear(hidden, 10)
        self.lr = lr
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.example_input_array = torch.zeros(1, 8, 8)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the class scores."""
        outputs, _ = self.lstm(rows)
        return self.head(outputs[:, -1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        rows, labels = batch
        loss = functional.cross_entropy(self(rows), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on held-out digits."""
        rows, labels = batch
        self.accuracy(self(rows), labels)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """Adam with a cosine schedule over the whole training."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class RowDigits(pl.LightningDataModule):
    """1,797 handwritten digits that ship with scikit-learn, 450 of them held out.

    Args:
        seed: Chooses the held-out digits, and the order of the others.
    """

    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        self.seed = seed
        data = load_digits()
        rows, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self.test, self.train = (TensorDataset(rows[part], labels[part]) for part in (order[:450], order[450:]))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the digits to learn from."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, 32, shuffle=True, generator=generator, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out digits."""
        return DataLoader(self.test, 450)


def fit(name: str, args: argparse.Namespace, callbacks: list[pl.Callback]) -> RowReader:
    """Train from scratch; with the same seed, every training begins alike."""
    pl.seed_everything(args.seed, verbose=False)
    model = RowReader()
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=CSVLogger(args.out / "logs", name=name),
        callbacks=[
            *callbacks,
            ModelCheckpoint(args.out, filename=name, enable_version_counter=False),
            RichProgressBar(),
        ],
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=RowDigits(args.seed))
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: RowDigits) -> float:
    """Share of the held-out digits that a network reads correctly."""
    rows, labels = data.test.tensors
    return float((model.eval()(rows).argmax(1) == labels).float().mean())


def main() -> None:
    """Train twice, with and without quantization, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/recurrent"), help="folder for all files")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster with more

    data = RowDigits(args.seed)
    float_model = fit("fp32", args, [])
    calibrated = prepare_qat(float_model, None, float_model.example_input_array)
    calibrate(calibrated, (rows for rows, _ in data.train_dataloader()))
    record = args.out / "int8.record.txt"
    quantized = fit("int8", args, [QuantRetrainCallback(record_file=record, schedule=SCHEDULE)])

    table = Table(title="Accuracy on 450 held-out digits, read row by row")
    table.add_column("network")
    table.add_column("accuracy", justify="right")
    table.add_row("FP32", f"{accuracy(float_model, data):.1%}")
    table.add_row("the same in INT8, calibrated only", f"{accuracy(calibrated, data):.1%}")
    table.add_row("INT8, trained", f"{accuracy(quantized, data):.1%}")
    console = Console()
    console.print(str(conversion_report(quantized)), table, highlight=False)
    console.print(f"Checkpoint: {args.out / 'int8.ckpt'}\nRecord file: {record}", highlight=False)


if __name__ == "__main__":
    main()
