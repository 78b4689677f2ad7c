"""A transformer on tabular data in INT8, with learned weight scales, a schedule and a monitor.

Every column of a table becomes a token; attention between the columns finds out whether a tumour is malignant (569
cases, 30 measurements each, from scikit-learn). One run of a Trainer learns in float, then with fake quantization,
and holds all factors still at the end; ``QuantMonitor`` writes down how well each layer is quantized. The same run
without quantization shows what INT8 costs.

    python examples/tabular.py
    amct-lightning fit --config examples/tabular.yaml    # the run with quantization, to the bit
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
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from amct_lightning import QuantMonitor, QuantRetrainCallback, QuantSchedule, calibrate, prepare_qat

COLUMNS = 30
LEARNED_SCALES = {"weights": {"algo": "ulq_retrain"}}
SCHEDULE = QuantSchedule(start=0.5, freeze_data=0.9, freeze_weights=0.9)


class Attention(nn.Module):
    """Self-attention made of Linear layers, which can be quantized.

    ``nn.MultiheadAttention`` multiplies with its weights itself: there would be no layer to quantize in it.

    Args:
        width: Size of a token.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, tokens: Tensor) -> Tensor:
        """Let every token look at all others."""
        split = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.layers())
        return self.out(functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2))

    def layers(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Return the layers that read the tokens; they share one activation range."""
        return self.query, self.key, self.value


class Block(nn.Module):
    """Attention and a feed-forward part, each with a normalization before and a shortcut around it.

    Args:
        width: Size of a token.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens after the block."""
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class TabularTransformer(pl.LightningModule):
    """Columns as tokens, a token of its own for the answer, and transformer blocks.

    Args:
        width: Size of a token.
        depth: Number of blocks.
        heads: Number of heads.
        lr: Learning rate at the start of the cosine schedule.
    """

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 4, lr: float = 2e-3) -> None:
        super().__init__()
        self.hide = nn.Dropout(0.3)  # columns, or the network learns the few cases by heart
        self.scale = nn.Parameter(torch.randn(COLUMNS, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(COLUMNS, width))
        self.answer = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        self.lr = lr
        self.accuracy = BinaryAccuracy()
        self.example_input_array = torch.zeros(1, COLUMNS)

    def forward(self, rows: Tensor) -> Tensor:
        """Return one score per row, above 0 for malignant."""
        tokens = self.hide(rows).unsqueeze(-1) * self.scale + self.bias
        tokens = self.blocks(torch.cat((self.answer.expand(len(rows), -1, -1), tokens), dim=1))
        return self.head(self.norm(tokens[:, 0])).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        rows, labels = batch
        loss = functional.binary_cross_entropy_with_logits(self(rows), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on held-out cases."""
        rows, labels = batch
        self.accuracy(self(rows) > 0, labels)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with a cosine schedule over the whole training."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Tumours(pl.LightningDataModule):
    """The table, standardized; 200 of the 569 cases are held out.

    Args:
        seed: Chooses the held-out cases, and the order of the others.
    """

    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        self.seed = seed
        table = load_breast_cancer()
        rows, labels = torch.tensor(table.data, dtype=torch.float32), torch.tensor(table.target == 0).float()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        test, train = order[:200], order[200:]
        rows = (rows - rows[train].mean(0)) / rows[train].std(0)
        self.test, self.train = (TensorDataset(rows[part], labels[part]) for part in (test, train))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the cases to learn from."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, 32, shuffle=True, generator=generator, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out cases."""
        return DataLoader(self.test, 200)


def fit(name: str, args: argparse.Namespace, callbacks: list[pl.Callback]) -> TabularTransformer:
    """Train from scratch; with the same seed, every training begins alike."""
    pl.seed_everything(args.seed, verbose=False)
    model = TabularTransformer()
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=CSVLogger(args.out / "logs", name=name),
        callbacks=[
            *callbacks,
            ModelCheckpoint(args.out, filename=name, enable_version_counter=False),
            RichProgressBar(),
        ],
        log_every_n_steps=11,  # an epoch
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Tumours(args.seed))
    return model


@torch.no_grad()
def score(model: nn.Module, data: Tumours) -> str:
    """Tell how many of the held-out cases a network judges correctly."""
    rows, labels = data.test.tensors
    right = int(((model.eval()(rows) > 0) == labels).sum())
    return f"{right} ({right / len(labels):.1%})"


def main() -> None:
    """Train twice, with and without quantization, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tabular"), help="folder for all files")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster with more

    data = Tumours(args.seed)
    float_model = fit("fp32", args, [])
    calibrated = prepare_qat(float_model, LEARNED_SCALES, float_model.example_input_array)
    calibrate(calibrated, (rows for rows, _ in data.train_dataloader()))
    record = args.out / "int8.record.txt"
    quant = QuantRetrainCallback(LEARNED_SCALES, record, quant_lr_scale=0.01, schedule=SCHEDULE)
    quantized = fit("int8", args, [quant, QuantMonitor()])

    table = Table(title="Right answers for 200 held-out cases")
    table.add_column("network")
    table.add_column("right", justify="right")
    table.add_row("FP32", score(float_model, data))
    table.add_row("the same in INT8, calibrated only", score(calibrated, data))
    table.add_row("INT8, trained", score(quantized, data))
    console = Console()
    console.print(table)
    console.print(f"Checkpoint: {args.out / 'int8.ckpt'}\nRecord file: {record}", highlight=False)


if __name__ == "__main__":
    main()
