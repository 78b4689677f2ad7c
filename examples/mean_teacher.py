"""A momentum teacher beside a quantized student: the teacher is the average of the student's weights, in float.

Few of the handwritten digits have a label. The student, in INT8, learns from these labels and from what the teacher
says of all images, noise added to what the student sees. After each step the teacher moves a little towards the
student. The loop that moves it goes over ``float_parameters``: the quantized student has clips between its weights,
which the teacher does not have.

    python examples/mean_teacher.py
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from distill import Classifier, FewLabels
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from amct_lightning import QuantRetrainCallback, float_parameters


class MeanTeacher(Classifier):
    """A student and its teacher; ``QuantRetrainCallback(submodule="net")`` quantizes the student.

    Args:
        momentum: How much of the teacher stays in a step, 0 to 1.
        noise: Standard deviation of the noise that the student sees.
        lr: Learning rate at the start of the cosine schedule.
    """

    def __init__(self, momentum: float = 0.98, noise: float = 0.2, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.momentum = momentum
        self.noise = noise
        self.teacher_accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy where there are labels, and the distance from the teacher's answers everywhere."""
        images, labels = batch["labelled"]
        images = torch.cat((images, batch["images"][0]))
        answers = self(images + self.noise * torch.randn_like(images))
        with torch.no_grad():
            taught = self.teacher(images).softmax(1)
        loss = functional.cross_entropy(answers[: len(labels)], labels)
        loss = loss + functional.mse_loss(answers.softmax(1), taught) * 10
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the teacher towards the student, weight by weight."""
        pairs = zip(float_parameters(self.teacher), float_parameters(self.net), strict=True)
        for old, new in pairs:
            old.data.lerp_(new.data, 1 - self.momentum)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy of both on held-out digits."""
        super().validation_step(batch, batch_idx)
        images, labels = batch
        self.teacher_accuracy(self.teacher(images), labels)
        self.log("val_acc_teacher", self.teacher_accuracy, prog_bar=True)


def main() -> None:
    """Train both; say how good they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--labels", type=int, default=64, help="number of images with a label")
    parser.add_argument("--out", type=Path, default=Path("runs/mean_teacher"))
    options = parser.parse_args()
    pl.seed_everything(7)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[
            QuantRetrainCallback(submodule="net", record_file=options.out / "record.txt"),
            ModelCheckpoint(options.out, save_last=True),
            RichProgressBar(),
        ],
        logger=CSVLogger(options.out),
        default_root_dir=options.out,
        accelerator="cpu",
        log_every_n_steps=5,
    )
    trainer.fit(MeanTeacher(), FewLabels(labels=options.labels))
    student, teacher = (float(trainer.callback_metrics[name]) for name in ("val_acc", "val_acc_teacher"))
    print(f"student, INT8: {student:.1%}   teacher, float: {teacher:.1%}   record: {options.out / 'record.txt'}")


if __name__ == "__main__":
    main()
