"""Distillation: the float network teaches its own INT4 copy, where labels are few.

A small network was trained on 1,197 labelled digits. For its quantization only 32 of the labels are at hand; the
images are all there. Plain quantization-aware training learns those 32 by heart. With ``distill=TAUGHT`` the callback
lets the float network answer to every image as well: the student learns from cross entropy on the labelled images,
and from the divergence (KL) between its answers and the teacher's on all. Both start from the same weights, see the
same images and take the same number of steps; each has the learning rate that suits it best.

    python examples/distill.py
    amct-lightning fit --config examples/distill_teacher.yaml    # the float training of the first seed
    amct-lightning fit --config examples/distill.yaml            # its distillation
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

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

from amct_lightning import QuantRetrainCallback, calibrate, load_qat_checkpoint, prepare_qat

INT4 = {
    "activations": {"dst_type": "INT4"},
    "weights": {"dst_type": "INT4"},
    "layers": {"0": {"activations": {"dst_type": "INT8"}, "weights": {"dst_type": "INT8"}}},
}
"""The first layer has a single input channel, and INT4 weights are packed in pairs of them."""

TAUGHT = {"temperature": 4.0, "weight": 0.98, "task_weight": 0.02}
"""The teacher has most of the say. A temperature above 1 softens the answers, so that the small ones count as well."""

Batch = tuple[Tensor, Tensor]


def network(width: int = 6) -> nn.Sequential:
    """A CNN so small that INT4 hurts it."""
    layers: list[nn.Module] = []
    for cin, stride in ((1, 1), (width, 2), (width, 1)):
        layers += [nn.Conv2d(cin, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Classifier(pl.LightningModule):
    """The network and its training with labels.

    Args:
        lr: Learning rate at the start of the cosine schedule.
    """

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = network()
        self.lr = lr
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores."""
        return self.net(images)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy where there are labels; to the other images the network answers, too."""
        images, labels = batch["labelled"]
        answers = self(torch.cat((images, *batch.get("images", ()))))
        loss = functional.cross_entropy(answers[: len(labels)], labels)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy on held-out digits."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with a cosine schedule."""
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class FewLabels(pl.LightningDataModule):
    """1,797 handwritten digits that ship with scikit-learn, 600 of them held out.

    Args:
        seed: Chooses the held-out digits, and the order of the others.
        labels: Number of labels; there are images without one then, in a loader beside. ``None``: all have one.
    """

    def __init__(self, seed: int = 7, labels: int | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.labels = labels
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        parts = (order[:600], order[600:])
        self.test, self.train = (TensorDataset(images[part], torch.tensor(data.target)[part]) for part in parts)

    def train_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Return a loader of images with labels; or two side by side, of which the smaller begins anew at its end."""
        if self.labels is None:
            return {"labelled": self.loader(self.train)}
        images, labels = self.train.tensors
        few = TensorDataset(images[: self.labels], labels[: self.labels])
        return {"labelled": self.loader(few), "images": self.loader(TensorDataset(images))}

    def loader(self, data: TensorDataset) -> DataLoader[Any]:
        """Return batches of 32 in an order that depends on the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(data, 32, shuffle=True, generator=generator, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out digits."""
        return DataLoader(self.test, 600)


def fit(model: Classifier, data: FewLabels, epochs: int, path: Path, callbacks: list[pl.Callback]) -> None:
    """Train, and leave a checkpoint."""
    checkpoints = ModelCheckpoint(path.parent, filename=path.stem, enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(path.parent / "logs", name=path.stem),
        callbacks=[*callbacks, checkpoints, RichProgressBar()],
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)


@torch.no_grad()
def accuracy(net: nn.Module, data: FewLabels) -> float:
    """Share of the held-out digits that a network reads correctly."""
    images, labels = data.test.tensors
    return float((net.eval()(images).argmax(1) == labels).float().mean())


def compare(seed: int, epochs: int, qat_epochs: int, out: Path) -> list[float]:
    """Train in float, quantize with and without a teacher; return the accuracies."""
    full, few = FewLabels(seed), FewLabels(seed, labels=32)
    pl.seed_everything(seed, verbose=False)
    teacher = Classifier()
    fit(teacher, full, epochs, out / "fp32.ckpt", [])
    calibrated = prepare_qat(teacher.net, INT4, teacher.example_input_array)
    calibrate(calibrated, (images for images, _ in full.train_dataloader()["labelled"]))
    results = [accuracy(teacher.net, few), accuracy(calibrated, few)]
    for name, distill, lr in (("plain", None, 1e-4), ("distilled", TAUGHT, 3e-4)):
        files = {"record_file": out / f"{name}.record.txt", "float_checkpoint": out / "fp32.ckpt"}
        quant = QuantRetrainCallback(INT4, submodule="net", distill=distill, **files)
        fit(Classifier(lr), few, qat_epochs, out / f"{name}.ckpt", [quant])
        net = load_qat_checkpoint(network(), out / f"{name}.ckpt")
        results.append(accuracy(net, few))
    return results


def main() -> None:
    """Compare for some seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/distill"), help="folder for all files")
    parser.add_argument("--seed", type=int, default=7, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; one says little")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of FP32 training")
    parser.add_argument("--qat-epochs", type=int, default=8, help="epochs of each quantized fine-tuning")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster with more

    seeds = range(args.seed, args.seed + args.seeds)
    runs = [compare(seed, args.epochs, args.qat_epochs, args.out / f"seed{seed}") for seed in seeds]
    rows = [*zip(seeds, runs, strict=True), ("mean", [mean(column) for column in zip(*runs, strict=True)])]
    table = Table(title="Accuracy on 600 held-out digits")
    for column in ("seed", "FP32", "INT4, calibrated only", "32 labels", "and the teacher", "gain"):
        table.add_column(column, justify="right")
    for seed, values in rows:
        table.add_row(str(seed), *(f"{value:.1%}" for value in values), f"{100 * (values[3] - values[2]):+.1f}")
    console = Console()
    console.print(table)
    console.print(f"Checkpoints and record files: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
