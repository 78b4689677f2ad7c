"""A model in the style of Hugging Face in INT8, from its float checkpoint: dict batches, ``forward(**inputs)``.

The transformer reads a handwritten digit as a sequence of tokens, one per pixel, padded to a common length. Its batches
are dicts as a tokenizer gives them, and its LightningModule hands them on as they are. First it is trained in float;
then a second run begins with the float checkpoint. A model of the transformers library takes the place of
``SequenceClassifier`` without a change to the rest.

    python examples/hugging_face.py
    amct-lightning fit --config examples/hugging_face.yaml    # the second run, after the script
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
from torch.utils.data import DataLoader, Dataset

from amct_lightning import QuantRetrainCallback, conversion_report

LEVELS, PIXELS = 17, 64
"""A pixel has 17 grey levels. Token 0 is the padding."""


class Block(nn.Module):
    """Attention and a feed-forward network, each with a residual connection."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mix the tokens that the mask leaves, then each by itself."""
        y = self.norm1(x)
        query, key, value = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class SequenceClassifier(nn.Module):
    """What ``BertForSequenceClassification`` is, in small: keyword arguments in, a dict with loss and logits out.

    Args:
        size: Width of the network.
        blocks: Number of blocks.
    """

    def __init__(self, size: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(LEVELS + 1, size, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(PIXELS, size))
        for table in (self.tokens.weight, self.positions):
            nn.init.normal_(table, std=0.3)
        self.blocks = nn.ModuleList(Block(size, heads=4) for _ in range(blocks))
        self.norm = nn.LayerNorm(size)
        self.classifier = nn.Linear(size, 10)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits, and the loss if there are labels."""
        mask = attention_mask.bool()
        x = self.tokens(input_ids) + self.positions[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x).masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True)
        logits = self.classifier(x)
        return (
            {"logits": logits}
            if labels is None
            else {"logits": logits, "loss": functional.cross_entropy(logits, labels)}
        )


class Classification(pl.LightningModule):
    """The usual LightningModule around such a model; it knows neither the arguments nor quantization.

    Args:
        lr: Learning rate at the start of the cosine schedule.
    """

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.model = SequenceClassifier()
        self.lr = lr

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Hand the batch to the model."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss that the model computes."""
        loss = self(**batch)["loss"]
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy on held-out digits."""
        right = (self(**batch)["logits"].argmax(1) == batch["labels"]).float()
        self.log("val_acc", right.mean(), prog_bar=True, batch_size=len(right))

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with a cosine schedule over the whole training."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class TokenDigits(Dataset[dict[str, Tensor]]):
    """Digits as dicts of tokens; blank pixels at the end are padding.

    Args:
        images: Grey levels from 0 to 16, flat.
        labels: The digits.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.mask = images.flip(1).cumsum(1).flip(1) > 0
        self.ids = (images + 1) * self.mask
        self.labels = labels

    def __len__(self) -> int:
        """Return the number of digits."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one of them."""
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index].long(), "labels": self.labels[index]}


class TokenData(pl.LightningDataModule):
    """1,797 handwritten digits that ship with scikit-learn, 450 of them held out.

    Args:
        seed: Chooses the held-out digits, and the order of the others.
    """

    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        self.seed = seed
        data = load_digits()
        images, labels = torch.tensor(data.images, dtype=torch.long).flatten(1), torch.tensor(data.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self.test, self.train = (TokenDigits(images[part], labels[part]) for part in (order[:450], order[450:]))

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the digits to learn from."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, 32, shuffle=True, generator=generator, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the held-out digits."""
        return DataLoader(self.test, 450)


def fit(name: str, args: argparse.Namespace, model: Classification, epochs: int, *callbacks: pl.Callback) -> float:
    """Train, keep the checkpoint and return the accuracy on the held-out digits."""
    pl.seed_everything(args.seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
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
    trainer.fit(model, datamodule=TokenData(args.seed))
    return float(trainer.callback_metrics["val_acc"])


def main() -> None:
    """Train in float, quantize from the checkpoint, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/hugging_face"), help="folder for all files")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=15, help="epochs of float training")
    parser.add_argument("--qat-epochs", type=int, default=4, help="epochs of quantized fine-tuning")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster with more

    pl.seed_everything(args.seed, verbose=False)
    in_float = fit("fp32", args, Classification(), args.epochs)

    record = args.out / "int8.record.txt"
    model = Classification(lr=1e-3)
    quant = QuantRetrainCallback(float_checkpoint=args.out / "fp32.ckpt", record_file=record)
    quantized = fit("int8", args, model, args.qat_epochs, quant)

    table = Table(title="Accuracy on 450 held-out digits, read as sequences")
    table.add_column("network")
    table.add_column("accuracy", justify="right")
    table.add_row("FP32", f"{in_float:.1%}")
    table.add_row("INT8, trained", f"{quantized:.1%}")
    console = Console()
    console.print(str(conversion_report(model)), table, highlight=False)
    console.print(f"Checkpoint: {args.out / 'int8.ckpt'}\nRecord file: {record}", highlight=False)


if __name__ == "__main__":
    main()
