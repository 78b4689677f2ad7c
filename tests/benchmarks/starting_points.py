"""What the choices of ``init`` gain over AMCT's: networks quantized and calibrated, not retrained.

    python -m tests.benchmarks.starting_points

Trains a small MobileNetV2 on digits, the transformer of the examples on digits, and a BERT that tells from which of
four packages of the standard library a piece of text is. Prints the squared error of what goes into the last layer, on
held-out data, relative to its mean square: AMCT's, and by which factor each choice makes it smaller, for each of three
networks. Scales of weights are those per output channel unless a line says otherwise.
"""

from __future__ import annotations

import asyncio
import email
import json
import statistics
import unittest
import warnings
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from amct_lightning import calibrate, prepare_qat
from examples.digits_data import digits
from tests.benchmarks import fixed_min, linear_scales
from tests.benchmarks.linear_scales import Case, features

SEEDS = (7, 8, 9)
TYPES = (("INT8", "INT8"), ("INT8", "INT4"), ("INT4", "INT4"))
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AMCT's": ({}, {}),
    "weights mse": ({}, {"init": "mse"}),
    "percentile 99.99": ({"init": "percentile"}, {}),
    "percentile 99.9": ({"init": "percentile", "percentile": 99.9}, {}),
    "output": ({"init": "output"}, {}),
    "output, weights mse": ({"init": "output"}, {"init": "mse"}),
}
PACKAGES = (asyncio, email, json, unittest)
LENGTH, STEPS = 64, 400


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for name, make in CASES.items():
        cases = [make(seed) for seed in SEEDS]
        for by_channel in (True, False) if name != "MobileNetV2, digits" else (True,):
            for types in TYPES:
                _print_types(f"{name}{'' if by_channel else ', one scale'}", cases, types, by_channel)


def _print_types(name: str, cases: list[Case], types: tuple[str, str], by_channel: bool) -> None:
    errors = {variant: [error(case, types, variant, by_channel) for case in cases] for variant in VARIANTS}
    amct = errors.pop("AMCT's")
    each = ", ".join(f"{value:.1e}" for value in amct)
    print(f"{name}, {'/'.join(types)}: AMCT's {statistics.median(amct):.1e} ({each})", flush=True)
    for variant, found in errors.items():
        factors = [first / second for first, second in zip(amct, found, strict=True)]
        text = ", ".join(f"{factor:.2f}" for factor in factors)
        print(f"    {variant:22}{statistics.median(factors):6.2f}   ({text})", flush=True)


def error(case: Case, types: tuple[str, str], variant: str, by_channel: bool) -> float:
    """Return the squared error of what goes into the layer, relative to its mean square.

    Args:
        case: The network and its data.
        types: Those of activations and weights.
        variant: Where scales and ranges start.
        by_channel: Whether weights of a Linear have a scale per output channel.
    """
    (model, name, calibration, x), (activations, weights) = case, VARIANTS[variant]
    linear = {"weights": {"channel_wise": by_channel}}
    choices = {
        "activations": {"dst_type": types[0], **activations},
        "weights": {"dst_type": types[1], **weights},
        "types": {"Linear": linear},
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*INT8 is used instead of INT4")  # the stem and the depthwise layers
        quantized = prepare_qat(model, choices, calibration, execution="composite")
    calibrate(quantized, [calibration])
    wanted, found = (features(one, name, x) for one in (model, quantized.eval()))
    return float((found - wanted).square().mean() / wanted.square().mean())


def _mobile(seed: int) -> Case:
    model = fixed_min.network(seed)
    fixed_min.train(model, seed, fixed_min.FLOAT_EPOCHS, 3e-3)
    train, test = digits(seed)
    calibration = torch.cat([x for x, _ in islice(train, fixed_min.CALIBRATION_BATCHES)])
    return model.eval(), str(len(model) - 1), calibration, torch.cat([x for x, _ in test])


def _text(seed: int) -> Case:
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    config = transformers.BertConfig(vocab_size=256, max_position_embeddings=LENGTH, num_labels=len(PACKAGES), **size)
    model: Any = transformers.BertForSequenceClassification(config)
    words = [_words(package) for package in PACKAGES]
    held_out = [part[-(len(part) // 5) :] for part in words]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS)
    for _ in range(STEPS):
        ids, labels = _pieces([part[: -(len(part) // 5)] for part in words], 32)
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(input_ids=ids).logits, labels).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    calibration, test = ({"input_ids": _pieces(held_out, number)[0]} for number in (16, 128))
    return model, "classifier", calibration, test


def _words(package: ModuleType) -> Tensor:
    """Return the source of a package as bytes."""
    files = sorted(Path(str(package.__file__)).parent.glob("*.py"))
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)))


def _pieces(texts: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(len(texts), (number,))
    found = []
    for label in labels.tolist():
        start = int(torch.randint(len(texts[label]) - LENGTH, ()))
        found.append(texts[label][start : start + LENGTH])
    return torch.stack(found), labels


CASES = {
    "MobileNetV2, digits": _mobile,
    "transformer, digits": linear_scales.CASES["digits transformer"],
    "BERT, text": _text,
}


if __name__ == "__main__":
    main()
