"""The digits example without Lightning, in the style of a script written for AMCT.

Only the import differs from such a script: the functions, the configuration file and the record file are the same.

    python examples/digits_plain.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits_data import digits
from digits_model import network
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

import amct_lightning as amct


def train(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, ...]], epochs: int, lr: float) -> None:
    """Train with AdamW and a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for epoch in tqdm(range(epochs), unit="epoch"):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    """Return the accuracy; the evaluation pass of a quantized model also writes its record file."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    return right / len(loader.dataset)


def main() -> None:
    """Train in FP32, convert, fine-tune, write the record and the ONNX files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/digits_plain"))
    parser.add_argument("--epochs", type=int, default=15, help="epochs of FP32 training")
    parser.add_argument("--qat-epochs", type=int, default=5, help="epochs of quantized fine-tuning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    train_loader, test_loader = digits(seed=7)

    model = network()
    train(model, train_loader, args.epochs, lr=1e-2)
    print(f"FP32 accuracy: {evaluate(model, test_loader):.1%}")

    config_file, record_file = str(args.out / "config.json"), str(args.out / "record.txt")
    input_data = (torch.zeros(1, 1, 8, 8),)
    amct.create_quant_retrain_config(config_file, model, input_data)
    quant_model = amct.create_quant_retrain_model(config_file, model, record_file, input_data)
    train(quant_model, train_loader, args.qat_epochs, lr=3e-3)
    print(f"INT8 accuracy: {evaluate(quant_model, test_loader):.1%}")
    torch.save(quant_model.state_dict(), args.out / "quant_model.pth")
    amct.save_quant_retrain_model(config_file, quant_model, record_file, str(args.out / "digits"), input_data)
    print(f"Record file: {record_file}")
    print(f"For the Ascend compiler: {args.out / 'digits_deploy_model.onnx'}")


if __name__ == "__main__":
    main()
