"""A language model for Ascend servers: trained in float, in INT8 with its float self as the teacher, saved, read back.

A small decoder of the kind of Qwen2 learns the language reference that ships with Python. Then it is trained on as
the server will compute it: ``target="serving"`` takes a weight scale per output channel and the bfloat16 scales of
vLLM-Ascend, and the float network teaches it. ``save_serving`` writes the folder that the server loads, and
``verify_serving`` reads it back and compares the two networks, logit by logit.

    python examples/serving.py
    amct-lightning fit --config examples/serving_float.yaml    # the float training
    amct-lightning fit --config examples/serving.yaml          # its INT8 training
"""

from __future__ import annotations

import argparse
import copy
import math
import pydoc_data.topics
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from amct_lightning import (
    QuantRetrainCallback,
    calibrate,
    load_qat_checkpoint,
    load_serving,
    prepare_qat,
    save_serving,
    verify_serving,
)

VOCABULARY, LENGTH = 512, 64

W8A8: dict[str, Any] = {"batch_num": 4, "skip_layers": ["lm_head"]}
"""INT8 for all projections; servers compute what makes words of the last states in float, as is usual."""

TAUGHT = {"temperature": 2.0, "weight": 0.5, "task_weight": 0.5}


def network() -> Qwen2ForCausalLM:
    """Return the decoder in float, 0.2 million weights."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


class LanguageModel(pl.LightningModule):
    """The usual LightningModule around a decoder; it knows nothing of quantization.

    Args:
        lr: Learning rate at the start of the cosine schedule.
    """

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.model = network()
        self.lr = lr
        self.example_input_array = torch.zeros(1, LENGTH, dtype=torch.long)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token that follows each."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of the next token."""
        loss = next_token_loss(self(batch[0]), batch[0])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The same on held-out text."""
        self.log("val_loss", next_token_loss(self(batch[0]), batch[0]), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with a cosine schedule over the whole training."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class PythonReference(pl.LightningDataModule):
    """The topics of Python's language reference in pieces of 64 tokens, every tenth of them held out.

    Args:
        seed: Chooses the order of the pieces.
    """

    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        self.seed = seed
        text = "\n".join(pydoc_data.topics.topics.values())
        self.tokenizer = byte_pairs(text)
        ids = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])
        pieces = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        held_out = torch.arange(len(pieces)) % 10 == 9
        self.train, self.test = TensorDataset(pieces[~held_out][:2560]), TensorDataset(pieces[held_out][:256])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of 32 in an order that depends on the seed."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, 32, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out pieces."""
        return DataLoader(self.test, 64)


def byte_pairs(text: str) -> PreTrainedTokenizerFast:
    """Learn a tokenizer from a text, in the form in which transformers and servers keep one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of each next token."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def perplexity(net: nn.Module, data: PythonReference) -> float:
    """Return how many tokens the network wavers between, on held-out text."""
    net.eval()
    losses = [next_token_loss(net(input_ids=x, use_cache=False).logits, x) for (x,) in data.val_dataloader()]
    return math.exp(float(torch.stack(losses).mean()))


def fit(model: LanguageModel, data: PythonReference, epochs: int, path: Path, callbacks: list[pl.Callback]) -> None:
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


def main() -> None:
    """Train, quantize, save, read back and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/serving"), help="folder for all files")
    parser.add_argument("--seed", type=int, default=7, help="for the weights and the order of the text")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of float training")
    parser.add_argument("--qat-epochs", type=int, default=2, help="epochs of INT8 training")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster with more

    data = PythonReference(args.seed)
    pl.seed_everything(args.seed, verbose=False)
    model = LanguageModel()
    fit(model, data, args.epochs, args.out / "float.ckpt", [])
    source = args.out / "float_network"
    copy.deepcopy(model.model).bfloat16().save_pretrained(source)
    data.tokenizer.save_pretrained(source)

    calibrated = prepare_qat(model.model, W8A8, {"input_ids": model.example_input_array}, target="serving")
    calibrate(calibrated, [{"input_ids": x} for (x,) in islice(data.train_dataloader(), W8A8["batch_num"])])
    rows = [("float", perplexity(model.model, data)), ("W8A8, calibrated only", perplexity(calibrated, data))]

    files = {"record_file": args.out / "w8a8.record.txt", "float_checkpoint": args.out / "float.ckpt"}
    quant = QuantRetrainCallback(W8A8, submodule="model", target="serving", distill=TAUGHT, **files)
    fit(LanguageModel(lr=3e-4), data, args.qat_epochs, args.out / "w8a8.ckpt", [quant])
    trained = load_qat_checkpoint(network(), args.out / "w8a8.ckpt")
    rows.append(("W8A8, trained", perplexity(trained, data)))

    folder = save_serving(trained, args.out / "served", hf_source=source)
    report = verify_serving(trained, folder, [{"input_ids": x} for (x,) in islice(data.val_dataloader(), 2)])
    rows.append(("W8A8, as served in bfloat16", perplexity(load_serving(folder), data)))

    table = Table(title="Perplexity on held-out text")
    table.add_column("network")
    table.add_column("perplexity", justify="right")
    for name, value in rows:
        table.add_row(name, f"{value:.3f}")
    console = Console()
    console.print(table)
    console.print(report)
    console.print(f"For the server: {folder}", highlight=False)


if __name__ == "__main__":
    main()
